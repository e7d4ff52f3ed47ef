"""Do the tasks of a run pull its model the same way? Cosines between their gradients, by part of the model.

A cosine is that of two tasks' gradients on the same training batch, which is what gradient surgery looks at. Its mean
over batches has an interval from resampling the batches. Noise of the batch draws it towards 0.

N = batches, K = tasks.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxrec.core.batch import Batch
from jaxrec.data.pipeline import BatchStream
from jaxrec.evaluation import plots
from jaxrec.evaluation.significance import bootstrap_intervals
from jaxrec.models.two_tower import LOG_VARIANCES
from jaxrec.training.balance import inner_products
from jaxrec.training.cached_tables import CachedTables
from jaxrec.training.gradients import task_gradients
from jaxrec.training.setup import Setup, place_batch
from jaxrec.training.state import TrainState
from jaxrec.training.step_config import StepConfig

EVERYTHING, EMBEDDING = "all", "embedding"
# What an event's vector is made of before the first block.
_EMBEDDING_SIDE = {
    "event_in",
    "user_in",
    "mask_vector",
    "time_gap_table",
    "position_table",
    "embedding_norm",
}
CONFIDENCE = 0.95


def measure(setup: Setup, state: TrainState, batches: BatchStream) -> dict[str, Float[np.ndarray, "N K K"]]:
    """Inner products of the tasks' gradients on each batch, by part of the model; call it under the run's mesh.

    Raises:
      ValueError: the run has one task.
    """
    if len(setup.step.tasks) == 1:
        raise ValueError(
            f"tasks={', '.join(setup.step.tasks)}: one task has no other to interfere with; open a run that was "
            "trained on two or more."
        )
    replicated = NamedSharding(setup.mesh, PartitionSpec())
    products = jax.jit(functools.partial(_products, setup.step), out_shardings=replicated)
    cached = CachedTables(setup.cache_rows, state, setup.mesh)
    state, found = cached.enter(state), []
    for number, batch in enumerate(batches):
        state, placed = cached.bring(state, batch, place_batch(batch, setup.mesh))
        found.append(jax.device_get(products(state, placed, state.step + number)))
    return {group: np.stack([of_batch[group] for of_batch in found]) for group in found[0]}


def _products(
    config: StepConfig, state: TrainState, batch: Batch, step: jax.Array
) -> dict[str, Float[jax.Array, "K K"]]:
    by_task = task_gradients(config, state, batch, config.key(step))
    total: dict[str, Any] = {}
    for (path, _), *leaves in zip(
        jax.tree_util.tree_leaves_with_path(state.dense), *map(jax.tree.leaves, by_task.values()), strict=True
    ):
        products = inner_products(jnp.stack(leaves))
        for group in {EVERYTHING, part_of([part.key for part in path])} - {LOG_VARIANCES}:
            total[group] = total.get(group, 0.0) + products
    return total


def part_of(path: Sequence[Any]) -> str:
    """The part of the model that a dense parameter belongs to: the embedding side, a block, or a head by its name."""
    name, *rest = path[1:] if path[0] == "encoder" else path
    if path[0] == "encoder" and name == "blocks":
        return f"block {rest[0]}"
    return EMBEDDING if name in _EMBEDDING_SIDE else str(name)


def summary(products: Mapping[str, Float[np.ndarray, "N K K"]], tasks: Sequence[str]) -> dict[str, Any]:
    """What the products say, as JSON values: per part, norms of the gradients and cosines of each pair of tasks.

    Batches on which a task has no gradient in a part are left out of its pairs; a pair without batches has no cosine.
    """
    parts = {}
    for part, gram in sorted(products.items(), key=lambda one: _order(one[0])):
        norms = np.sqrt(np.maximum(np.diagonal(gram, axis1=1, axis2=2), 0.0))
        pairs = []
        for i, j in itertools.combinations(range(len(tasks)), 2):
            moved = (norms[:, i] > 0) & (norms[:, j] > 0)
            if not moved.any():
                continue
            cosines = gram[moved, i, j] / (norms[moved, i] * norms[moved, j])
            interval = bootstrap_intervals({"": cosines}, confidence=CONFIDENCE)[""]
            pairs.append(
                {
                    "tasks": [tasks[i], tasks[j]],
                    "cosine": interval.mean,
                    "interval": [interval.low, interval.high],
                    "num_batches": int(moved.sum()),
                    "conflicting_batches": int((cosines < 0).sum()),
                }
            )
        means = norms.mean(axis=0)
        parts[part] = {"norms": {name: float(means[i]) for i, name in enumerate(tasks)}, "pairs": pairs}
    return {"tasks": list(tasks), "confidence": CONFIDENCE, "parts": parts}


def _order(part: str) -> tuple[int, int, str]:
    """The whole first, then as an event's vector passes."""
    if part.startswith("block "):
        return 2, int(part.removeprefix("block ")), ""
    return {EVERYTHING: 0, EMBEDDING: 1}.get(part, 3), 0, part


def matrix(values: Mapping[str, Any], part: str) -> Float[np.ndarray, "K K"]:
    """The mean cosines of a part; NaN where there are none."""
    tasks = values["tasks"]
    found = np.full((len(tasks), len(tasks)), np.nan)
    for pair in values["parts"][part]["pairs"]:
        i, j = (tasks.index(name) for name in pair["tasks"])
        found[i, j] = found[j, i] = pair["cosine"]
    return found


def print_interference(console: Console, values: Mapping[str, Any]) -> None:
    """A matrix for each part: cosines with their intervals, and the norms on the diagonal."""
    for part, found in values["parts"].items():
        table = Table(title=escape(part), title_justify="left")
        table.add_column("cosine")
        for name in values["tasks"]:
            table.add_column(escape(name), justify="right")
        cells = {(name, name): f"norm {norm:.2g}" for name, norm in found["norms"].items()}
        for pair in found["pairs"]:
            low, high = pair["interval"]
            cells[tuple(reversed(pair["tasks"]))] = f"{pair['cosine']:+.2f} ({low:+.2f} .. {high:+.2f})"
        for row, name in enumerate(values["tasks"]):
            others = values["tasks"][: row + 1]
            table.add_row(escape(name), *(cells.get((name, other), "-") for other in others))
        console.print(table)


def heat_map(values: Mapping[str, Any]) -> str:
    """An SVG file with the matrix of every part that more than one task moves."""
    shown = [part for part, found in values["parts"].items() if found["pairs"] or part == EVERYTHING]
    panels = {part: matrix(values, part) for part in shown}
    return plots.as_file(plots.heat_maps("Cosines between the tasks' gradients", values["tasks"], panels))
