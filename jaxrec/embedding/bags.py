"""Multi-valued features: a bag of ids becomes one vector.

A bag is padded (`[*b, K]`, id 0 = padding) or ragged: ids of all bags behind one another with the number of the
bag of each. Both take rows that `engine.look_up` returned, and are differentiable.

K = ids of a bag at most, T = ids of all bags of a device, G = bags of a device, D = dim.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrec.core.partition import spec

Pooling = Literal["sum", "mean", "max"]


def pool_padded(
    rows: Float[Array, "*b K D"], weights: Float[Array, "*b K"], pooling: Pooling
) -> Float[Array, "*b D"]:
    """The sum, weighted mean or maximum of each bag; zeros for an empty one.

    Args:
      weights: 0 leaves an id out (padding); any other number weighs its row, but only says "there" to a maximum.
    """
    if pooling == "max":
        return _finite(jnp.max(jnp.where(weights[..., None] != 0, rows, -jnp.inf), -2))
    total = jnp.einsum("...k,...kd->...d", weights, rows)
    return total if pooling == "sum" else total / _divisor(jnp.sum(weights, -1))[..., None]


def pool_ragged(
    rows: Float[Array, "t D"],
    bags: Int[Array, "t"],
    weights: Float[Array, "t"],
    pooling: Pooling,
    *,
    bags_a_device: int,
) -> Float[Array, "g D"]:
    """The same for ragged bags.

    Args:
      rows: split over the devices, as `bags` and `weights` are.
      bags: the number of the bag among its device's, rising; a device's bags lie on it whole.
      bags_a_device: static; the result has as many rows for each device.
    """

    def local(rows: jax.Array, bags: jax.Array, weights: jax.Array) -> jax.Array:
        sum_up = lambda x: jax.ops.segment_sum(x, bags, num_segments=bags_a_device, indices_are_sorted=True)  # noqa: E731
        if pooling == "max":
            there = jnp.where(weights[:, None] != 0, rows, -jnp.inf)
            highest = jax.ops.segment_max(there, bags, num_segments=bags_a_device, indices_are_sorted=True)
            return _finite(highest)
        total = sum_up(rows * weights[:, None])
        return total if pooling == "sum" else total / _divisor(sum_up(weights))[:, None]

    batch = spec("batch")
    return jax.shard_map(local, in_specs=(batch,) * 3, out_specs=batch, check_vma=False)(rows, bags, weights)


def _finite(highest: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
    return jnp.where(jnp.isfinite(highest), highest, 0.0)


def _divisor(total: Float[Array, "*b"]) -> Float[Array, "*b"]:
    return jnp.where(total == 0, 1.0, total)
