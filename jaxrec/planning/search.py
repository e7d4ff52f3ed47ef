"""The largest batch and the largest tables that a machine holds: predicted from a compiled step, then compiled.

Tables are linear in their rows and temporaries nearly linear in the batch, so a prediction or two suffice; what is
answered has been compiled.
"""

import dataclasses
import math
from collections.abc import Callable

import jax

from jaxrec.config.setup import setup_of
from jaxrec.planning.program import (
    MAX_ID,
    Case,
    OutOfMemoryError,
    Program,
    abstract_batch,
    compile_step,
    device_argument_bytes,
)
from jaxrec.planning.topology import topology_mesh

GOOD_SHARE = 0.87  # of the capacity: a search ends where this is reached
AIM = 0.93
MAX_COMPILES = 5

Compile = Callable[[Case], Program]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """The largest that fits.

    Attributes:
      limited_by: what ends it.
      compiles: that the search took.
    """

    program: Program
    limited_by: str
    compiles: int


def largest_batch(program: Program, capacity: float, *, compile_case: Compile = compile_step) -> Found:
    """The most rows a chip that fit, from a step that fits.

    Args:
      capacity: bytes of one device.
    """
    case, best, compiles = program.case, program, 0
    chip = case.topology.chip
    unit = chip.devices if chip else 1
    refused = math.inf
    while best.total_bytes < GOOD_SHARE * capacity and compiles < MAX_COMPILES:
        rows = best.case.rows_per_chip
        # What grows with the batch are the temporaries; a part of them does not, so this errs to the small side.
        slope = best.temporary_bytes / rows
        if best is not program:
            grown = best.total_bytes - program.total_bytes
            slope = max(slope / 2, grown / (rows - program.case.rows_per_chip))
        wanted = rows + (AIM * capacity - best.total_bytes) / slope
        if wanted >= refused:
            wanted = (rows + refused) / 2
        wanted = int(wanted) // unit * unit
        if wanted <= rows:
            break
        compiles += 1
        try:
            best = compile_case(case.with_rows(wanted))
        except OutOfMemoryError:
            refused = wanted
    return Found(program=best, limited_by="memory", compiles=compiles)


def smaller_batch(case: Case, *, compile_case: Compile = compile_step) -> Found | None:
    """A batch that fits where the case's does not, by halving; None where one row a device does not fit either."""
    chip = case.topology.chip
    unit = chip.devices if chip else 1
    rows, compiles = int(case.rows_per_chip), 0
    while rows > unit:
        rows = max(unit, rows // 2 // unit * unit)
        compiles += 1
        try:
            program = compile_case(case.with_rows(rows))
        except OutOfMemoryError:
            continue
        return Found(program=program, limited_by="memory", compiles=compiles)
    return None


def largest_tables(
    case: Case,
    capacity: float,
    temporary_bytes: float,
    *,
    compile_case: Compile = compile_step,
) -> Found | None:
    """The most rows, all tables grown or shrunk alike, at the case's batch; None where no table fits beside it.

    Args:
      temporary_bytes: of one device, as far as they are known.
    """
    tables, rest = table_bytes(case)
    ids = MAX_ID / max(case.facts.num_items, case.facts.num_users)
    aim, compiles = AIM, 0
    while compiles < MAX_COMPILES:
        room = aim * capacity - rest - temporary_bytes
        if room <= 0:
            return None
        scale, limited_by = min((room / tables, "memory"), (ids, "ids of 32 bits"))
        compiles += 1
        try:
            program = compile_case(case.with_tables(scale))
        except OutOfMemoryError as error:
            # Temporaries may grow with the tables; the compiler says by how much it was too much, as a rule.
            told = 0.97 * error.capacity / error.needed
            aim *= min(0.85, told) if told > 0 else 0.85
            continue
        return Found(program=program, limited_by=limited_by, compiles=compiles)
    return None


def table_bytes(case: Case) -> tuple[int, int]:
    """Argument bytes of one device: those of the tables with their optimizer and of the text, and all others."""
    mesh = topology_mesh(case.topology, case.config.mesh_shape)
    state = setup_of(case.config, case.facts, mesh).abstract_state()
    size = lambda tree: sum(device_argument_bytes(leaf) for leaf in jax.tree.leaves(tree))  # noqa: E731
    tables = size((state.tables, state.table_slots, state.texts))
    return tables, size((state, abstract_batch(case, mesh))) - tables
