"""The plan of a machine as plain values: what is printed, written as JSON and drawn."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxrec.core.chips import CHIPS
from jaxrec.core.mesh import resolve_shape
from jaxrec.planning.memory import Memory, measure_memory
from jaxrec.planning.overlap import Hidden, measure_overlap
from jaxrec.planning.program import Case, OutOfMemoryError, Program, compile_step
from jaxrec.planning.roofline import DENSE, EXCHANGE, Bound, Work, bound, measure_work
from jaxrec.planning.search import Found, largest_batch, largest_tables, smaller_batch

Tell = Callable[[str], None]


def make_plan(case: Case, *, search: bool, tell: Tell = lambda text: None) -> dict[str, Any]:
    """Compiles the case and says what it needs, what bounds it, and what is the largest that fits.

    Args:
      search: look for the largest batch and tables (a few compilations more). A case that does not fit is searched
        for one that does in any event.
      tell: is told what is going on.
    """
    tell(f"compiling {case.config.name} for {case.topology.text}: {case.config.global_batch_size:,} rows")
    plan = _head(case)
    try:
        program = compile_step(case)
    except OutOfMemoryError as error:
        return plan | _refusal(case, error, tell)
    plan |= {"fits": True} | _measured(program)
    chip = case.topology.chip
    if search and chip is not None:
        capacity = chip.device_hbm_bytes
        tell("searching the largest batch")
        batch = largest_batch(program, capacity)
        plan["largest"] = {"batch": _found(batch)}
        tell("searching the largest tables")
        tables = largest_tables(case, capacity, program.temporary_bytes + program.other_bytes)
        if tables is not None:
            plan["largest"]["tables"] = _found(tables)
    return plan


def _head(case: Case) -> dict[str, Any]:
    config, topology = case.config, case.topology
    data, model = resolve_shape(config.mesh_shape, topology.num_devices)
    return {
        "config": config.name,
        "topology": topology.text,
        "chip": topology.family,
        "num_chips": topology.num_chips,
        "num_devices": topology.num_devices,
        "mesh": {"data": data, "model": model},
        "global_batch_size": config.global_batch_size,
        "rows_per_chip": case.rows_per_chip,
        "history_length": config.data.history_length,
        "num_items": case.facts.num_items,
        "num_users": case.facts.num_users,
    }


def _measured(program: Program) -> dict[str, Any]:
    memory, work = measure_memory(program), measure_work(program)
    limit, overlap = bound(program, work), measure_overlap(program)
    return {
        "compile_seconds": program.seconds,
        "memory": memory_values(memory),
        "work": work_values(work, program.case.topology.num_devices),
        "overlap": overlap_values(overlap) if overlap is not None else None,
        "bound": bound_values(limit) if limit else None,
    }


def memory_values(memory: Memory) -> dict[str, Any]:
    """Bytes of a chip."""
    return {
        "total_bytes": memory.total,
        "capacity_bytes": memory.capacity,
        "share": memory.share if memory.capacity else None,
        "bytes_by_kind": memory.by_kind,
        "largest_temporaries": [dataclasses.asdict(buffer) for buffer in memory.largest],
        "temporaries_replayed_over_reported": memory.replayed,
    }


def work_values(work: Work, devices: int) -> dict[str, Any]:
    """Operations of all devices, bytes of one."""
    by_axis: dict[str, dict[str, float]] = defaultdict(lambda: {EXCHANGE: 0.0, DENSE: 0.0})
    collectives: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for link in work.links:
        by_axis[link.axis][link.part] += link.device_bytes
        entry = collectives[link.part, link.collective.kind, link.axis]
        entry[0] += link.collective.count
        entry[1] += link.device_bytes
    return {
        "model_flops": work.model_flops,
        "compiled_flops": work.compiled_flops,
        "formula_flops": work.formula_flops,
        "compiled_over_formula": work.compiled_flops / work.formula_flops if work.formula_flops else None,
        "hbm_bytes": sum(work.hbm_bytes.values()),
        "hbm_bytes_by_opcode": dict(sorted(work.hbm_bytes.items(), key=lambda item: -item[1])),
        "exchange_bytes": work.sent(EXCHANGE),
        "exchange_bytes_of_rows": work.exchange_rows_bytes,
        "dense_bytes": work.sent(DENSE),
        "collective_bytes_by_axis": {axis: dict(parts) for axis, parts in by_axis.items()},
        "collectives": [
            {"part": part, "kind": kind, "axis": axis, "count": int(count), "bytes": size}
            for (part, kind, axis), (count, size) in sorted(collectives.items(), key=lambda item: -item[1][1])
        ],
        "num_devices": devices,
    }


def overlap_values(overlap: Mapping[str, Hidden]) -> dict[str, Any]:
    """Bytes of one device by part: sent, and of those what the schedule hides."""
    return {part: dataclasses.asdict(overlap.get(part, Hidden())) for part in (EXCHANGE, DENSE)}


def bound_values(limit: Bound) -> dict[str, Any]:
    """The least time of a step."""
    return {
        "resource": limit.resource,
        "step_seconds": limit.seconds,
        "seconds": {"compute": limit.compute, "hbm": limit.hbm, "interconnect": limit.interconnect},
        "events_per_second": limit.events_per_second,
        "mfu": limit.mfu,
    }


def _found(found: Found) -> dict[str, Any]:
    case, program = found.program.case, found.program
    chip = case.topology.chip
    per_chip = chip.devices if chip else 1
    total = float(program.total_bytes * per_chip)
    return {
        "rows_per_chip": case.rows_per_chip,
        "global_batch_size": case.config.global_batch_size,
        "num_items": case.facts.num_items,
        "num_users": case.facts.num_users,
        "total_bytes": total,
        "share": total / chip.hbm_bytes if chip else None,
        "limited_by": found.limited_by,
        "compiles": found.compiles,
    }


def _refusal(case: Case, error: OutOfMemoryError, tell: Tell) -> dict[str, Any]:
    """What does not fit, and the largest that does."""
    tell("it does not fit; searching the largest that does")
    capacity = error.capacity
    per_chip = case.topology.chip.devices if case.topology.chip else 1
    values: dict[str, Any] = {
        "fits": False,
        "needed_bytes": error.needed * per_chip,
        "capacity_bytes": capacity * per_chip,
        "largest": {},
    }
    batch = smaller_batch(case)
    if batch is not None:
        best = largest_batch(batch.program, capacity)
        values["largest"]["batch"] = _found(best)
        values["remedy"] = (
            f"--rows-per-chip={best.program.case.rows_per_chip:g} fits; so do more chips, or accumulation_steps."
        )
        values |= _measured(best.program)
        return values
    tables = largest_tables(case, capacity, temporary_bytes=0.05 * capacity)
    if tables is not None:
        found = tables.program.case.facts
        values["largest"]["tables"] = _found(tables)
        values["remedy"] = (
            f"the tables are too large for {case.topology.num_chips} chips: {found.num_items:,} items and "
            f"{found.num_users:,} users fit, as do about {_chips_needed(case, error)} chips."
        )
        values |= _measured(tables.program)
        return values
    values["remedy"] = "not even one row of the batch a device fits beside the dense part; take more chips."
    return values


def _chips_needed(case: Case, error: OutOfMemoryError) -> int:
    return max(
        case.topology.num_chips + 1, round(case.topology.num_chips * error.needed / error.capacity / 0.9)
    )


def sources(plans: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The peaks that the plans were held against, with where they are published."""
    return {
        name: dataclasses.asdict(CHIPS[name])
        for name in dict.fromkeys(plan["chip"] for plan in plans)
        if name in CHIPS
    }
