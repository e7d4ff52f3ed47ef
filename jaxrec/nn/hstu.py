"""HSTU's layer: attention whose weights are no shares of a whole, gated by the query's own vector.

B = rows, Q = query positions, L = key positions, D = model width, F = width of values and gate, H = heads,
K = width of a head's query, V = width of a head's value.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxrec.nn.attention import take_columns
from jaxrec.nn.chunked_attention import CHUNK, mix_in_chunks
from jaxrec.nn.dropout import dropout
from jaxrec.nn.layers import LayerNorm, affine, glorot_normal, parameter
from jaxrec.nn.positions import RelativeBias, rotate, score_bias
from jaxrec.nn.visibility import Visibility


def mix(
    query: Float[Array, "b h q k"],
    key: Float[Array, "b h l k"],
    value: Float[Array, "b h l v"],
    mask: Bool[Array, "b q l"],
    dropout_key: jax.Array | None = None,
    dropout_rate: float = 0.0,
    bias: Float[Array, "#b h q l"] | None = None,
) -> Float[Array, "b h q v"]:
    """The values that a query sees, each weighted by the SiLU of its score; scores in float32.

    Args:
      mask: True = may be seen.
      dropout_key: of the dropout on the weights; None = no dropout.
      bias: added to the scores.

    Source: Zhai et al., ICML 2024 (pointwise aggregated attention; scores are not scaled).
    """
    scores = jnp.einsum("bhqk,bhlk->bhql", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias
    weights = jnp.where(mask[:, None], jax.nn.silu(scores), 0.0).astype(value.dtype)
    kept = dropout(weights, dropout_rate, dropout_key)
    mixed = jnp.einsum("bhql,bhlv->bhqv", kept, value, preferred_element_type=jnp.float32)
    return mixed.astype(value.dtype)


class PointwiseAttention(nnx.Module):
    """Query and gate by one map, key and value by another, SiLU after both; `norm(mixed values) * gate`; a map back.

    Source: Zhai et al., ICML 2024 (HSTU). Here the maps have biases, and what is mixed is divided by `max_positions`,
    not by the length of the padded rows, so that a history gives the same however its row is packed.
    """

    def __init__(
        self,
        embed_dim: int,
        mlp_dim: int,
        num_heads: int,
        *,
        max_positions: int,
        attention_dropout_rate: float,
        mlp_dropout_rate: float,
        epsilon: float,
        rotary: bool,
        relative_bias: RelativeBias,
        rngs: nnx.Rngs,
    ):
        """Makes random weights.

        Args:
          mlp_dim: F.
          mlp_dropout_rate: on the gated values.
          rotary: turn queries and keys by their columns.
          relative_bias: is added to the scores.
        """
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.max_positions = max_positions
        self.attention_dropout_rate, self.mlp_dropout_rate = attention_dropout_rate, mlp_dropout_rate
        self.rotary, self.relative_bias = rotary, relative_bias
        # What a position asks with (query and gate) lies apart from what it is asked for (key and value).
        shape = (num_heads, self.head_dim + mlp_dim // num_heads)
        kernels = (glorot_normal(rngs.params(), (embed_dim, *shape), embed_dim, embed_dim) for _ in range(2))
        self.query_kernel, self.key_kernel = (parameter(kernel, "embed", "heads", None) for kernel in kernels)
        self.query_bias, self.key_bias = (parameter(jnp.zeros(shape), "heads", None) for _ in range(2))
        self.mixed_norm = LayerNorm(mlp_dim, epsilon)
        kernel = glorot_normal(
            rngs.params(), (num_heads, shape[1] - self.head_dim, embed_dim), mlp_dim, embed_dim
        )
        self.out_kernel = parameter(kernel, "heads", None, "embed")
        self.out_bias = parameter(jnp.zeros((embed_dim,), jnp.float32), "embed")

    def __call__(
        self, x: Float[Array, "b l d"], seen: Visibility, *, key: jax.Array | None
    ) -> Float[Array, "b q d"]:
        """Applies the layer at the query positions of `seen`, by its path."""
        chosen = x if seen.query_positions is None else take_columns(x, seen.query_positions)
        queries, gates = self._split(chosen, self.query_kernel[...], self.query_bias[...])
        keys, values = self._split(x, self.key_kernel[...], self.key_bias[...])
        if self.rotary:
            queries, keys = rotate(queries, seen.queries.columns), rotate(keys, seen.keys.columns)
        rate = self.attention_dropout_rate
        if seen.mask is not None:  # the full path
            added = score_bias(self.relative_bias.tables(1), seen.queries, seen.keys)
            mixed = mix(queries, keys, values, seen.mask, key, rate, added)
        else:
            tables = self.relative_bias.tables(len(x))
            mixed = mix_in_chunks(queries, keys, values, seen, key, rate, CHUNK, tables)
        mixed, gates = (_join_heads(part) for part in (mixed, gates))
        gated = self.mixed_norm(mixed * (1.0 / self.max_positions)) * gates
        gated = dropout(gated, self.mlp_dropout_rate, None if key is None else jax.random.fold_in(key, 0))
        return affine(gated, self.out_kernel[...].reshape(-1, x.shape[-1]), self.out_bias[...])

    def _split(
        self, x: Float[Array, "b l d"], kernel: Float[Array, "d h kv"], bias: Float[Array, "h kv"]
    ) -> tuple[Float[Array, "b h l k"], Float[Array, "b h l v"]]:
        """A map of x and SiLU, by heads and in its two parts."""
        mapped = jax.nn.silu(affine(x, kernel.reshape(len(kernel), -1), bias.reshape(-1)))
        mapped = jnp.swapaxes(mapped.reshape(*x.shape[:2], *bias.shape), 1, 2)
        return mapped[..., : self.head_dim], mapped[..., self.head_dim :]


def _join_heads(x: Float[Array, "b h l v"]) -> Float[Array, "b l f"]:
    batch, _, length, _ = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(batch, length, -1)
