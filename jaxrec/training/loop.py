"""The training loop: resume, step, log, validate, save. It names no task and no dataset."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxrec.core.batch import Batch
from jaxrec.core.mesh import device_kind, peak_memory_bytes, platform
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.pipeline import BatchStream, train_batches
from jaxrec.models.two_tower import ITEM
from jaxrec.training.cached_tables import CachedTables
from jaxrec.training.checkpoint import Checkpoints
from jaxrec.training.feature_rows import with_feature_rows
from jaxrec.training.flops import peak_flops, step_flops
from jaxrec.training.memory import count_memory
from jaxrec.training.setup import Setup, place_batch
from jaxrec.training.state import NO_FAILURE, TrainState, abstract_checkpoint, from_checkpoint, to_checkpoint
from jaxrec.training.step import make_train_step
from jaxrec.training.text_refresh import TextEncoding, with_checkpoint_weights, with_dataset_texts
from jaxrec.training.writer import MetricWriter, TrainingProgress

logger = logging.getLogger(__name__)


class NotFiniteError(ArithmeticError):
    """A loss or a gradient was NaN or infinite; the state is that of before the step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, how much, and how often.

    Attributes:
      validate_every_steps: 0 = never; the best state by `metric` is then kept in `workdir/best`.
      user_share, train_since, replay_share, domain_temperature: see `TrainingRows.make`.
    """

    num_train_steps: int
    global_batch_size: int
    history_length: int
    windows: str
    log_every_steps: int
    checkpoint_every_steps: int
    keep_checkpoints: int
    validate_every_steps: int
    metric: str
    user_share: float = 1.0
    train_since: int | None = None
    replay_share: float = 0.0
    domain_temperature: float = 1.0


def train(
    setup: Setup,
    dataset: PreparedDataset,
    config: LoopConfig,
    workdir: Path,
    validate: Callable[[TrainState], dict[str, float]] | None,
    initialize: Callable[[TrainState], TrainState] | None = None,
) -> TrainState:
    """Trains until `num_train_steps`, from the newest complete checkpoint of `workdir` where there is one.

    Args:
      initialize: makes the first state from a fresh one; a run that resumes does not ask it.

    Raises:
      NotFiniteError: names the step (= the batch's index) and the tasks.
    """
    state = with_dataset_texts(setup, setup.init_state(), dataset)
    with (
        Checkpoints(
            str(workdir / "checkpoints"),
            keep=config.keep_checkpoints,
            save_every_steps=config.checkpoint_every_steps,
        ) as checkpoints,
        Checkpoints(str(workdir / "best"), keep=1, save_every_steps=1) as best,
    ):
        # Resume: one rule -- the newest complete checkpoint wins.
        state = restore(setup, state, checkpoints)
        start = int(jax.device_get(state.step))
        if start:
            logger.info("resuming from step %d of %s", start, workdir)
        else:
            state = first_state(setup, state, dataset, initialize)
        best_value = _best_value(best, config.metric)
        cached = CachedTables(setup.cache_rows, state, setup.mesh)
        state = cached.enter(state)
        step_fn = make_train_step(setup.step, state, setup.mesh)
        encoding = TextEncoding(setup)
        meter = Meter(setup, config)
        # Collectives of several CPU devices may wait for each other for ever where runs of them are queued.
        one_by_one = platform() == "cpu" and setup.mesh.size > 1
        with (
            MetricWriter(workdir, resume_step=start) as writer,
            TrainingProgress(config.num_train_steps, start_step=start) as progress,
            contextlib.closing(Prefetch(setup, dataset, config, start)) as batches,
        ):
            for step in range(start, config.num_train_steps):
                batch, placed, waited = batches.next()
                state, placed = cached.bring(state, batch, placed)
                if encoding.is_due(step):
                    state = encoding.refresh(state)
                with jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, placed)
                if one_by_one:
                    jax.block_until_ready(metrics)
                done = step + 1
                meter.count(metrics, waited)
                if done % config.log_every_steps == 0 or done == config.num_train_steps:
                    values = meter.read() | cached.metrics()
                    _check_finite(values, setup, step)
                    writer.log(done, values)
                    progress.update(done, loss=values["loss"], events_per_second=values["events_per_second"])
                last = done == config.num_train_steps
                if (
                    validate
                    and config.validate_every_steps
                    and (done % config.validate_every_steps == 0 or last)
                ):
                    whole = cached.whole(state)
                    found = validate(whole)
                    writer.log(done, {f"validation/{name}": value for name, value in found.items()})
                    if found[config.metric] > best_value:
                        best_value = found[config.metric]
                        best.wait()
                        best.save(
                            done, to_checkpoint(whole, setup.tables, setup.mesh), metadata=found, force=True
                        )
                    meter.restart()
                preempted = checkpoints.reached_preemption(done)
                if done % config.checkpoint_every_steps == 0 or last or preempted:
                    _save(checkpoints, setup, cached.whole(state), done)
                if preempted:
                    logger.warning("preempted: saved step %d, start the same command again to go on", done)
                    break
        return cached.whole(state)


def first_state(
    setup: Setup,
    fresh: TrainState,
    dataset: PreparedDataset,
    initialize: Callable[[TrainState], TrainState] | None,
) -> TrainState:
    """Where a run starts that resumes nothing: items' features, a text checkpoint, another run, the data's counts."""
    state = with_feature_rows(setup, with_checkpoint_weights(setup, fresh), dataset)
    state = initialize(state) if initialize else state
    if setup.model.memory is None:
        return state
    counted = count_memory(setup.model.memory, setup.tables[ITEM], dataset, setup.mesh)
    return dataclasses.replace(state, memory=counted)


def restore(setup: Setup, state: TrainState, checkpoints: Checkpoints) -> TrainState:
    """`state` with the arrays of the newest complete checkpoint, or as it is where there is none."""
    found = checkpoints.restore_latest(abstract_checkpoint(state, setup.tables, setup.mesh))
    return state if found is None else from_checkpoint(found[1], setup.tables, setup.mesh, state)


def _save(checkpoints: Checkpoints, setup: Setup, state: TrainState, step: int) -> None:
    # A state that holds a failure is that of an earlier step; the next log line raises.
    if int(jax.device_get(state.failure)[0]) == NO_FAILURE:
        checkpoints.save(step, to_checkpoint(state, setup.tables, setup.mesh), force=True)


def _best_value(best: Checkpoints, metric: str) -> float:
    metadata = best.latest_metadata()
    return float("-inf") if metadata is None else float(metadata.get(metric, "-inf"))


def _check_finite(values: dict[str, float], setup: Setup, step: int) -> None:
    failed = int(values["failed_step"])
    if failed == NO_FAILURE:
        return
    mask = int(values["failed_tasks"])
    names = [name for i, name in enumerate(setup.step.tasks) if mask >> i & 1]
    where = (
        f"the loss of task {', '.join(names)}" if names else "the gradients (every task's loss was finite)"
    )
    raise NotFiniteError(
        f"step {failed} met a number that is not finite in {where}, at batch index {failed}; nothing was updated "
        "since. Lower optimizer.learning_rate or row_optimizer.learning_rate, or set optimizer.max_gradient_norm."
    )


class Prefetch:
    """The batches from `start` on, the next one already on its way to the devices."""

    def __init__(self, setup: Setup, dataset: PreparedDataset, config: LoopConfig, start: int):
        self._mesh = setup.mesh
        self._batches: BatchStream = train_batches(
            dataset,
            global_batch_size=config.global_batch_size,
            history_length=config.history_length,
            windows=config.windows,
            user_share=config.user_share,
            train_since=config.train_since,
            replay_share=config.replay_share,
            domain_temperature=config.domain_temperature,
            seed=setup.step.seed,
            start_step=start,
            stop_step=config.num_train_steps,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self._ahead: tuple[Batch, Batch] | None = None

    def next(self) -> tuple[Batch, Batch, float]:
        """The next batch on the host and on the devices, and the seconds that the loop waited for it."""
        begin = time.perf_counter()
        current = self._ahead if self._ahead is not None else self._place()
        self._ahead = self._place()
        assert current is not None, "the loop asks for as many batches as there are steps"
        return *current, time.perf_counter() - begin

    def close(self) -> None:
        """Ends the threads that read ahead."""
        self._batches.close()

    def _place(self) -> tuple[Batch, Batch] | None:
        batch = next(self._batches, None)
        return None if batch is None else (batch, place_batch(batch, self._mesh))


class Meter:
    """Throughput, utilisation and waiting since the last log line. Metrics stay on the devices until then."""

    def __init__(self, setup: Setup, config: LoopConfig):
        self._flops = step_flops(
            setup.model,
            dict(setup.step.tasks),
            setup.step.facts.num_items,
            len(setup.step.facts.behaviours),
            config.global_batch_size,
            config.history_length,
            setup.step.facts.num_text_tokens,
        )
        devices = setup.mesh.size
        kind = device_kind()
        # Virtual CPU devices share the cores that the measured peak is of.
        self._peak = peak_flops(kind) * (1 if kind == "cpu" else devices)
        self.restart()

    def restart(self) -> None:
        """Leaves out what happened since the last `read` (compilation, validation)."""
        self._begin, self._waited, self._steps = time.perf_counter(), 0.0, 0
        self._events: list[jax.Array] = []

    def count(self, metrics: dict[str, jax.Array], waited: float) -> None:
        """Takes a step in."""
        self._latest = metrics
        self._events.append(metrics["events"])
        self._waited += waited
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Waits for the devices and gives the numbers of the last step and the rates since the last read."""
        values: dict[str, Any] = jax.device_get(self._latest)
        events = sum(int(value) for value in jax.device_get(self._events))
        seconds = time.perf_counter() - self._begin
        result = {name: float(value) for name, value in values.items()}
        result |= {
            "events_per_second": events / seconds,
            "steps_per_second": self._steps / seconds,
            "flops_utilisation": self._flops * self._steps / seconds / self._peak,
            "gflops_per_second": self._flops * self._steps / seconds / 1e9,
            "input_wait_share": self._waited / seconds,
        }
        memory = peak_memory_bytes()
        if memory is not None:
            result["peak_memory_bytes"] = float(memory)
        self.restart()
        return result
