"""What a step looks up: the tasks' integer halves, the ids of their rows, and the tables that are read whole."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxrec.core.batch import Batch
from jaxrec.embedding.engine import join_shared, look_up, split_shared
from jaxrec.embedding.placement import Placement
from jaxrec.embedding.table import TableSpec
from jaxrec.models.two_tower import ITEM, ITEM_OUTPUT, USER
from jaxrec.tasks.base import Plan, Task
from jaxrec.training.item_text import looked_up_arrays
from jaxrec.training.state import TrainState
from jaxrec.training.step_config import StepConfig

Where = tuple[str, str]  # (task, look-up)
Rows = dict[str, dict[Where, jax.Array]]  # table -> where they are wanted -> rows
EVENTS: Where = ("", "events")  # the look-up of the batch's own events, shared by all tasks


def whole_tables(tables: Mapping[str, TableSpec], tasks: Mapping[str, Task]) -> list[str]:
    """The tables that a full softmax reads whole; the cost of a step sees the rows of no others."""
    if not any(task.needs_catalogue for task in tasks.values()):
        return []
    of_events = ITEM if ITEM_OUTPUT in tables else None  # no item is scored by these rows
    return [name for name, table in tables.items() if table.keyed_by == ITEM and name != of_events]


def catalogue_of(config: StepConfig, state: TrainState) -> dict[str, jax.Array]:
    """The tables that a full softmax reads whole."""
    return {name: state.tables[name] for name in whole_tables(config.tables, config.tasks)}


def make_plans(config: StepConfig, batch: Batch, key: jax.Array) -> dict[str, Plan]:
    """Every task's integer half."""
    keys = {name: jax.random.fold_in(key, 2 * i + 1) for i, name in enumerate(config.tasks)}
    return {name: task.plan(batch, config.facts, keys[name]) for name, task in config.tasks.items()}


def sharing_tables(tables: Mapping[str, TableSpec]) -> dict[tuple[str, Placement], list[str]]:
    """Tables that share a route, by what their ids are ids of and by their placement."""
    together: dict[tuple[str, Placement], list[str]] = {}
    for name, table in tables.items():
        together.setdefault((table.keyed_by, table.placement), []).append(name)
    return together


def lookup_sizes(config: StepConfig, batch: Batch) -> dict[str, int]:
    """Ids that the look-ups of a global batch ask for, by what they are ids of; the batch's shapes suffice."""

    def ids(batch: Batch) -> Any:
        return lookup_ids(config.tables, batch, make_plans(config, batch, jax.random.key(0)))[0]

    found = jax.eval_shape(ids, batch)
    return {keyed_by: sum(wanted.size for wanted in parts.values()) for keyed_by, parts in found.items()}


def lookup_ids(
    tables: Mapping[str, TableSpec], batch: Batch, plans: dict[str, Plan]
) -> tuple[dict[str, dict[Where, jax.Array]], dict[Where, int]]:
    """Ids of all look-ups by what they are ids of, and the number of ids of those that devices share.

    The order is fixed by the tasks', hence the same on every mesh.
    """
    items = {EVENTS: jnp.asarray(batch.item_ids)}
    shared: dict[Where, int] = {}
    for name, plan in plans.items():
        items |= {(name, inner): wanted for inner, wanted in plan.lookups.items()}
        items |= {(name, inner): split_shared(wanted) for inner, wanted in plan.shared_lookups.items()}
        shared |= {(name, inner): wanted.size for inner, wanted in plan.shared_lookups.items()}
    ids = {ITEM: items}
    if any(table.keyed_by == USER for table in tables.values()):
        ids[USER] = {EVENTS: jnp.asarray(batch.user_ids)}
    return ids, shared


def look_up_rows(
    config: StepConfig, state: TrainState, ids: Mapping[str, dict[Where, jax.Array]]
) -> tuple[Rows, Rows, dict[str, Any], jax.Array]:
    """Looks `ids` up in every table.

    Returns:
      The rows; what the cache of texts has of the items; the routes by table; the exchange's rounds beyond the first.
    """
    rows: Rows = {}
    texts: Rows = {}
    routes: dict[str, Any] = {}
    extra_rounds = jnp.int32(0)
    for (keyed_by, placement), together in sharing_tables(config.tables).items():
        arrays = {name: state.tables[name] for name in together}
        beside = looked_up_arrays(state.texts) if ITEM in together else {}
        found, route, rounds = look_up(
            arrays | beside, ids[keyed_by], placement=placement, exchange=config.exchange
        )
        rows |= {name: found[name] for name in together}
        texts |= {name: found[name] for name in beside}
        routes |= dict.fromkeys(together, route)
        extra_rounds += rounds
    return rows, texts, routes, extra_rounds


def rows_of(task: str, found: dict[Where, jax.Array], shared: dict[Where, int]) -> dict[str, jax.Array]:
    """The rows that `task` asked for; those of shared look-ups on every device."""
    return {
        inner: join_shared(value, shared[owner, inner]) if (owner, inner) in shared else value
        for (owner, inner), value in found.items()
        if owner == task
    }


def memory_of_events(config: StepConfig, state: TrainState, batch: Batch) -> dict[str, jax.Array]:
    """The memory's rows of the batch's events, by array; {} without a memory."""
    if not state.memory:
        return {}
    found, _, _ = look_up(state.memory, {EVENTS: jnp.asarray(batch.item_ids)}, exchange=config.exchange)
    return {name: rows[EVENTS] for name, rows in found.items()}
