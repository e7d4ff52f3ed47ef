"""A table whose rows lie over every device of the mesh.

`core.placement` says which row lies where, `embedding.placement` what else there is. Everything here runs under
`jax.set_mesh`.

N = shards, R = physical rows (N * rows_per_shard), D = embed dim, W = width of a physical row (D, but for `Columns`),
F = rows of a checkpoint's array.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, UInt32

from jaxrec.core.hashing import hashed_normal
from jaxrec.core.partition import row_major
from jaxrec.core.placement import num_shards
from jaxrec.embedding.placement import MAX_ROWS, Placement, Rows

StorageDtype = Literal["float32", "bfloat16"]

# Checkpoints hold this many logical rows times a whole number, so that their files fit every N that divides it.
FILE_ROW_MULTIPLE = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableSpec:
    """What a table is, and how its rows lie.

    Attributes:
      num_rows: ids are 0 .. num_rows - 1; id 0 is padding and its row stays zero.
      keyed_by: what the ids are ids of; tables that share it share look-ups.
      init_scale: standard deviation of the initial rows.
      dtype: of the rows in memory; bfloat16 is updated in float32 and rounded stochastically.
      placement: what a device holds of it.
    """

    num_rows: int
    dim: int
    keyed_by: str = "item"
    init_scale: float = 0.02
    dtype: StorageDtype = "float32"
    placement: Placement = Rows()

    def __post_init__(self) -> None:
        parts = self.placement.num_parts
        if self.dim % parts:
            raise ValueError(
                f"{self.placement} does not divide dim={self.dim} of the table; take one of "
                f"{', '.join(str(n) for n in range(2, self.dim + 1) if self.dim % n == 0) or 'the other placements'}."
            )
        if parts > 1 and self.num_rows * parts > MAX_ROWS:
            raise ValueError(
                f"{self.placement} makes {self.num_rows * parts} parts of {self.num_rows} rows, and their numbers have "
                f"31 bits; take at most {MAX_ROWS // self.num_rows} parts, or Rows."
            )

    def rows_per_shard(self, devices: int) -> int:
        """Physical rows that each device holds; the last ones are padding where `devices` does not divide."""
        return -(-self.num_rows * self.placement.num_parts // self.placement.shards(devices))

    def physical_shape(self, devices: int) -> tuple[int, int]:
        """(R, W)."""
        rows = self.rows_per_shard(devices) * self.placement.shards(devices)
        return rows, self.dim // self.placement.num_parts

    def sharding(self, mesh: Mesh) -> NamedSharding:
        """Of the rows and of their optimizer's slots."""
        return NamedSharding(mesh, self.placement.partition)

    def row_format(self, mesh: Mesh) -> Format | NamedSharding:
        """Sharding and memory order of the rows; see `core.partition.row_major`."""
        return row_major(self.sharding(mesh), self.physical_shape(mesh.size))


def init_table(table: TableSpec, key: jax.Array, mesh: Mesh) -> Float[Array, "R W"]:
    """Normal rows of `init_scale`, a function of (key, id) alone, hence the same on every mesh.

    The bits are hashed, not drawn: `jax.random.normal` peaks at four times the table, this at the table itself.
    """
    per_shard = table.rows_per_shard(mesh.size)

    def local(key: jax.Array) -> jax.Array:
        return fresh_rows(table, key, table.placement.own_numbers(jnp.arange(per_shard, dtype=jnp.uint32)))

    create = jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=table.placement.partition)
    return jax.jit(create, out_shardings=table.row_format(mesh))(key)


def fresh_rows(table: TableSpec, key: jax.Array, numbers: UInt32[Array, "r"]) -> Float[Array, "r W"]:
    """The initial rows of ids, or of id * parts + part under `Columns`; zeros for padding and past the last."""
    ids, part = table.placement.hashed_part(numbers, table.dim // table.placement.num_parts)
    real = (ids > 0) & (ids < table.num_rows)
    normal = hashed_normal(key, ids, (table.dim,), part=part)
    return jnp.where(real[:, None], table.init_scale * normal, 0.0).astype(table.dtype)


def to_logical(
    table: Float[Array, "R *W"], num_rows: int, placement: Placement = Rows()
) -> Float[Array, "F *D"]:
    """Physical to logical order, padded to `FILE_ROW_MULTIPLE`: what a checkpoint holds.

    Works on slots too. One float a row is kept once a row: the parts of a row must have it alike, which those of an
    elementwise optimizer have.
    """
    shards, parts = placement.shards(num_shards()), placement.num_parts
    per_shard = table.shape[0] // shards
    rows = table.reshape(shards, per_shard, *table.shape[1:]).swapaxes(0, 1).reshape(table.shape)
    rows = rows[: num_rows * parts]
    if parts > 1:
        rows = rows.reshape(num_rows, -1) if rows.ndim > 1 else rows[::parts]
    return _pad_rows(rows, file_rows(num_rows))


def from_logical(
    rows: Float[Array, "F *D"], num_rows: int, placement: Placement = Rows()
) -> Float[Array, "R *W"]:
    """Inverse of `to_logical` for the mesh in use."""
    return _to_physical(rows, num_rows, placement)


def grow(
    rows: Float[Array, "F D"], num_rows: int, table: TableSpec, key: jax.Array, mesh: Mesh
) -> Float[Array, "R W"]:
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
        ids = jnp.arange(table.num_rows, dtype=jnp.int32)
        stored, ids = (_to_physical(x, table.num_rows, table.placement) for x in (padded, ids))
        # Padding rows count as id 0, whose row is zero in both.
        return jnp.where(ids[:, None] < num_rows, stored, fresh)

    return jax.jit(overlay, out_shardings=table.row_format(mesh))(rows, init_table(table, key, mesh))


def file_rows(num_rows: int) -> int:
    """Rows of the checkpoint's array."""
    return -(-num_rows // FILE_ROW_MULTIPLE) * FILE_ROW_MULTIPLE


def _to_physical(rows: jax.Array, num_rows: int, placement: Placement) -> jax.Array:
    shards, parts = placement.shards(num_shards()), placement.num_parts
    rows = rows[:num_rows]
    if parts > 1:
        rows = rows.reshape(num_rows * parts, -1) if rows.ndim > 1 else jnp.repeat(rows, parts)
    per_shard = -(-rows.shape[0] // shards)
    padded = _pad_rows(rows, per_shard * shards)
    return padded.reshape(per_shard, shards, *rows.shape[1:]).swapaxes(0, 1).reshape(padded.shape)


def _pad_rows(rows: jax.Array, total: int) -> jax.Array:
    return jnp.pad(rows, [(0, total - rows.shape[0])] + [(0, 0)] * (rows.ndim - 1))
