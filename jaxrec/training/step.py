"""The train step: one `jax.jit` over pytrees. It names no task.

Order: plans (integers), look-ups, gradients with respect to dense parameters, rows and (full softmax) tables, one
global norm over all of them, finite check, one guarded update.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from jaxrec.core.batch import Batch
from jaxrec.core.partition import Layout, row_major
from jaxrec.core.placement import num_shards
from jaxrec.core.precision import ActivationDtype
from jaxrec.embedding.engine import (
    Exchange,
    SparseGradients,
    add_to,
    collect,
    look_up,
    squared_norm,
    update,
)
from jaxrec.embedding.row_optimizer import RowOptimizer, apply_dense
from jaxrec.embedding.table import TableSpec
from jaxrec.models.item_text import TextTower
from jaxrec.models.two_tower import ITEM, USER
from jaxrec.nn.layers import whole_parameters
from jaxrec.tasks.base import DataFacts, Forward, Plan, Task
from jaxrec.training.item_text import StepTexts, choose_encoded, looked_up_arrays
from jaxrec.training.lookups import EVENTS, Rows, Where, lookup_ids, rows_of_task, sharing_tables
from jaxrec.training.optimizer import OptimizerConfig, schedule_factor
from jaxrec.training.state import NO_FAILURE, TrainState, merge_model
from jaxrec.training.text_cache import ENCODED_AT

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What the step is made of; all static."""

    graphdef: nnx.GraphDef
    abstract: nnx.State
    layout: Layout
    gather_dtype: ActivationDtype
    tables: Mapping[str, TableSpec]
    tasks: Mapping[str, Task]
    facts: DataFacts
    text: TextTower | None
    optimizer: optax.GradientTransformation
    optimizer_config: OptimizerConfig
    row_optimizer: RowOptimizer
    exchange: Exchange
    num_train_steps: int
    accumulation_steps: int
    seed: int


def make_train_step(
    config: StepConfig, state: TrainState, mesh: Mesh
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted step `(state, batch) -> (state, metrics)`; the state is donated and keeps its shardings."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    rows = (state.tables, state.table_slots, state.texts)
    tables, slots, texts = jax.tree.map(lambda x: row_major(x.sharding, x.shape), rows)
    shardings = dataclasses.replace(shardings, tables=tables, table_slots=slots, texts=texts)
    return jax.jit(
        functools.partial(train_step, config),
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=config.exchange.compiler_options(mesh.devices.flat[0].platform),
    )


def train_step(config: StepConfig, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """See the module. `metrics` are scalars; losses are means over the global batch, in nats."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 2), state.step)
    gradients, losses = _gradients(config, state, batch, key)
    norms = _norms(gradients)
    norm = jnp.sqrt(jnp.sum(jnp.square(jnp.stack(list(norms.values())))))

    bad_tasks = jnp.array([~jnp.isfinite(losses[name]) for name in config.tasks])
    finite = jnp.isfinite(norm) & ~jnp.any(bad_tasks)
    apply = finite & (state.failure[0] == NO_FAILURE)
    mask = jnp.sum(jnp.where(bad_tasks, 2 ** jnp.arange(len(config.tasks)), 0)).astype(jnp.int32)
    failure = jnp.where(
        apply | (state.failure[0] != NO_FAILURE), state.failure, jnp.stack([state.step, mask])
    )

    factor = schedule_factor(config.optimizer_config, config.num_train_steps, state.step)
    started = state.step
    state = dataclasses.replace(_update(config, state, gradients, norm, factor, apply), failure=failure)
    metrics = {f"loss/{name}": value for name, value in losses.items()}
    metrics["loss"] = jnp.sum(jnp.stack([task.weight * losses[name] for name, task in config.tasks.items()]))
    metrics |= {f"gradient_norm/{name}": value for name, value in norms.items()} | {"gradient_norm": norm}
    metrics["learning_rate"] = config.optimizer_config.learning_rate * factor
    metrics["events"] = jnp.sum(batch.history_mask.astype(jnp.int32))
    if state.texts:
        metrics["text_age_steps"] = started - state.texts[ENCODED_AT]
    metrics["exchange_extra_rounds"] = gradients.extra_rounds
    metrics["failed_step"] = failure[0]
    metrics["failed_tasks"] = failure[1]
    return state, metrics


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Gradients:
    """Gradients of one batch: of dense parameters, of looked-up rows, and of whole tables (full softmax).

    Attributes:
      extra_rounds: of the look-ups' exchange, beyond the first.
    """

    dense: Any
    sparse: dict[str, SparseGradients]
    catalogue: dict[str, jax.Array]
    extra_rounds: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Microbatch:
    """What one microbatch gives: gradients with respect to rows stand beside the ids of the rows.

    Attributes:
      ids: of the look-ups, by what they are ids of.
      routes: of the look-ups, by table.
      rows: gradients by table and look-up.
    """

    dense: Any
    catalogue: dict[str, jax.Array]
    losses: Metrics
    extra_rounds: jax.Array
    ids: dict[str, dict[Where, jax.Array]]
    routes: dict[str, Any]
    rows: Rows


def _gradients(
    config: StepConfig, state: TrainState, batch: Batch, key: jax.Array
) -> tuple[_Gradients, Metrics]:
    """Gradients of the weighted sum of the tasks' means over the global batch."""
    count = config.accumulation_steps
    if count == 1:
        plans = _plans(config, batch, key)
        weights = {name: plan.weight for name, plan in plans.items()}
        found = _microbatch(config, state, batch, plans, weights, key)
        sparse = _collect(config, state, found.routes, found.rows, stacked=False)
        return _Gradients(found.dense, sparse, found.catalogue, found.extra_rounds), found.losses
    # Means are over the global batch, so the weights of all microbatches come first: they are integers' work.
    parts = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(count))
    each = jax.lax.map(lambda part: {n: p.weight for n, p in _plans(config, *part).items()}, (parts, keys))
    weights = jax.tree.map(jnp.sum, each)

    def body(carry: Any, part: Any) -> Any:
        microbatch, key = part
        found = _microbatch(config, state, microbatch, _plans(config, microbatch, key), weights, key)
        summed = (found.dense, found.catalogue, found.losses, found.extra_rounds)
        return jax.tree.map(jnp.add, carry, summed), (found.ids, found.rows)

    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    tables = _catalogue(config, state)
    losses = {name: jnp.float32(0) for name in config.tasks}
    start = (zeros(state.dense), zeros(tables), losses, jnp.int32(0))
    (dense, catalogue, losses, extra_rounds), (ids, rows) = jax.lax.scan(body, start, (parts, keys))
    asked = {name: ids[table.keyed_by] for name, table in config.tables.items()}
    return _Gradients(
        dense, _collect(config, state, asked, rows, stacked=True), catalogue, extra_rounds
    ), losses


def _collect(
    config: StepConfig, state: TrainState, routes: Mapping[str, Any], rows: Rows, *, stacked: bool
) -> dict[str, SparseGradients]:
    """The rows' gradients summed at their owners; `routes` may be ids where there was more than one look-up."""
    return {
        name: collect(
            routes[name],
            gradients,
            rows_per_shard=state.tables[name].shape[0] // config.tables[name].placement.shards(num_shards()),
            placement=config.tables[name].placement,
            exchange=config.exchange,
            stacked=stacked,
        )
        for name, gradients in rows.items()
    }


def whole_tables(tables: Mapping[str, TableSpec], tasks: Mapping[str, Task]) -> list[str]:
    """The tables that a full softmax reads whole; the cost of a step sees the rows of no others."""
    if not any(task.needs_catalogue for task in tasks.values()):
        return []
    return [name for name, table in tables.items() if table.keyed_by == ITEM]


def _catalogue(config: StepConfig, state: TrainState) -> dict[str, jax.Array]:
    return {name: state.tables[name] for name in whole_tables(config.tables, config.tasks)}


def _memory_of_events(config: StepConfig, state: TrainState, batch: Batch) -> dict[str, jax.Array]:
    """The memory's rows of the batch's events, by array; {} without a memory."""
    if not state.memory:
        return {}
    found, _, _ = look_up(state.memory, {EVENTS: jnp.asarray(batch.item_ids)}, exchange=config.exchange)
    return {name: rows[EVENTS] for name, rows in found.items()}


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


def _plans(config: StepConfig, batch: Batch, key: jax.Array) -> dict[str, Plan]:
    keys = {name: jax.random.fold_in(key, 2 * i + 1) for i, name in enumerate(config.tasks)}
    return {name: task.plan(batch, config.facts, keys[name]) for name, task in config.tasks.items()}


def _microbatch(
    config: StepConfig,
    state: TrainState,
    batch: Batch,
    plans: dict[str, Plan],
    weights: Metrics,
    key: jax.Array,
) -> _Microbatch:
    ids, shared = lookup_ids(config.tables, batch, plans)
    rows: Rows = {}
    routes: dict[str, Any] = {}
    texts: Rows = {}
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
    catalogue = _catalogue(config, state)
    memory = _memory_of_events(config, state, batch)
    step_texts = _step_texts(config, state, batch, ids[ITEM], texts, key)

    def loss_fn(dense: Any, rows: Rows, catalogue: dict[str, jax.Array]) -> tuple[jax.Array, Metrics]:
        whole = whole_parameters(dense, config.abstract, config.layout, config.gather_dtype)
        model = merge_model(config.graphdef, config.abstract, whole)
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
            step_texts.tokens if step_texts is not None else None,
        )
        total, losses = jnp.float32(0), {}
        for i, (name, task) in enumerate(config.tasks.items()):
            forward.rows = {table: rows_of_task(name, found, shared) for table, found in rows.items()}
            part = task.loss(forward, plans[name], jax.random.fold_in(key, 2 * i + 2))
            losses[name] = part.total / jnp.maximum(weights[name], 1.0)
            total += task.weight * losses[name]
        return total, losses

    (_, losses), (dense, row_gradients, tables) = jax.value_and_grad(
        loss_fn, argnums=(0, 1, 2), has_aux=True
    )(state.dense, rows, catalogue)
    return _Microbatch(dense, tables, losses, extra_rounds, ids, routes, row_gradients)


def lookup_sizes(config: StepConfig, batch: Batch) -> dict[str, int]:
    """Ids that the look-ups of a global batch ask for, by what they are ids of; the batch's shapes suffice."""

    def ids(batch: Batch) -> Any:
        return lookup_ids(config.tables, batch, _plans(config, batch, jax.random.key(0)))[0]

    found = jax.eval_shape(ids, batch)
    return {keyed_by: sum(wanted.size for wanted in parts.values()) for keyed_by, parts in found.items()}


def _norms(gradients: _Gradients) -> dict[str, jax.Array]:
    """Parts of the global norm. A table under a full softmax first takes its look-ups' gradients in (in place)."""
    norms = {"dense": optax.tree.norm(gradients.dense)}
    for table, sparse in gradients.sparse.items():
        if table in gradients.catalogue:
            gradients.catalogue[table] = add_to(gradients.catalogue[table], sparse)
            norms[table] = optax.tree.norm(gradients.catalogue[table])
        else:
            norms[table] = jnp.sqrt(squared_norm(sparse))
    return norms


def _update(
    config: StepConfig,
    state: TrainState,
    gradients: _Gradients,
    norm: jax.Array,
    factor: jax.Array,
    apply: jax.Array,
) -> TrainState:
    """The guarded update: with `apply` False every array keeps its bits."""
    limit = config.optimizer_config.max_gradient_norm
    # Non-finite gradients are zeroed rather than selected away, so that no NaN meets a row that must not change.
    scale = jnp.where(apply, jnp.minimum(1.0, limit / (norm + 1e-12)) if limit else 1.0, 0.0)
    clean = lambda tree: jax.tree.map(lambda g: jnp.where(apply, g, 0.0) * scale, tree)  # noqa: E731
    updates, dense_slots = config.optimizer.update(clean(gradients.dense), state.dense_slots, state.dense)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(apply, n, o), new, old)  # noqa: E731
    dense = keep(optax.apply_updates(state.dense, updates), state.dense)

    tables, table_slots = {}, {}
    rate = config.row_optimizer.learning_rate * factor
    for name, table in state.tables.items():
        slots = state.table_slots[name]
        if name in gradients.catalogue:
            gradient = clean(gradients.catalogue[name])
            tables[name], table_slots[name] = apply_dense(
                config.row_optimizer, table, slots, gradient, rate=rate, apply=apply
            )
        else:
            tables[name], table_slots[name], _ = update(
                config.row_optimizer,
                table,
                slots,
                gradients.sparse[name],
                rate=rate,
                scale=scale,
                apply=apply,
            )
    decay = config.optimizer_config.ema_decay
    ema = state.ema
    if ema:
        # The average starts as the parameters themselves; a short memory at first forgets the random start.
        memory = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
        current = {"dense": dense, "tables": {name: tables[name] for name in ema["tables"]}}
        ema = keep(jax.tree.map(lambda a, p: a * memory + p * (1 - memory), ema, current), ema)
    return dataclasses.replace(
        state,
        step=jnp.where(apply, state.step + 1, state.step),
        dense=dense,
        dense_slots=keep(dense_slots, state.dense_slots),
        tables=tables,
        table_slots=table_slots,
        ema=ema,
    )
