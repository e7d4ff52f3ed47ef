"""The train step: one `jax.jit` over pytrees. It names no task.

Order: plans (integers), look-ups, gradients with respect to dense parameters, rows and (full softmax) tables, one
global norm over all of them, finite check, one guarded update.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxrec.core.batch import Batch
from jaxrec.core.partition import row_major
from jaxrec.embedding.engine import add_to, squared_norm, update
from jaxrec.embedding.row_optimizer import apply_dense
from jaxrec.training.gradients import Gradients, Metrics, batch_gradients
from jaxrec.training.optimizer import schedule_factor
from jaxrec.training.state import NO_FAILURE, TrainState
from jaxrec.training.step_config import StepConfig
from jaxrec.training.text_cache import ENCODED_AT


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
    gradients = batch_gradients(config, state, batch, config.key(state.step))
    losses, norms = gradients.losses, _norms(gradients)
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
    return state, metrics | gradients.metrics


def _norms(gradients: Gradients) -> dict[str, jax.Array]:
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
    gradients: Gradients,
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
    dense = keep(config.rates.step(state.dense, updates), state.dense)

    tables, table_slots = dict(state.tables), dict(state.table_slots)
    for name, table in config.rates.trained(state.tables).items():
        slots = state.table_slots[name]
        rate = config.row_optimizer.learning_rate * config.rates.tables[name] * factor
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
        ema = keep(config.rates.average(ema, current, memory), ema)
    return dataclasses.replace(
        state,
        step=jnp.where(apply, state.step + 1, state.step),
        dense=dense,
        dense_slots=keep(dense_slots, state.dense_slots),
        tables=tables,
        table_slots=table_slots,
        ema=ema,
    )
