"""Logits of a few items, to be added to those of the towers.

T = queries, M = places for items, N = blocks, B = queries of a block, E = lists of a block.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Queries that are mixed from the same lists: more make the product longer, fewer repeat more lists.
BLOCK = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseLogits:
    """What is added to the logit of each named item; an item that is named twice gets both.

    Attributes:
      item_ids: 0 = an empty place.
    """

    item_ids: Int[Array, "*t M"]
    values: Float[Array, "*t M"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixedLogits:
    """Logits of consecutive queries that share lists of items: query b of a block gets `sum_e mixing[b, e] list[e]`.

    A list is scattered once for all queries of its block, and the rest is a product of small matrices, where sparse
    logits of each query would scatter every list again and again.

    Attributes:
      item_ids: 0 = an empty place.
      at_target: added to the logit of each query's target.
    """

    item_ids: Int[Array, "N E M"]
    values: Float[Array, "N E M"]
    mixing: Float[Array, "N B E"]
    at_target: Float[Array, "N B"]

    @classmethod
    def of_events(
        cls,
        item_ids: Int[Array, "R L M"],
        values: Float[Array, "R L M"],
        mixing: Float[Array, "R L W"],
        at_target: Float[Array, "R L"],
    ) -> "MixedLogits":
        """Every event of a row has a list and is a query for the lists of its own and of the W - 1 events before.

        `mixing[r, l, a]` is what the list of event `l - a` is worth to query l; it must be 0 where `l < a`. The last
        block of a row is filled with queries that get nothing: see `in_blocks`.
        """
        before = mixing.shape[2] - 1
        block = max(BLOCK, before)  # so that a block reaches into the block before it at most

        def windows(x: jax.Array) -> jax.Array:
            x = in_blocks(x, block)
            previous = jnp.pad(x[:, :-1, block - before :], ((0, 0), (1, 0), (0, 0), (0, 0)))
            return jax.lax.collapse(jnp.concatenate([previous, x], 2), 0, 2)

        return cls(
            windows(item_ids),
            windows(values),
            _band(jax.lax.collapse(in_blocks(mixing, block), 0, 2)),
            jax.lax.collapse(in_blocks(at_target, block), 0, 2),
        )

    @property
    def block(self) -> int:
        """B."""
        return self.mixing.shape[1]


def in_blocks(x: jax.Array, block: int) -> jax.Array:
    """`[R, L, ...]` to `[R, L / block, block, ...]`, filled up with zeros."""
    rows, length = x.shape[:2]
    count = -(-length // block)
    x = jnp.pad(x, [(0, 0), (0, count * block - length), *((0, 0) for _ in x.shape[2:])])
    return x.reshape(rows, count, block, *x.shape[2:])


def _band(mixing: Float[Array, "N B W"]) -> Float[Array, "N B E"]:
    """Ages become places: query b finds the list of age a at place `b + W - 1 - a`."""
    num, block, window = mixing.shape
    width = block + window - 1
    # Rows that are one longer than the result's start one place later each when they are read on end.
    skewed = jnp.pad(mixing[:, :, ::-1], ((0, 0), (0, 0), (0, block)))
    return skewed.reshape(num, -1)[:, : block * width].reshape(num, block, width)
