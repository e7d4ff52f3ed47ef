"""One device's part of mixed logits: lists scattered over its own rows, mixed for the queries of their block.

T = queries of a chunk (N blocks of B), V = local rows or those of a tile, E = lists of a block, M = places of a list.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrec.core.placement import local_index


def places_of(item_ids: Int[Array, "N E M"], rows: int) -> Int[Array, "N E M"]:
    """Local rows of the named items; far below 0 = another device's, or none."""
    index = local_index(item_ids, rows)
    return jnp.where((index < rows) & (item_ids > 0), index, -rows - 1)


def mix(
    logits: Float[Array, "T V"],
    places: Int[Array, "N E M"],
    values: Float[Array, "N E M"],
    mixing: Float[Array, "N B E"],
) -> tuple[Float[Array, "T V"], Float[Array, "N E V"]]:
    """The logits with what the lists add, and the lists, as dense as the logits are; places outside are dropped."""
    num, lists, _ = places.shape
    width = logits.shape[1]
    outside = jnp.where(places < 0, width, places)
    at = jnp.arange(num)[:, None, None], jnp.arange(lists)[:, None], outside
    dense = jnp.zeros((num, lists, width), jnp.float32).at[at].add(values, mode="drop")
    return logits + (mixing @ dense).reshape(logits.shape), dense


def unmix(
    d_logits: Float[Array, "T V"],
    dense: Float[Array, "N E V"],
    places: Int[Array, "N E M"],
    mixing: Float[Array, "N B E"],
) -> tuple[Float[Array, "N E M"], Float[Array, "N B E"]]:
    """Gradients of the values and of the mixing; `dense` as `mix` gave it."""
    d_logits = d_logits.reshape(*mixing.shape[:2], -1)
    d_dense = jnp.swapaxes(mixing, 1, 2) @ d_logits
    inside = (places >= 0) & (places < d_logits.shape[2])
    d_values = jnp.where(inside, jnp.take_along_axis(d_dense, jnp.where(inside, places, 0), 2), 0.0)
    return d_values, d_logits @ jnp.swapaxes(dense, 1, 2)
