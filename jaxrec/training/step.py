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
from jaxrec.core.placement import num_shards
from jaxrec.embedding.row_optimizer import RowOptimizer, SparseRows, add_sparse, apply_dense, apply_sparse
from jaxrec.embedding.table import lookup, lookup_shared
from jaxrec.models.two_tower import ITEM
from jaxrec.tasks.base import DataFacts, Forward, Plan, Task
from jaxrec.training.optimizer import OptimizerConfig, schedule_factor
from jaxrec.training.state import NO_FAILURE, TrainState, merge_model

Metrics = dict[str, jax.Array]
EVENTS = ("", "events")  # the look-up of the batch's own events, shared by all tasks
Rows = dict[str, dict[tuple[str, str], jax.Array]]  # table -> (task, look-up) -> rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What the step is made of; all static."""

    graphdef: nnx.GraphDef
    abstract: nnx.State
    tasks: Mapping[str, Task]
    facts: DataFacts
    optimizer: optax.GradientTransformation
    optimizer_config: OptimizerConfig
    row_optimizer: RowOptimizer
    num_train_steps: int
    accumulation_steps: int
    seed: int


def make_train_step(
    config: StepConfig, state: TrainState, mesh: Mesh
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted step `(state, batch) -> (state, metrics)`; the state is donated and keeps its shardings."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(functools.partial(train_step, config), donate_argnums=0, out_shardings=(shardings, None))


def train_step(config: StepConfig, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """See the module. `metrics` are scalars; losses are means over the global batch, in nats."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 2), state.step)
    gradients, losses = _gradients(config, state, batch, key)
    norms = {name: optax.tree.norm(part) for name, part in _norm_groups(config, gradients).items()}
    norm = jnp.sqrt(jnp.sum(jnp.square(jnp.stack(list(norms.values())))))

    bad_tasks = jnp.array([~jnp.isfinite(losses[name]) for name in config.tasks])
    finite = jnp.isfinite(norm) & ~jnp.any(bad_tasks)
    apply = finite & (state.failure[0] == NO_FAILURE)
    mask = jnp.sum(jnp.where(bad_tasks, 2 ** jnp.arange(len(config.tasks)), 0)).astype(jnp.int32)
    failure = jnp.where(
        apply | (state.failure[0] != NO_FAILURE), state.failure, jnp.stack([state.step, mask])
    )

    factor = schedule_factor(config.optimizer_config, config.num_train_steps, state.step)
    state = dataclasses.replace(_update(config, state, gradients, norm, factor, apply), failure=failure)
    metrics = {f"loss/{name}": value for name, value in losses.items()}
    metrics["loss"] = jnp.sum(jnp.stack([task.weight * losses[name] for name, task in config.tasks.items()]))
    metrics |= {f"gradient_norm/{name}": value for name, value in norms.items()} | {"gradient_norm": norm}
    metrics["learning_rate"] = config.optimizer_config.learning_rate * factor
    metrics["events"] = jnp.sum(batch.history_mask.astype(jnp.int32))
    metrics["failed_step"] = failure[0]
    metrics["failed_tasks"] = failure[1]
    return state, metrics


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Gradients:
    """Gradients of one batch: of dense parameters, of looked-up rows, and of whole tables (full softmax)."""

    dense: Any
    sparse: dict[str, SparseRows]
    catalogue: dict[str, jax.Array]


def _gradients(
    config: StepConfig, state: TrainState, batch: Batch, key: jax.Array
) -> tuple[_Gradients, Metrics]:
    """Gradients of the weighted sum of the tasks' means over the global batch."""
    count = config.accumulation_steps
    if count == 1:
        plans = _plans(config, batch, key)
        weights = {name: plan.weight for name, plan in plans.items()}
        return _microbatch(config, state, batch, plans, weights, key)
    # Means are over the global batch, so the weights of all microbatches come first: they are integers' work.
    parts = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(count))
    each = jax.lax.map(lambda part: {n: p.weight for n, p in _plans(config, *part).items()}, (parts, keys))
    weights = jax.tree.map(jnp.sum, each)

    def body(carry: Any, part: Any) -> Any:
        microbatch, key = part
        gradients, losses = _microbatch(
            config, state, microbatch, _plans(config, microbatch, key), weights, key
        )
        summed = (gradients.dense, gradients.catalogue, losses)
        return jax.tree.map(jnp.add, carry, summed), gradients.sparse

    first, losses = _microbatch_zeros(config, state)
    (dense, catalogue, losses), sparse = jax.lax.scan(body, (*first, losses), (parts, keys))
    flat = {name: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows) for name, rows in sparse.items()}
    return _Gradients(dense, flat, catalogue), losses


def _microbatch_zeros(config: StepConfig, state: TrainState) -> tuple[tuple[Any, Any], Metrics]:
    tables = state.tables if _needs_catalogue(config) else {}
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    return (zeros(state.dense), zeros(tables)), {name: jnp.float32(0) for name in config.tasks}


def _needs_catalogue(config: StepConfig) -> bool:
    return any(task.needs_catalogue for task in config.tasks.values())


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
) -> tuple[_Gradients, Metrics]:
    ids, shared = _lookup_ids(batch, plans)
    rows: Rows = {
        table: {where: lookup(array, wanted) for where, wanted in ids.items()}
        | {where: lookup_shared(array, wanted) for where, wanted in shared.items()}
        for table, array in state.tables.items()
    }
    catalogue = state.tables if _needs_catalogue(config) else {}

    def loss_fn(dense: Any, rows: Rows, catalogue: dict[str, jax.Array]) -> tuple[jax.Array, Metrics]:
        model = merge_model(config.graphdef, config.abstract, dense)
        forward = Forward(
            model, batch, config.facts, rows[ITEM][EVENTS], catalogue or None, jax.random.fold_in(key, 0)
        )
        total, losses = jnp.float32(0), {}
        for i, (name, task) in enumerate(config.tasks.items()):
            forward.rows = {
                table: {inner: value for (owner, inner), value in found.items() if owner == name}
                for table, found in rows.items()
            }
            part = task.loss(forward, plans[name], jax.random.fold_in(key, 2 * i + 2))
            losses[name] = part.total / jnp.maximum(weights[name], 1.0)
            total += task.weight * losses[name]
        return total, losses

    (_, losses), (dense, row_gradients, tables) = jax.value_and_grad(
        loss_fn, argnums=(0, 1, 2), has_aux=True
    )(state.dense, rows, catalogue)
    sparse = {table: _sparse_rows(ids | shared, found) for table, found in row_gradients.items()}
    return _Gradients(dense, sparse, tables), losses


def _lookup_ids(batch: Batch, plans: dict[str, Plan]) -> tuple[dict[Any, jax.Array], dict[Any, jax.Array]]:
    ids = {EVENTS: jnp.asarray(batch.item_ids)}
    shared: dict[Any, jax.Array] = {}
    for name, plan in plans.items():
        ids |= {(name, inner): wanted for inner, wanted in plan.lookups.items()}
        shared |= {(name, inner): wanted for inner, wanted in plan.shared_lookups.items()}
    return ids, shared


def _sparse_rows(ids: dict[Any, jax.Array], gradients: dict[Any, jax.Array]) -> SparseRows:
    """All look-ups of one table as one list; its order is fixed by the tasks', hence the same on every mesh."""
    flat_ids = [ids[where].reshape(-1) for where in ids]
    flat = [gradients[where].reshape(-1, gradients[where].shape[-1]) for where in ids]
    total = sum(part.size for part in flat_ids)
    missing = -total % num_shards()  # shared draws may be of any number; padding ids are ignored
    return SparseRows(
        jnp.pad(jnp.concatenate(flat_ids), (0, missing)),
        jnp.pad(jnp.concatenate(flat), ((0, missing), (0, 0))),
    )


def _norm_groups(config: StepConfig, gradients: _Gradients) -> dict[str, Any]:
    """Parts of the global norm. A table under a full softmax first takes its look-ups' gradients in (in place)."""
    groups: dict[str, Any] = {"dense": gradients.dense}
    for table, sparse in gradients.sparse.items():
        if table in gradients.catalogue:
            gradients.catalogue[table] = add_sparse(gradients.catalogue[table], sparse)
            groups[table] = gradients.catalogue[table]
        else:
            groups[table] = sparse.gradients
    return groups


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
    shared = {
        "rate": config.row_optimizer.learning_rate * factor,
        "count": (state.step + 1).astype(jnp.float32),
        "apply": apply,
    }
    for name, table in state.tables.items():
        if name in gradients.catalogue:
            tables[name], table_slots[name] = apply_dense(
                config.row_optimizer,
                table,
                state.table_slots[name],
                clean(gradients.catalogue[name]),
                **shared,
            )
        else:
            rows = gradients.sparse[name]
            rows = SparseRows(rows.ids, clean(rows.gradients))
            tables[name], table_slots[name] = apply_sparse(
                config.row_optimizer, table, state.table_slots[name], rows, **shared
            )
    decay = config.optimizer_config.ema_decay
    ema = state.ema
    if ema:
        # The average starts as the parameters themselves; a short memory at first forgets the random start.
        memory = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
        current = {"dense": dense, "tables": tables}
        ema = keep(jax.tree.map(lambda a, p: a * memory + p * (1 - memory), ema, current), ema)
    return TrainState(
        step=jnp.where(apply, state.step + 1, state.step),
        dense=dense,
        dense_slots=keep(dense_slots, state.dense_slots),
        tables=tables,
        table_slots=table_slots,
        ema=ema,
        failure=state.failure,
    )
