"""Looks into the compiled train step of a config on a mesh: where arrays lie, and what is gathered.

Prints one JSON line for `mesh_parity.py`. A gather is "of a table" if its result has at least as many elements
as the smallest vector table, or a dim that is a table's number of rows, on all shards or on one.

    JAXREC_CPU_DEVICES=8 python benchmarks/inspect_step.py --config=configs/debug.py --config.mesh_shape="(2, 4)"
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxrec.config import parse_train_arguments
from jaxrec.core.mesh import initialize_platform, make_mesh
from jaxrec.core.partition import sharding
from jaxrec.data.pipeline import TrainingRows, build_batch
from jaxrec.runs import open_dataset, setup_run
from jaxrec.training.setup import Setup, place_batch
from jaxrec.training.state import TrainState, dense_shardings, slot_shardings
from jaxrec.training.step import make_train_step

ALL_GATHER = re.compile(r"= \(?(?P<shapes>.*?) all-gather(?:-start)?\(")
SHAPE = re.compile(r"\w+\[(?P<dims>[\d,]*)\]")


def declared_shardings(setup: Setup, state: TrainState) -> TrainState:
    """Where each array has to lie by the logical axis table."""
    mesh = setup.mesh
    replicated, rows = NamedSharding(mesh, PartitionSpec()), sharding(mesh, "row")
    dense = dense_shardings(setup.step.abstract, mesh, setup.model.encoder.layout)
    fields: dict[str, Any] = {
        "step": replicated,
        "dense": dense,
        "dense_slots": slot_shardings(setup.step.optimizer, state.dense, dense, mesh),
        "tables": dict.fromkeys(setup.tables, rows),
        "table_slots": {name: dict.fromkeys(slots, rows) for name, slots in state.table_slots.items()},
        "memory": dict.fromkeys(state.memory, rows),
        "texts": {name: rows if array.ndim else replicated for name, array in state.texts.items()},
        "ema": {"dense": dense, "tables": dict.fromkeys(state.ema["tables"], rows)} if state.ema else {},
        "caches": {},
        "failure": replicated,
    }
    return TrainState(**fields)


def misplaced(state: TrainState, found: TrainState, declared: TrainState) -> list[str]:
    """Paths whose sharding differs from the declared one."""
    wrong = []

    def compare(path: tuple[Any, ...], leaf: jax.Array, where: Sharding, wanted: Sharding) -> None:
        if not where.is_equivalent_to(wanted, leaf.ndim):
            wrong.append(
                f"{jax.tree_util.keystr(path, simple=True, separator='.')}: {where} instead of {wanted}"
            )

    jax.tree_util.tree_map_with_path(compare, state, found, declared)
    return wrong


def all_gathers(text: str) -> list[list[int]]:
    """The shape of every all-gather's result (of the largest one, where it is a tuple)."""
    shapes = []
    for match in ALL_GATHER.finditer(text):
        dims = [[int(d) for d in shape["dims"].split(",") if d] for shape in SHAPE.finditer(match["shapes"])]
        shapes.append(max(dims, key=math.prod))
    return shapes


def of_a_table(shape: list[int], setup: Setup, mesh: Mesh) -> bool:
    """Whether a gathered array is as large as a table or has a table's rows."""
    row_counts, sizes = set(), []
    for table in setup.tables.values():
        local = table.rows_per_shard(mesh.size)
        row_counts |= {table.num_rows, local * mesh.size} | ({local} if mesh.size > 1 else set())
        if table.dim > 1:
            sizes.append(table.num_rows * table.dim)
    return math.prod(shape) >= min(sizes) or bool(row_counts & set(shape))


def main() -> None:
    """Compiles one step and prints what is in it."""
    answers, sys.stdout = sys.stdout, sys.stderr
    with tempfile.TemporaryDirectory(prefix="inspect-step-") as base:
        arguments = [*sys.argv[1:], f"--workdir={base}"]
        config = parse_train_arguments(__doc__, arguments).config
        initialize_platform()
        mesh = make_mesh(config.mesh_shape)
        dataset = open_dataset(config, Path(base))
        with jax.set_mesh(mesh):
            setup = setup_run(config, dataset, mesh)
            state = setup.init_state()
            rows = TrainingRows.make(dataset, history_length=config.data.history_length, seed=config.seed)
            batch = place_batch(build_batch(rows, 0, global_batch_size=config.global_batch_size), mesh)
            step: Any = make_train_step(setup.step, state, mesh)
            compiled = step.lower(state, batch).compile()
    declared = declared_shardings(setup, state)
    wrong = misplaced(state, jax.tree.map(lambda x: x.sharding, state), declared)
    wrong += misplaced(state, compiled.output_shardings[0], declared)
    gathers = all_gathers(compiled.as_text())
    found = {
        "num_arrays": len(jax.tree.leaves(state)),
        "misplaced": wrong,
        "tables": {name: [table.num_rows, table.dim] for name, table in setup.tables.items()},
        "all_gathers": gathers,
        "table_gathers": [shape for shape in gathers if of_a_table(shape, setup, mesh)],
    }
    print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
