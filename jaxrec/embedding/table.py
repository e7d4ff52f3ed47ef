"""A table whose rows lie over every device of the mesh.

`core.placement` says which row lies where. Everything here runs under `jax.set_mesh`.

N = shards, R = physical rows (N * rows_per_shard), D = embed dim, T = ids.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxrec.core.mesh import ALL_AXES
from jaxrec.core.partition import sharding, spec
from jaxrec.core.placement import all_gather, local_index, num_shards, psum_scatter

# Checkpoints hold this many logical rows times a whole number, so that their files fit every N that divides it.
FILE_ROW_MULTIPLE = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableSpec:
    """What a table is, apart from where it lies.

    Attributes:
      num_rows: ids are 0 .. num_rows - 1; id 0 is padding and its row stays zero.
      init_scale: standard deviation of the initial rows.
    """

    num_rows: int
    dim: int
    init_scale: float = 0.02

    def rows_per_shard(self, num_shards: int) -> int:
        """Rows that each shard holds; the last ones are padding where `num_rows` does not divide."""
        return -(-self.num_rows // num_shards)


def init_table(table: TableSpec, key: jax.Array, mesh: Mesh) -> Float[Array, "R D"]:
    """Normal rows of `init_scale`, a function of (key, id) alone, hence the same on every mesh."""

    def create(key: jax.Array) -> jax.Array:
        rows = jax.random.normal(key, (table.num_rows, table.dim), jnp.float32) * table.init_scale
        return _to_physical(rows.at[0].set(0.0), table.num_rows, mesh.size)

    return jax.jit(create, out_shardings=sharding(mesh, "row", "embed"))(key)


def lookup(table: Float[Array, "R D"], ids: Int[Array, "b *l"]) -> Float[Array, "b *l D"]:
    """The rows of ids whose leading dim is split over the devices.

    Plain and exact: every device answers for its own rows and the sum returns to the asker. Not differentiated:
    the step differentiates with respect to the rows that it returns. Ids out of range give zero rows.
    """

    def local(shard: jax.Array, ids: jax.Array) -> jax.Array:
        rows = psum_scatter(_local_rows(shard, all_gather(ids.reshape(-1))))
        return rows.reshape(*ids.shape, shard.shape[1])

    return jax.shard_map(local, in_specs=(spec("row"), spec("batch")), out_specs=spec("batch"))(table, ids)


def lookup_shared(table: Float[Array, "R D"], ids: Int[Array, "t"]) -> Float[Array, "t D"]:
    """The rows of ids that every device wants alike (shared negatives); the result is replicated."""

    def local(shard: jax.Array, ids: jax.Array) -> jax.Array:
        return jax.lax.psum(_local_rows(shard, ids), ALL_AXES)

    return jax.shard_map(local, in_specs=(spec("row"), P()), out_specs=P())(table, ids)


def _local_rows(shard: jax.Array, ids: jax.Array) -> jax.Array:
    return shard.at[local_index(ids, shard.shape[0])].get(mode="fill", fill_value=0)


def to_logical(table: Float[Array, "R D"], num_rows: int) -> Float[Array, "F D"]:
    """Physical to logical order, padded to `FILE_ROW_MULTIPLE`: what a checkpoint holds. Works on slots too."""
    shards = num_shards()
    per_shard = table.shape[0] // shards
    rows = table.reshape(shards, per_shard, *table.shape[1:]).swapaxes(0, 1).reshape(table.shape)[:num_rows]
    return _pad_rows(rows, file_rows(num_rows))


def from_logical(rows: Float[Array, "F D"], num_rows: int) -> Float[Array, "R D"]:
    """Inverse of `to_logical` for the mesh in use."""
    return _to_physical(rows[:num_rows], num_rows, num_shards())


def file_rows(num_rows: int) -> int:
    """Rows of the checkpoint's array."""
    return -(-num_rows // FILE_ROW_MULTIPLE) * FILE_ROW_MULTIPLE


def _to_physical(rows: jax.Array, num_rows: int, shards: int) -> jax.Array:
    per_shard = -(-num_rows // shards)
    padded = _pad_rows(rows, per_shard * shards)
    return padded.reshape(per_shard, shards, *rows.shape[1:]).swapaxes(0, 1).reshape(padded.shape)


def _pad_rows(rows: jax.Array, total: int) -> jax.Array:
    return jnp.pad(rows, [(0, total - rows.shape[0])] + [(0, 0)] * (rows.ndim - 1))


def physical_to_logical_numpy(table: np.ndarray, num_rows: int, shards: int) -> np.ndarray:
    """`to_logical` without the padding, on the host."""
    per_shard = table.shape[0] // shards
    return table.reshape(shards, per_shard, -1).swapaxes(0, 1).reshape(table.shape)[:num_rows]
