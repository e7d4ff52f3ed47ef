"""Where rows lie: the arithmetic of the modulo placement, and the collectives over all devices.

The physical row of id r on N shards is (r mod N) * rows_per_shard + r div N: a count-sorted vocabulary would put
all popular rows on shard 0 if the shards owned blocks.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxrec.core.mesh import ALL_AXES


def num_shards() -> int:
    """Devices of the mesh in use (1 outside of any mesh)."""
    return max(1, jax.sharding.get_abstract_mesh().size)


def physical_rows(ids: Int[Array, "*t"], shards: int, rows_per_shard: int) -> Int[Array, "*t"]:
    """Where the rows of `ids` lie."""
    return ids % shards * rows_per_shard + ids // shards


def logical_ids(shard: Int[Array, ""] | int, shards: int, rows_per_shard: int) -> Int[Array, "r"]:
    """The ids whose rows `shard` holds, in their physical order; may run past the last id."""
    return jnp.arange(rows_per_shard, dtype=jnp.int32) * shards + shard


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
