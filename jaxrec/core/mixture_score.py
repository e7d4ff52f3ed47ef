"""A score that is no product: the mixture of the products of several vectors a side.

One array holds a side, so that it travels, is sharded and is sampled as a single vector would be: its n vectors, then
n x n gates, then one number, the sharpness, which is the query's.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class MixtureScore:
    """`sum over k, l of p_kl <q_k, v_l>` with `p = softmax(gates of q + gates of v + sharpness * products)`.

    Attributes:
      num_vectors: n, on each side.
      dim: of each vector.

    Source: Zhai et al., KDD 2023 (mixture of logits). Here the gate sees the products by one number, not by an MLP.
    """

    num_vectors: int
    dim: int

    @property
    def width(self) -> int:
        """Of the array that holds a side."""
        return self.num_vectors * self.dim + self.num_vectors**2 + 1

    def vectors(self, x: Float[Array, "*b w"]) -> Float[Array, "*b n d"]:
        """The vectors of a side."""
        return x[..., : self.num_vectors * self.dim].reshape(*x.shape[:-1], self.num_vectors, self.dim)

    def gates(self, x: Float[Array, "*b w"]) -> Float[Array, "*b n n"]:
        """The gates of a side."""
        gates = x[..., self.num_vectors * self.dim : -1]
        return gates.reshape(*x.shape[:-1], self.num_vectors, self.num_vectors)

    def pairs(self, queries: Float[Array, "*b w"], items: Float[Array, "*b w"]) -> Float[Array, "*b"]:
        """The score of each query with its own item, in float32."""
        products = jnp.einsum(
            "...kd,...ld->...kl",
            self.vectors(queries),
            self.vectors(items),
            preferred_element_type=jnp.float32,
        )
        return self.mix(products, self.gates(queries), self.gates(items), queries[..., -1])

    def all_pairs(self, queries: Float[Array, "q w"], items: Float[Array, "i w"]) -> Float[Array, "q i"]:
        """The scores of every query with every item, in float32."""
        products = jnp.einsum(
            "qkd,ild->qikl", self.vectors(queries), self.vectors(items), preferred_element_type=jnp.float32
        )
        return self.mix(products, self.gates(queries)[:, None], self.gates(items), queries[:, None, -1])

    def mix(
        self,
        products: Float[Array, "*b n n"],
        query_gates: Float[Array, "*#b n n"],
        item_gates: Float[Array, "*#b n n"],
        sharpness: Float[Array, "*#b"],
    ) -> Float[Array, "*b"]:
        """The mean of the products by their gates."""
        gates = (query_gates + item_gates).astype(jnp.float32) + sharpness[..., None, None] * products
        flat = (*products.shape[:-2], self.num_vectors**2)
        weights = jax.nn.softmax(gates.reshape(flat), axis=-1)
        return jnp.sum(weights * products.reshape(flat), axis=-1)
