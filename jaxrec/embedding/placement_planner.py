"""Chooses how each table lies, from its rows, dim, traffic and memory, by an explicit model of cost.

R rows of D entries of b bytes, with their optimizer's slots, on N devices, which ask for n ids a step each. Of these u
are distinct, counted as if ids were uniform, and `cells(n)` places carry them in a padded exchange
(`exchange.round_capacity`); moved(n) is `cells(n)` or, where the transport is ragged, u. Of the parts that C cuts make
of each row, the fullest device holds and serves f(C) = ceil(R C / N) N / (R C) times its fair share.

| placement | bytes a device holds | bytes that the busiest device sends in a step |
|---|---|---|
| Rows | ceil(R / N) (D b + slots) | (N - 1) / N (8 cells(n) + f(1) moved(n) D (b + 4)) |
| Columns(C) | ceil(R C / N) (D b + slots) / C | (N - 1) / N (8 cells(n C) + f(C) moved(n C) D / C (b + 4)) |
| Replicated | R (D b + slots), and 4 R (D + 1) in the step | (N - 1) / N 8 R (D + 1) |

An id has four bytes and goes out twice, for its row and for the row's gradient, which is float32; it costs nothing
where a wider table of the same ids lies the same way and shares its route. A replicated table's gradient is
all-reduced whole, with a count a row.

The rules: a table that is read whole or lives on the host lies by Rows. Others take what sends least, and Rows where
that saves less than a tenth. Replicated needs a table of at most 1 % of a device's memory. Columns needs rows so few
that whole ones load a device with a tenth more than its share, an optimizer that is elementwise, parts of at least 32
entries, and at most N of them. What the config places is not asked about. Latencies are not modelled.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jaxrec.embedding.exchange import Transport, round_capacity
from jaxrec.embedding.placement import MAX_ROWS, Columns, Placement, Replicated, Rows
from jaxrec.embedding.row_optimizer import RowOptimizer
from jaxrec.embedding.table import TableSpec

WORTH_IT = 0.9  # of what Rows sends: another placement must stay below it
REPLICATED_SHARE = 0.01  # of a device's memory
UNBALANCED = 1.1  # f(1) from which rows may be cut
MIN_PART = 32  # entries
MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What the tables lie on.

    Attributes:
      devices: of the mesh.
      hbm_bytes: of one device.
      transport: of the rows; see `exchange`.
    """

    devices: int
    hbm_bytes: float
    transport: Transport


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """One table's placement.

    Attributes:
      held_bytes: a device holds, slots included.
      sent_bytes: the busiest device sends in a step.
    """

    table: TableSpec
    held_bytes: int
    sent_bytes: float
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacementPlan:
    """The choices by table, in the order of the tables; prints as a table, in `rich` and as text."""

    choices: Mapping[str, Choice]
    machine: Machine

    @property
    def tables(self) -> dict[str, TableSpec]:
        """The tables with their placements."""
        return {name: choice.table for name, choice in self.choices.items()}

    @property
    def held_share(self) -> float:
        """Of a device's memory, by all tables."""
        return sum(choice.held_bytes for choice in self.choices.values()) / self.machine.hbm_bytes

    def __rich__(self) -> Table:
        machine = self.machine
        gib = f"{machine.hbm_bytes / 2**30:,.1f} GiB"
        title = f"Tables on {machine.devices} devices of {gib}, {self.held_share:.1%} full"
        table = Table(title=title, title_justify="left")
        for head in ("table", "rows x dim", "placement", "MiB a device", "KiB sent a step", "because"):
            numeric = head.split()[0] in ("MiB", "KiB", "rows")
            table.add_column(head, justify="right" if numeric else "left", no_wrap=head != "because")
        for name, choice in self.choices.items():
            table.add_row(
                name,
                f"{choice.table.num_rows:,} x {choice.table.dim}",
                str(choice.table.placement),
                f"{choice.held_bytes / MIB:,.2f}",
                f"{choice.sent_bytes / 2**10:,.1f}",
                choice.reason,
            )
        return table

    def __str__(self) -> str:
        console = Console(width=140, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()


def plan_placements(
    tables: Mapping[str, TableSpec],
    ids_a_device: Mapping[str, int],
    optimizer: RowOptimizer,
    machine: Machine,
    *,
    given: Mapping[str, Placement] = MappingProxyType({}),
    kept: Mapping[str, str] = MappingProxyType({}),
) -> PlacementPlan:
    """Chooses; see the module.

    Args:
      tables: their own placements are not looked at.
      ids_a_device: that a step asks for, by what they are ids of (`TableSpec.keyed_by`).
      given: placements that are settled, by table.
      kept: tables that must lie by `Rows`, with the reason.

    Raises:
      ValueError: a given placement does not suit its table.
    """
    choices: dict[str, Choice] = {}
    routes: set[tuple[str, Placement]] = set()
    # The widest table of the same ids pays for the ids' way.
    for name in sorted(tables, key=lambda name: -tables[name].dim):
        table = dataclasses.replace(tables[name], placement=Rows())
        keyed_by = table.keyed_by
        if name in given:
            candidates = [dataclasses.replace(table, placement=given[name])]
        else:
            candidates = [table] if name in kept else list(_candidates(table, optimizer, machine))
        costs = {
            one.placement: _sent_bytes(
                one, ids_a_device.get(keyed_by, 0), machine, shares=(keyed_by, one.placement) in routes
            )
            for one in candidates
        }
        best = min(costs, key=lambda placement: costs[placement])
        if costs[best] >= WORTH_IT * costs.get(Rows(), math.inf):
            best = Rows()
        table = dataclasses.replace(table, placement=best)
        routes.add((keyed_by, best))
        choices[name] = Choice(
            table=table,
            held_bytes=_held_bytes(table, optimizer, machine.devices),
            sent_bytes=costs[best],
            reason="the config says so" if name in given else kept.get(name) or _reason(costs, best, machine),
        )
    return PlacementPlan(choices={name: choices[name] for name in tables}, machine=machine)


def _candidates(table: TableSpec, optimizer: RowOptimizer, machine: Machine) -> Iterator[TableSpec]:
    """The table, which lies by rows, and as it may lie otherwise."""
    yield table
    if machine.devices == 1:
        return
    whole = dataclasses.replace(table, placement=Replicated())
    gradient_bytes = 4 * table.num_rows * (table.dim + 1)
    if (
        _held_bytes(whole, optimizer, machine.devices) + gradient_bytes
        <= REPLICATED_SHARE * machine.hbm_bytes
    ):
        yield whole
    fullest = table.rows_per_shard(machine.devices) * machine.devices / table.num_rows
    if optimizer.elementwise and fullest > UNBALANCED:
        limit = min(table.dim // MIN_PART, machine.devices, MAX_ROWS // table.num_rows)
        parts = [parts for parts in range(2, limit + 1) if table.dim % parts == 0]
        yield from (dataclasses.replace(table, placement=Columns(parts=n)) for n in parts)


def _held_bytes(table: TableSpec, optimizer: RowOptimizer, devices: int) -> int:
    array = jax.ShapeDtypeStruct(table.physical_shape(devices), jnp.dtype(table.dtype))
    leaves = jax.tree.leaves((array, jax.eval_shape(optimizer.init, array)))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves) // table.placement.shards(
        devices
    )


def _sent_bytes(table: TableSpec, num_ids: int, machine: Machine, *, shares: bool) -> float:
    devices = machine.devices
    away = (devices - 1) / devices
    if isinstance(table.placement, Replicated):
        return away * 8 * table.num_rows * (table.dim + 1)
    parts = table.placement.num_parts
    cells = devices * round_capacity(num_ids * parts, devices)
    moved = float(cells)
    if machine.transport == "ragged":
        moved = parts * table.num_rows * -math.expm1(-num_ids / table.num_rows)
    imbalance = table.rows_per_shard(devices) * devices / (table.num_rows * parts)
    row_bytes = table.dim // parts * (jnp.dtype(table.dtype).itemsize + 4)
    return away * ((0 if shares else 8 * cells) + imbalance * moved * row_bytes)


def _reason(costs: Mapping[Placement, float], best: Placement, machine: Machine) -> str:
    if machine.devices == 1:
        return "there is one device"
    others = sorted((cost, str(placement)) for placement, cost in costs.items() if placement != best)
    if not others:
        return "it is too large to replicate"
    cost, name = others[0] if isinstance(best, Rows) else (costs[Rows()], str(Rows()))
    return f"{name} would send {cost / 2**10:,.1f} KiB"
