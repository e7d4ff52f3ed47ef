"""Where rows lie: the arithmetic of the modulo placement, and the collectives over all devices.

The physical row of id r on N shards is (r mod N) * rows_per_shard + r div N: a count-sorted vocabulary would put
all popular rows on shard 0 if the shards owned blocks.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

from jaxrec.core.mesh import ALL_AXES

Ids = TypeVar("Ids", Array, np.ndarray)


def num_shards() -> int:
    """Devices of the mesh in use (1 outside of any mesh)."""
    return max(1, jax.sharding.get_abstract_mesh().size)


def physical_rows(ids: Ids, shards: int, rows_per_shard: int) -> Ids:
    """Where the rows of `ids` lie; on the device or on the host."""
    return ids % shards * rows_per_shard + ids // shards


def logical_ids(total_rows: int) -> Int[Array, "r"]:
    """The ids of all physical rows, in physical order; may run past the table's last id."""
    rows_per_shard = total_rows // num_shards()
    place = jnp.arange(total_rows, dtype=jnp.int32)
    return place % rows_per_shard * num_shards() + place // rows_per_shard


def own_ids(rows: Int[Array, "r"] | UInt32[Array, "r"]) -> Array:
    """Inside `shard_map`: the ids of this shard's rows, in their dtype; may run past the table's last id."""
    return rows * num_shards() + jax.lax.axis_index(ALL_AXES).astype(rows.dtype)


def all_gather(x: Array) -> Array:
    """Inside `shard_map`: all devices' parts, joined along the first dim."""
    return x if num_shards() == 1 else jax.lax.all_gather(x, ALL_AXES, tiled=True)


def psum_scatter(x: Array) -> Array:
    """Inside `shard_map`: the sum over devices, of which each keeps its part of the first dim."""
    return x if num_shards() == 1 else jax.lax.psum_scatter(x, ALL_AXES, tiled=True)


def local_index(ids: Int[Array, "t"], rows_per_shard: int) -> Int[Array, "t"]:
    """Inside `shard_map`: the row on this shard, or `rows_per_shard` (out of range) for another shard's id."""
    mine = (ids % num_shards() == jax.lax.axis_index(ALL_AXES)) & (ids >= 0)
    return jnp.where(mine, ids // num_shards(), rows_per_shard)
