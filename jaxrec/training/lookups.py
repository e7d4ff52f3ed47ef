"""Which rows a batch wants, and who shares a route to them."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxrec.core.batch import Batch
from jaxrec.embedding.engine import join_shared, split_shared
from jaxrec.embedding.placement import Placement
from jaxrec.embedding.table import TableSpec
from jaxrec.models.two_tower import ITEM, USER
from jaxrec.tasks.base import Plan

Where = tuple[str, str]  # (task, look-up)
Rows = dict[str, dict[Where, jax.Array]]  # table -> where they are wanted -> rows
EVENTS: Where = ("", "events")  # the look-up of the batch's own events, shared by all tasks


def sharing_tables(tables: Mapping[str, TableSpec]) -> dict[tuple[str, Placement], list[str]]:
    """Tables that share a route, by what their ids are ids of and by their placement."""
    together: dict[tuple[str, Placement], list[str]] = {}
    for name, table in tables.items():
        together.setdefault((table.keyed_by, table.placement), []).append(name)
    return together


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


def rows_of_task(task: str, found: dict[Where, jax.Array], shared: dict[Where, int]) -> dict[str, jax.Array]:
    """The rows that `task` asked for; those of shared look-ups on every device."""
    return {
        inner: join_shared(value, shared[owner, inner]) if (owner, inner) in shared else value
        for (owner, inner), value in found.items()
        if owner == task
    }
