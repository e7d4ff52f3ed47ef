"""Sharded tables as a train step sees them: look rows up, hand gradients back, update in place.

    rows, route, rounds = look_up({"item": table}, {"history": item_ids})
    ... gradients with respect to `rows` ...
    gradients = collect(route, {"history": row_gradients})
    table, slots = update(optimizer, table, slots, gradients, rate=1e-3)

Cost and compiled memory depend on the ids, never on the rows of a table. Tables that are asked for the same ids
share one route and one exchange. Nothing here is differentiated: the caller differentiates with respect to the rows.
Everything runs under `jax.set_mesh`; arrays are global.

A table lies by rows unless `placement` says otherwise: under `Columns` every id becomes the ids of the parts of its
row, and nothing else changes; a `Replicated` table is not exchanged at all.

N = devices, R = physical rows, D = embed dim, W = width of a physical row, T = ids.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Real

from jaxrec.core.hashing import hashed_rows
from jaxrec.core.mesh import ALL_AXES, platform
from jaxrec.core.partition import spec
from jaxrec.core.placement import logical_ids, num_shards
from jaxrec.embedding.exchange import (
    NO_KEY,
    SCOPE,
    Lanes,
    OwnedGradients,
    PushedGradients,
    Route,
    Transport,
    fetch,
    fold,
    make_lanes,
    make_route,
    push,
)
from jaxrec.embedding.placement import MAX_ROWS, Placement, Replicated, Rows
from jaxrec.embedding.replicated import sum_gradients, take_rows
from jaxrec.embedding.row_optimizer import RowOptimizer, Slots
from jaxrec.embedding.storage import round_stochastically

Where = TypeVar("Where", bound=Hashable)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """How ids, rows and gradients cross the network.

    Attributes:
      transport: see `exchange`; "auto" = ragged where the platform has it.
      capacity: ids a device sends one owner in a round; 0 = what 99 % of the steps with uniform ids fit into.
      asynchronous: on a TPU, let rows travel while other kernels run. Other platforms' compilers know themselves.
    """

    transport: Literal["auto"] | Transport = "auto"
    capacity: int = 0
    asynchronous: bool = True

    def __post_init__(self) -> None:
        if self.capacity < 0:
            raise ValueError(
                f"exchange.capacity={self.capacity} must be at least 1; 0 = chosen from the batch."
            )
        if self.transport not in ("auto", "padded", "ragged"):
            raise ValueError(f"exchange.transport={self.transport!r} must be 'auto', 'padded' or 'ragged'.")

    def compiler_options(self, platform: str) -> dict[str, bool] | None:
        """For the program that the exchange is part of: XLA leaves a TPU's all-to-alls synchronous by default."""
        if platform != "tpu" or not self.asynchronous:
            return None
        return {"xla_tpu_enable_async_all_to_all": True, "xla_tpu_enable_async_ragged_all_to_all": True}

    def lanes(self, num_ids: int) -> Lanes:
        """The static shape of the exchange of `num_ids` ids a device."""
        transport = self.transport
        if transport == "auto":
            transport = "padded" if platform() == "cpu" else "ragged"
        return make_lanes(num_ids, transport, self.capacity or None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Located:
    """Ids by where their rows are: for dynamic ids, and for more rows than 32 bits number.

    Attributes:
      owners: the device; N = no row.
      rows: the row there.
    """

    owners: Int[Array, "*b"]
    rows: Int[Array, "*b"]


Ids = Int[Array, "b *l"] | Located


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseGradients:
    """Row gradients of one table, summed per row and mostly at their owners; made by `collect`.

    Attributes:
      pushed: all devices' parts, joined along the first dim; of a replicated table, what every device has.
      rows_per_shard, lanes, placement: static.
    """

    pushed: PushedGradients | OwnedGradients
    rows_per_shard: int = dataclasses.field(metadata={"static": True})
    lanes: Lanes = dataclasses.field(metadata={"static": True})
    placement: Placement = dataclasses.field(metadata={"static": True})

    def fold(
        self, apply: Callable[[Any, OwnedGradients], Any], initial: Any, pushed: Any
    ) -> tuple[Any, Int[Array, ""]]:
        """Inside `shard_map`: see `exchange.fold`."""
        if isinstance(pushed, OwnedGradients):
            return apply(initial, pushed), jnp.int32(0)
        return fold(apply, initial, pushed, self.lanes, self.rows_per_shard)


def look_up(
    tables: Mapping[str, Real[Array, "R W"]],
    ids: Mapping[Where, Ids],
    *,
    placement: Placement = Rows(),
    exchange: Exchange = Exchange(),
) -> tuple[dict[str, dict[Where, Real[Array, "b *l D"]]], Route | dict[Where, Ids], Int[Array, ""]]:
    """The rows of `ids` in every one of `tables`.

    Args:
      tables: in physical row order, all with the same rows.
      ids: the leading dims are split over the devices. 0 and ids past the last row give zeros.
      placement: of all these tables; `Located` ids need `Rows`.
      exchange: how they travel.

    Returns:
      Rows by table and by key of `ids`; the route, which `collect` takes (the ids themselves where nothing was
      exchanged); the exchange's rounds beyond the first.
    """
    batch = spec("batch")
    if not isinstance(placement, Rows) and any(isinstance(wanted, Located) for wanted in ids.values()):
        raise ValueError(
            f"Located ids name a device and its row, and the tables lie as {placement}; use Rows."
        )
    if isinstance(placement, Replicated):
        take = lambda tables, ids: {  # noqa: E731
            name: {where: take_rows(table, wanted) for where, wanted in ids.items()}
            for name, table in tables.items()
        }
        found = jax.shard_map(take, in_specs=(P(), batch), out_specs=batch, check_vma=False)
        return found(dict(tables), dict(ids)), dict(ids), jnp.int32(0)
    rows_per_shard = next(iter(tables.values())).shape[0] // num_shards()
    parts = placement.num_parts
    shapes = {name: _shape(wanted) for name, wanted in ids.items()}
    lanes = exchange.lanes(_ids_a_device(shapes, leading=0) * parts)

    def local(shards: Any, ids: Any) -> Any:
        owners, rows = _located(ids, rows_per_shard, parts)
        route = make_route(owners, (rows,), rows_per_shard)
        found, rounds = fetch(shards, route, jnp.where(owners < num_shards(), rows, NO_KEY), lanes)
        return {name: _split(rows, ids, parts) for name, rows in found.items()}, route, rounds

    return jax.shard_map(
        local, in_specs=(spec("row"), batch), out_specs=(batch, batch, P()), check_vma=False
    )(dict(tables), dict(ids))


def lookup(
    table: Real[Array, "R W"], ids: Int[Array, "b *l"], placement: Placement = Rows()
) -> Real[Array, "b *l D"]:
    """The rows of ids whose leading dim is split over the devices; see `look_up`."""
    return look_up({"": table}, {"": ids}, placement=placement)[0][""][""]


def lookup_shared(
    table: Real[Array, "R W"], ids: Int[Array, "t"], placement: Placement = Rows()
) -> Real[Array, "t D"]:
    """The rows of ids that every device wants alike; the result is replicated."""
    return join_shared(lookup(table, split_shared(ids), placement), ids.size)


def in_rows(table: Real[Array, "R W"], num_rows: int, placement: Placement) -> Float[Array, "r D"]:
    """The table as it lies under `Rows`: for what reads it whole."""
    return table if isinstance(placement, Rows) else _in_rows(table, num_rows, placement)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _in_rows(table: jax.Array, num_rows: int, placement: Placement) -> jax.Array:
    shards = num_shards()
    return lookup(table, logical_ids(-(-num_rows // shards) * shards), placement)


@jax.named_scope(SCOPE)
def split_shared(ids: Int[Array, "t"]) -> Int[Array, "s"]:
    """Ids that every device has alike, as ids that are split over the devices; filled up with padding."""
    padded = jnp.pad(ids, (0, -ids.size % num_shards()))
    return jax.lax.with_sharding_constraint(padded, spec("batch"))


@jax.named_scope(SCOPE)
def join_shared(rows: Float[Array, "s D"], size: int) -> Float[Array, "t D"]:
    """Rows of `split_shared` ids on every device; the gradient is summed over the devices and split again."""
    return jax.lax.with_sharding_constraint(rows, P())[:size]


def collect(
    route: Route | Mapping[Where, Ids],
    gradients: Mapping[Where, Float[Array, "*b D"]],
    *,
    rows_per_shard: int,
    placement: Placement = Rows(),
    exchange: Exchange = Exchange(),
    stacked: bool = False,
) -> SparseGradients:
    """Sums row gradients per row, on each device and then at the owner.

    Args:
      route: of the look-up that gave the rows, or ids with the keys and leading dims of `gradients`.
      gradients: with respect to the rows of `look_up`.
      rows_per_shard: R / N; R of a replicated table.
      placement: of the table.
      stacked: gradients and ids bear a microbatch dim before the dim that is split.
    """
    shapes = {name: gradient.shape[:-1] for name, gradient in gradients.items()}
    parts = placement.num_parts
    lanes = exchange.lanes(_ids_a_device(shapes, leading=int(stacked)) * parts)

    def local(route: Any, gradients: Any) -> PushedGradients | OwnedGradients:
        flat = [gradient.reshape(-1, gradient.shape[-1] // parts) for gradient in gradients.values()]
        summands = jnp.concatenate(flat).astype(jnp.float32)
        if isinstance(placement, Replicated):
            ids = jnp.concatenate([route[name].reshape(-1) for name in gradients])
            return sum_gradients(ids, summands, rows_per_shard)
        if not isinstance(route, Route):
            owners, rows = _located({name: route[name] for name in gradients}, rows_per_shard, parts)
            route = make_route(owners, (rows,), rows_per_shard)
        return push(summands, route, lanes, rows_per_shard)

    batch = spec("batch")
    split = P(None, ALL_AXES) if stacked else batch
    pushed = jax.shard_map(
        local,
        in_specs=(batch if isinstance(route, Route) else split, split),
        out_specs=placement.partition,
        check_vma=False,
    )(route if isinstance(route, Route) else dict(route), dict(gradients))
    return SparseGradients(pushed, rows_per_shard, lanes, placement)


def squared_norm(gradients: SparseGradients) -> Float[Array, ""]:
    """Sum of squares of the rows' complete gradients: duplicates are summed first, as in a dense gradient."""

    def local(pushed: PushedGradients | OwnedGradients) -> jax.Array:
        add = lambda total, owned: total + jnp.sum(jnp.square(owned.sums))  # noqa: E731
        total, _ = gradients.fold(add, jnp.float32(0), pushed)
        return total if isinstance(pushed, OwnedGradients) else jax.lax.psum(total, ALL_AXES)

    where = gradients.placement.partition
    return jax.shard_map(local, in_specs=(where,), out_specs=P(), check_vma=False)(gradients.pushed)


def add_to(dense: Float[Array, "R W"], gradients: SparseGradients) -> Float[Array, "R W"]:
    """Adds the look-ups' gradients to a dense gradient that lies as the table does, in place."""

    def local(shard: jax.Array, pushed: PushedGradients | OwnedGradients) -> jax.Array:
        def add(shard: jax.Array, owned: OwnedGradients) -> jax.Array:
            return shard.at[owned.rows].add(
                owned.sums, mode="drop", unique_indices=True, indices_are_sorted=True
            )

        return gradients.fold(add, shard, pushed)[0]

    where = gradients.placement.partition
    return jax.shard_map(local, in_specs=(where, where), out_specs=where, check_vma=False)(
        dense, gradients.pushed
    )


def update(
    optimizer: RowOptimizer,
    table: Float[Array, "R W"],
    slots: Slots,
    gradients: SparseGradients,
    *,
    rate: jax.Array | float,
    scale: jax.Array | float = 1.0,
    apply: Bool[Array, ""] | bool = True,
    key: jax.Array | None = None,
) -> tuple[Float[Array, "R W"], Slots, Int[Array, ""]]:
    """Updates the rows that have a gradient, in donated buffers.

    Args:
      scale: multiplies the gradients (clipping).
      apply: False leaves every bit as it was, by masking rows, never by a select over a table.
      key: of this step; rounds bfloat16 rows. None where rows are float32.

    Returns:
      Table, slots, and the exchange's rounds beyond the first.
    """
    shared = jax.tree.map(jnp.asarray, (rate, scale, apply))
    if table.dtype != jnp.float32 and key is None:
        raise ValueError(f"a table of {table.dtype} rows is rounded stochastically; pass the step's key.")

    where = gradients.placement.partition

    def local(shard: jax.Array, slots: Slots, pushed: PushedGradients | OwnedGradients, shared: Any) -> Any:
        rate, scale, apply = shared

        def step(state: Any, owned: OwnedGradients) -> Any:
            shard, slots = state
            rows = jnp.where(apply, owned.rows, shard.shape[0] + jnp.arange(owned.rows.size, dtype=jnp.int32))
            get = lambda array: array.at[rows].get(  # noqa: E731
                mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True
            )
            put = lambda array, new: array.at[rows].set(  # noqa: E731
                new.astype(array.dtype), mode="drop", unique_indices=True, indices_are_sorted=True
            )
            old = get(shard).astype(jnp.float32)
            new, new_slots = optimizer.update(old, jax.tree.map(get, slots), owned.sums * scale, rate)
            new = stored(new, rows, shard.dtype, key, gradients.placement)
            return put(shard, new), jax.tree.map(put, slots, new_slots)

        (shard, slots), rounds = gradients.fold(step, (shard, slots), pushed)
        return shard, slots, rounds

    return jax.shard_map(
        local, in_specs=(where, where, where, P()), out_specs=(where, where, P()), check_vma=False
    )(table, slots, gradients.pushed, shared)


def stored(
    rows: Float[Array, "u W"],
    places: Int[Array, "u"],
    dtype: Any,
    key: jax.Array | None,
    placement: Placement = Rows(),
) -> jax.Array:
    """Inside `shard_map`: float32 rows as the table keeps them. The rounding of a row depends on its id alone."""
    if key is None or dtype == jnp.float32:
        return rows
    width = rows.shape[1]
    ids, part = placement.hashed_part(placement.own_numbers(places.astype(jnp.uint32)), width)
    bits = hashed_rows(key, ids, (width * placement.num_parts,), part=part)
    return round_stochastically(rows, bits)


def _located(
    ids: Mapping[Where, Ids], rows_per_shard: int, parts: int
) -> tuple[Int[Array, "t"], Int[Array, "t"]]:
    """Inside `shard_map`: owners and rows of all ids, and of all parts of their rows, as one list."""
    located = [_locate(wanted, rows_per_shard, parts) for wanted in ids.values()]
    owners, rows = (
        jnp.concatenate([part.reshape(-1) for part in word]) for word in zip(*located, strict=True)
    )
    return owners, rows


def _locate(ids: Ids, rows_per_shard: int, parts: int) -> tuple[jax.Array, jax.Array]:
    if isinstance(ids, Located):
        return ids.owners, ids.rows
    shards = num_shards()
    if parts > 1:
        whole = (ids > 0) & (ids < min(rows_per_shard * shards, MAX_ROWS) // parts)
        ids = jnp.where(whole[..., None], ids[..., None] * parts + jnp.arange(parts, dtype=ids.dtype), 0)
    real = (ids > 0) & (ids // shards < rows_per_shard)
    return jnp.where(real, ids % shards, shards), ids // shards


def _split(rows: Real[Array, "t W"], ids: Mapping[Where, Ids], parts: int) -> dict[Where, jax.Array]:
    found, start = {}, 0
    for name, wanted in ids.items():
        shape = _shape(wanted)
        end = start + math.prod(shape) * parts
        found[name], start = rows[start:end].reshape(*shape, rows.shape[-1] * parts), end
    return found


def _shape(ids: Ids) -> tuple[int, ...]:
    return ids.owners.shape if isinstance(ids, Located) else ids.shape


def _ids_a_device(shapes: Mapping[Where, tuple[int, ...]], *, leading: int) -> int:
    """Ids of one device where global arrays of these shapes are split over dim `leading`."""
    shards, total = num_shards(), 0
    for name, shape in shapes.items():
        if shape[leading] % shards:
            raise ValueError(
                f"ids {name!r} of shape {shape} do not divide over {shards} devices; pad dim {leading} to "
                f"{-(-shape[leading] // shards) * shards}."
            )
        total += math.prod(shape) // shards
    return total
