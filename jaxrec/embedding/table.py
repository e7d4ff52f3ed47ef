"""A table whose rows lie over every device of the mesh.

`core.placement` says which row lies where. Everything here runs under `jax.set_mesh`.

N = shards, R = physical rows (N * rows_per_shard), D = embed dim, F = rows of a checkpoint's array.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxrec.core.hashing import hashed_normal
from jaxrec.core.mesh import ALL_AXES
from jaxrec.core.partition import sharding, spec
from jaxrec.core.placement import num_shards

StorageDtype = Literal["float32", "bfloat16"]

# Checkpoints hold this many logical rows times a whole number, so that their files fit every N that divides it.
FILE_ROW_MULTIPLE = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableSpec:
    """What a table is, apart from where it lies.

    Attributes:
      num_rows: ids are 0 .. num_rows - 1; id 0 is padding and its row stays zero.
      keyed_by: what the ids are ids of; tables that share it share look-ups.
      init_scale: standard deviation of the initial rows.
      dtype: of the rows in memory; bfloat16 is updated in float32 and rounded stochastically.
    """

    num_rows: int
    dim: int
    keyed_by: str = "item"
    init_scale: float = 0.02
    dtype: StorageDtype = "float32"

    def rows_per_shard(self, num_shards: int) -> int:
        """Rows that each shard holds; the last ones are padding where `num_rows` does not divide."""
        return -(-self.num_rows // num_shards)


def init_table(table: TableSpec, key: jax.Array, mesh: Mesh) -> Float[Array, "R D"]:
    """Normal rows of `init_scale`, a function of (key, id) alone, hence the same on every mesh.

    The bits are hashed, not drawn: `jax.random.normal` peaks at four times the table, this at the table itself.
    """
    per_shard = table.rows_per_shard(mesh.size)

    def local(key: jax.Array) -> jax.Array:
        shard = jax.lax.axis_index(ALL_AXES).astype(jnp.uint32)
        ids = jnp.arange(per_shard, dtype=jnp.uint32) * mesh.size + shard
        real = (ids > 0) & (ids < table.num_rows)
        rows = jnp.where(real[:, None], table.init_scale * hashed_normal(key, ids, (table.dim,)), 0.0)
        return rows.astype(table.dtype)

    create = jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=spec("row"))
    return jax.jit(create, out_shardings=sharding(mesh, "row", "embed"))(key)


def to_logical(table: Float[Array, "R D"], num_rows: int) -> Float[Array, "F D"]:
    """Physical to logical order, padded to `FILE_ROW_MULTIPLE`: what a checkpoint holds. Works on slots too."""
    shards = num_shards()
    per_shard = table.shape[0] // shards
    rows = table.reshape(shards, per_shard, *table.shape[1:]).swapaxes(0, 1).reshape(table.shape)[:num_rows]
    return _pad_rows(rows, file_rows(num_rows))


def from_logical(rows: Float[Array, "F D"], num_rows: int) -> Float[Array, "R D"]:
    """Inverse of `to_logical` for the mesh in use."""
    return _to_physical(rows[:num_rows], num_rows, num_shards())


def grow(
    rows: Float[Array, "F D"], num_rows: int, table: TableSpec, key: jax.Array, mesh: Mesh
) -> Float[Array, "R D"]:
    """A table of more rows than the checkpoint's: the first `num_rows` as stored, the others as a fresh table's.

    Raises:
      ValueError: the table would lose rows.
    """
    if table.num_rows < num_rows:
        raise ValueError(
            f"a table of {num_rows} rows does not shrink to {table.num_rows}; keep the ids that it has."
        )

    def overlay(rows: jax.Array, fresh: jax.Array) -> jax.Array:
        padded = _pad_rows(rows[:num_rows], table.num_rows)
        ids = jnp.arange(table.num_rows, dtype=jnp.int32)[:, None]
        stored = _to_physical(padded, table.num_rows, mesh.size)
        return jnp.where(_to_physical(ids, table.num_rows, mesh.size) < num_rows, stored, fresh)

    # Padding rows count as id 0, whose row is zero in both.
    return jax.jit(overlay, out_shardings=sharding(mesh, "row", "embed"))(rows, init_table(table, key, mesh))


def file_rows(num_rows: int) -> int:
    """Rows of the checkpoint's array."""
    return -(-num_rows // FILE_ROW_MULTIPLE) * FILE_ROW_MULTIPLE


def _to_physical(rows: jax.Array, num_rows: int, shards: int) -> jax.Array:
    per_shard = -(-num_rows // shards)
    padded = _pad_rows(rows, per_shard * shards)
    return padded.reshape(per_shard, shards, *rows.shape[1:]).swapaxes(0, 1).reshape(padded.shape)


def _pad_rows(rows: jax.Array, total: int) -> jax.Array:
    return jnp.pad(rows, [(0, total - rows.shape[0])] + [(0, 0)] * (rows.ndim - 1))
