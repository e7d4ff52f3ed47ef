"""The gradients of a step: look-ups, backward passes over the microbatches, and one gradient from all tasks'."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxrec.core.batch import Batch
from jaxrec.core.placement import num_shards
from jaxrec.embedding.engine import SparseGradients, collect
from jaxrec.models.two_tower import ITEM, ITEM_OUTPUT, USER
from jaxrec.tasks.base import Forward, Plan
from jaxrec.training.balance import GradientSurgery
from jaxrec.training.item_text import StepTexts, choose_encoded
from jaxrec.training.lookups import (
    EVENTS,
    Rows,
    Where,
    catalogue_of,
    look_up_rows,
    lookup_ids,
    make_plans,
    memory_of_events,
    rows_of,
)
from jaxrec.training.state import TrainState
from jaxrec.training.step_config import StepConfig

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gradients:
    """Gradients of one batch: of dense parameters, of looked-up rows, and of whole tables (full softmax).

    Frozen tables have none, and those of frozen dense parameters are zero.

    Attributes:
      extra_rounds: of the look-ups' exchange, beyond the first.
      losses: means over the global batch, by task.
      metrics: of the balance between the tasks.
    """

    dense: Any
    sparse: dict[str, SparseGradients]
    catalogue: dict[str, jax.Array]
    extra_rounds: jax.Array
    losses: Metrics
    metrics: Metrics


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Found:
    """What a microbatch gives, or all of them: gradients with respect to rows stand beside the ids of the rows.

    Attributes:
      dense: gradients by backward pass.
      ids: of the look-ups, by what they are ids of.
      routes: of the look-ups, by table; the ids themselves where there was more than one microbatch.
      rows: gradients by table and look-up.
    """

    dense: list[Any]
    catalogue: dict[str, jax.Array]
    losses: Metrics
    extra_rounds: jax.Array
    ids: dict[str, dict[Where, jax.Array]]
    routes: dict[str, Any]
    rows: Rows


def batch_gradients(config: StepConfig, state: TrainState, batch: Batch, key: jax.Array) -> Gradients:
    """Gradients of what the balance makes of the tasks' means over the global batch."""
    found = _all_microbatches(config, state, batch, key)
    dense, metrics = config.balance.join(found.dense, config.tasks, state.dense, key)
    return Gradients(
        dense, _collect(config, state, found), found.catalogue, found.extra_rounds, found.losses, metrics
    )


def task_gradients(config: StepConfig, state: TrainState, batch: Batch, key: jax.Array) -> dict[str, Any]:
    """The gradient of each task's mean loss with respect to the dense parameters, whatever the balance of the run."""
    tasks = {name: dataclasses.replace(task, weight=1.0) for name, task in config.tasks.items()}
    config = dataclasses.replace(config, tasks=tasks, balance=GradientSurgery())
    return dict(zip(tasks, _all_microbatches(config, state, batch, key).dense, strict=True))


def _all_microbatches(config: StepConfig, state: TrainState, batch: Batch, key: jax.Array) -> _Found:
    count = config.accumulation_steps
    if count == 1:
        plans = make_plans(config, batch, key)
        weights = {name: plan.weight for name, plan in plans.items()}
        return _microbatch(config, state, batch, plans, weights, key)
    # Means are over the global batch, so the weights of all microbatches come first: they are integers' work.
    parts = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(count))
    each = jax.lax.map(
        lambda part: {n: p.weight for n, p in make_plans(config, *part).items()}, (parts, keys)
    )
    weights = jax.tree.map(jnp.sum, each)

    def body(carry: Any, part: Any) -> Any:
        microbatch, key = part
        found = _microbatch(config, state, microbatch, make_plans(config, microbatch, key), weights, key)
        summed = (found.dense, found.catalogue, found.losses, found.extra_rounds)
        return jax.tree.map(jnp.add, carry, summed), (found.ids, found.rows)

    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    dense = [zeros(state.dense) for _ in config.balance.passes(config.tasks)]
    tables = config.rates.trained(catalogue_of(config, state))
    losses = {name: jnp.float32(0) for name in config.tasks}
    start = (dense, zeros(tables), losses, jnp.int32(0))
    (dense, catalogue, losses, extra_rounds), (ids, rows) = jax.lax.scan(body, start, (parts, keys))
    asked = {name: ids[table.keyed_by] for name, table in config.tables.items()}
    return _Found(dense, catalogue, losses, extra_rounds, ids, asked, rows)


def _microbatch(
    config: StepConfig,
    state: TrainState,
    batch: Batch,
    plans: dict[str, Plan],
    weights: Metrics,
    key: jax.Array,
) -> _Found:
    ids, shared = lookup_ids(config.tables, batch, plans)
    rows, texts, routes, extra_rounds = look_up_rows(config, state, ids)
    catalogue = catalogue_of(config, state)
    memory = memory_of_events(config, state, batch)
    step_texts = _step_texts(config, state, batch, ids[ITEM], texts, key)

    def loss_fn(
        asked: tuple[str, ...], dense: Any, rows: Rows, catalogue: dict[str, jax.Array]
    ) -> tuple[jax.Array, Metrics]:
        dense, rows, catalogue = config.rates.stop_gradients(dense, rows, catalogue)
        model = config.model(dense)
        if step_texts is not None:
            text_key = jax.random.fold_in(key, 2 * len(config.tasks) + 2)
            rows, catalogue = step_texts.enter(model, rows, catalogue, text_key)
        forward = Forward(
            model,
            batch,
            config.facts,
            rows[ITEM][EVENTS],
            catalogue or None,
            jax.random.fold_in(key, 0),
            rows[USER][EVENTS] if USER in rows else None,
            memory or None,
            rows[ITEM_OUTPUT][EVENTS] if ITEM_OUTPUT in rows else None,
            step_texts.tokens if step_texts is not None else None,
        )
        total, losses = jnp.float32(0), {}
        for i, (name, task) in enumerate(config.tasks.items()):
            if name not in asked:
                continue
            forward.rows = {table: rows_of(name, found, shared) for table, found in rows.items()}
            part = task.loss(forward, plans[name], jax.random.fold_in(key, 2 * i + 2))
            losses[name] = part.total / jnp.maximum(weights[name], 1.0)
            total += config.balance.objective(
                name, task, losses[name], dense, targets=plans[name].weight, all_targets=weights[name]
            )
        return total, losses

    dense_gradients: list[Any] = []
    losses: Metrics = {}
    summed = None
    for asked in config.balance.passes(config.tasks):
        (_, of_pass), (dense, *others) = jax.value_and_grad(
            functools.partial(loss_fn, asked), argnums=(0, 1, 2), has_aux=True
        )(state.dense, rows, catalogue)
        dense_gradients.append(dense)
        losses |= of_pass
        summed = others if summed is None else jax.tree.map(jnp.add, summed, others)
    assert summed is not None, "a run has a task"
    row_gradients, tables = map(config.rates.trained, summed)
    return _Found(dense_gradients, tables, losses, extra_rounds, ids, routes, row_gradients)


def _step_texts(
    config: StepConfig,
    state: TrainState,
    batch: Batch,
    ids: dict[Where, jax.Array],
    found: Rows,
    key: jax.Array,
) -> StepTexts | None:
    """What the model is told of the text of the items that are looked up; None for a model that reads none."""
    if config.text is None:
        return None
    encoded = choose_encoded(
        config.text,
        state.texts,
        jnp.asarray(batch.item_ids),
        num_items=config.facts.num_items,
        parts=config.accumulation_steps,
        key=jax.random.fold_in(key, 2 * len(config.tasks) + 1),
        exchange=config.exchange,
    )
    id_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 3), state.step)
    return StepTexts(ids, found, state.texts, encoded, id_key, config.text.id_dropout_rate)


def _collect(config: StepConfig, state: TrainState, found: _Found) -> dict[str, SparseGradients]:
    """The rows' gradients summed at their owners."""
    return {
        name: collect(
            found.routes[name],
            rows,
            rows_per_shard=state.tables[name].shape[0] // config.tables[name].placement.shards(num_shards()),
            placement=config.tables[name].placement,
            exchange=config.exchange,
            stacked=config.accumulation_steps > 1,
        )
        for name, rows in found.rows.items()
    }
