"""What a domain does otherwise than the others: a small residual map for each, behind an encoder that all share.

D = features, N = domains, R = rank.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxrec.nn.layers import affine, glorot_normal, parameter


class DomainAdapters(nnx.Module):
    """`x + gelu(x A_n + a_n) B_n + b_n` for the domain n of each position; B and b are 0 at the start.

    All domains' A are one matrix, and what is of another domain is masked behind it: the cost grows with N, which is
    small, and no matrix is gathered for each position.

    Source: Bapna and Firat, EMNLP 2019 (an adapter a language), without a normalisation of their own.
    """

    def __init__(self, num_domains: int, dim: int, rank: int, *, rngs: nnx.Rngs):
        down = [glorot_normal(rngs.params(), (dim, rank), dim, rank) for _ in range(num_domains)]
        self.down = parameter(jnp.stack(down), None, "embed", None)
        self.down_bias = parameter(jnp.zeros((num_domains, rank), jnp.float32), None, None)
        self.up = parameter(jnp.zeros((num_domains, rank, dim), jnp.float32), None, None, "embed")
        self.up_bias = parameter(jnp.zeros((num_domains, dim), jnp.float32), None, "embed")

    def __call__(self, x: Float[Array, "b s d"], domain_ids: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        """Applies to each position the map of its domain.

        Args:
          domain_ids: 1 .. N; 0 = of none, which is left as it is.
        """
        num_domains, rank, dim = self.up.shape
        own = jax.nn.one_hot(domain_ids - 1, num_domains, dtype=x.dtype)
        down = self.down[...].swapaxes(0, 1).reshape(dim, num_domains * rank)
        inner = jax.nn.gelu(affine(x, down, self.down_bias[...].reshape(-1)))
        inner = inner * jnp.repeat(own, rank, axis=-1)
        outer = affine(inner, self.up[...].reshape(num_domains * rank, dim), jnp.zeros(dim))
        return x + outer + own @ self.up_bias[...].astype(x.dtype)
