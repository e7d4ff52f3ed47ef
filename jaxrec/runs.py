"""A run on disk: its config, its prepared data, its states. The entries open one here."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxrec.config import (
    TrainConfig,
    check_run_config,
    read_run_config,
    run_directory,
    run_fingerprint,
    validate,
)
from jaxrec.config.setup import setup_of
from jaxrec.core.mesh import device_count, make_mesh
from jaxrec.core.mixture_score import MixtureScore
from jaxrec.core.sparse_logits import SparseLogits
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.evaluation_batches import EvaluationBatch
from jaxrec.data.prepare import OtherDataError, prepare, prepared_fingerprint
from jaxrec.data.vocabulary import known_ids
from jaxrec.models.teacher import Teacher
from jaxrec.models.two_tower import ITEM, USER
from jaxrec.tasks.distillation import Distillation
from jaxrec.training.checkpoint import Checkpoints, DamagedCheckpointError
from jaxrec.training.feature_rows import with_new_items
from jaxrec.training.inference import Inference
from jaxrec.training.initial import Match, Start
from jaxrec.training.loop import restore
from jaxrec.training.setup import Setup, dataset_facts, evaluation_parameters
from jaxrec.training.state import TrainState, logical_rows, merge_model
from jaxrec.training.text_refresh import with_dataset_texts
from jaxrec.training.writer import read_metrics

logger = logging.getLogger(__name__)

T = TypeVar("T")


def open_dataset(config: TrainConfig, workdir: Path) -> PreparedDataset:
    """The data to train on: `data.path` where that is prepared already, else `workdir/data`, made now.

    With several processes the first one prepares, in a workdir that all of them see.

    Raises:
      ValueError: the workdir holds a run of another config or on other data, whose data stay as they are.
    """
    check_run_config(workdir, config)
    return _prepared(config, workdir, run_fingerprint(workdir))


def dataset_of_run(config: TrainConfig, workdir: Path) -> PreparedDataset:
    """The data of the run in `workdir`, whose config this is: those that it keeps, wherever they came from.

    Raises:
      ValueError: they are gone, and what they came from has changed.
    """
    expected = run_fingerprint(workdir)
    if expected and prepared_fingerprint(workdir / "data") == expected:
        return PreparedDataset.open(workdir / "data")
    return _prepared(config, workdir, expected)


def _prepared(config: TrainConfig, workdir: Path, expected: str) -> PreparedDataset:
    given = Path(config.data.path)
    if config.data.path and (found := prepared_fingerprint(given)):
        if expected not in ("", found):
            raise OtherDataError(str(given), found, expected)
        return PreparedDataset.open(given)
    out = workdir / "data"
    if jax.process_index() == 0:
        prepare(config.data, out, expected=expected)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("jaxrec: data are prepared")
    return PreparedDataset.open(out)


def setup_run(config: TrainConfig, dataset: PreparedDataset, mesh: Mesh, *, to_train: bool = True) -> Setup:
    """The static parts of a run; raises ValueError where config, data and devices do not fit.

    Args:
      to_train: False leaves out the teacher of a distillation, which need not be there any more.
    """
    validate(config, mesh.size)
    facts = dataset_facts(dataset)
    workdirs = {task.teacher for task in config.tasks.values() if isinstance(task, Distillation)}
    if to_train and workdirs:
        if len(workdirs) > 1:
            raise ValueError(f"the teachers {', '.join(sorted(workdirs))} are several; a run has one.")
        teacher = load_teacher(Path(workdirs.pop()), dataset)
        if USER in teacher.tables and USER in config.cache_rows:
            raise ValueError(
                f"cache_rows={dict(config.cache_rows)}: the teacher has rows of users, and a step that caches users "
                "knows them by their places in the cache; leave the table of users out of cache_rows."
            )
        facts = dataclasses.replace(facts, teacher=teacher)
    return setup_of(config, facts, mesh)


def load_teacher(workdir: Path, dataset: PreparedDataset) -> Teacher:
    """The run in `workdir`, for another on `dataset` to learn from.

    Raises:
      ValueError: there is no run, its items are others, or it is asked in a way that a student cannot follow.
    """
    _, its_data, setup, state = load_state(run_directory(workdir))
    if not np.array_equal(its_data.item_keys, dataset.item_keys):
        raise ValueError(
            f"the teacher in {workdir} knows {len(its_data.item_keys)} items of its own, and the run has "
            f"{len(dataset.item_keys)} others or in another order; train both on the same data."
        )
    if USER in setup.tables and not np.array_equal(its_data.user_keys, dataset.user_keys):
        raise ValueError(
            f"the teacher in {workdir} has rows of {len(its_data.user_keys)} users of its own, and the run has "
            f"{len(dataset.user_keys)} others or in another order; train both on the same data."
        )
    task = setup.ranking_task
    parts = [name for name in ("memory", "text", "mixture") if getattr(setup.model, name) is not None]
    if parts or task.query_mode != "causal":
        what = f"model.{parts[0]}" if parts else f"the task {type(task).__name__}"
        raise ValueError(
            f"the teacher in {workdir} has {what}; a teacher scores by products of what NextItem trains, without it."
        )
    with jax.set_mesh(setup.mesh):
        dense, tables = evaluation_parameters(state)
        model = merge_model(setup.step.graphdef, setup.step.abstract, jax.tree.map(np.asarray, dense))
        rows = {name: logical_rows(setup.tables[name], array) for name, array in tables.items()}
    return Teacher(model=model, tables=rows, temperature=task.temperature)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A trained run, ready to be asked; use it under `jax.set_mesh(run.mesh)`.

    Attributes:
      step: of the state that was loaded.
      history: the lines of `metrics.jsonl`.
    """

    config: TrainConfig
    dataset: PreparedDataset
    setup: Setup
    inference: Inference
    step: int
    history: Sequence[Mapping[str, float]]

    @property
    def mesh(self) -> Mesh:
        """The mesh that the state lies on."""
        return self.setup.mesh

    @property
    def appends_slot(self) -> bool:
        """Whether evaluation histories end with an empty slot for the mask vector."""
        return self.inference.appends_slot

    def query_fn(self, batch: EvaluationBatch) -> tuple[Float[Array, "n d"], SparseLogits | None]:
        """M(x) W of the users of a batch, and what the memory adds to the scores."""
        return self.inference.queries(batch)

    def text_queries(self, token_ids: Int[np.ndarray, "q t"]) -> Float[Array, "q d"]:
        """Unit vectors of texts that items are searched by."""
        return self.inference.text_queries(token_ids)

    @functools.cached_property
    def _catalogue(self) -> tuple[Array, Array]:
        return self.inference.catalogue()

    def catalogue(self) -> tuple[Float[Array, "r d"], Float[Array, " r"]]:
        """v(y) and b_y in physical row order."""
        return self._catalogue

    @property
    def score(self) -> MixtureScore | None:
        """How queries and v(y) are scored; None = by their product."""
        return self.setup.model.score

    def behaviour_logits(self, batch: EvaluationBatch) -> Float[np.ndarray, "n k"]:
        """Logits of the target event's behaviours; ValueError where no task learns them."""
        return np.asarray(self.inference.behaviour_logits(batch))

    def values(self, batch: EvaluationBatch) -> Float[np.ndarray, " n"]:
        """The number beside the target event, as the model expects it; ValueError where no task learns it."""
        return np.asarray(self.inference.values(batch))


def run_of_state(
    config: TrainConfig, dataset: PreparedDataset, setup: Setup, state: TrainState, step: int
) -> Run:
    """A run that is still training, as the evaluation sees it."""
    return Run(
        config=config, dataset=dataset, setup=setup, inference=Inference(setup, state), step=step, history=()
    )


def load_run(workdir: Path, *, mesh_shape: tuple[int, int] | None = None, fill_new_items: bool = True) -> Run:
    """Opens the run in `workdir` to ask it; see `load_state`."""
    config, dataset, setup, state = load_state(workdir, mesh_shape=mesh_shape, fill_new_items=fill_new_items)
    with jax.set_mesh(setup.mesh):
        return Run(
            config=config,
            dataset=dataset,
            setup=setup,
            inference=Inference(setup, state),
            step=int(jax.device_get(state.step)),
            history=read_metrics(workdir),
        )


def load_state(
    workdir: Path, *, mesh_shape: tuple[int, int] | None = None, fill_new_items: bool = True
) -> tuple[TrainConfig, PreparedDataset, Setup, TrainState]:
    """The run in `workdir` with its best state by validation where it kept one, else its newest.

    Args:
      mesh_shape: another mesh than the run was trained on; by default the run's own where it fits the devices
        of this machine, else all of them.
      fill_new_items: False leaves items without a training event the rows that they started with, whatever
        `model.new_items` is.

    Raises:
      ValueError: no run, no complete checkpoint, or data that are not the run's.
    """
    config = read_run_config(workdir)
    mesh = make_mesh(mesh_shape or _fitting_shape(config.mesh_shape))
    dataset = dataset_of_run(config, workdir)
    with jax.set_mesh(mesh):
        # The batch size is training's; here only the mesh must fit.
        setup = setup_run(
            dataclasses.replace(config, global_batch_size=mesh.size * config.accumulation_steps),
            dataset,
            mesh,
            to_train=False,
        )
        fresh = with_dataset_texts(setup, setup.init_state(), dataset)
        state = _from_best(workdir, lambda checkpoints: restore(setup, fresh, checkpoints))
        if fill_new_items:
            state = with_new_items(setup, state, dataset)
        return config, dataset, setup, state


def is_trained(config: TrainConfig, workdir: Path) -> bool:
    """Whether the run in `workdir` has come to its end, and its last state is whole."""
    with Checkpoints(str(workdir / "checkpoints"), keep=1, save_every_steps=1) as checkpoints:
        if (checkpoints.latest_step() or 0) < config.num_train_steps:
            return False
        newest = checkpoints.latest_manifest()  # reads every file, and falls back from a damaged step
    return newest is not None and newest.step >= config.num_train_steps


def start_of(config: TrainConfig, dataset: PreparedDataset, setup: Setup, workdir: Path) -> Start | None:
    """What the run in `workdir` takes over from `config.init_from`; None = nothing, or it has a state of its own.

    Raises:
      ValueError: there is no run, it is this one, or its parameters do not fit.
    """
    if not config.init_from:
        return None
    source = run_directory(Path(config.init_from))
    if source.resolve() == workdir.resolve():
        raise ValueError(
            f"init_from={config.init_from} is the run's own workdir; name another run, or leave it out: a run goes on "
            "from its own state by itself."
        )
    with Checkpoints(str(workdir / "checkpoints"), keep=1, save_every_steps=1) as own:
        if own.latest_step() is not None:
            return None
    return start_from(source, config, dataset, setup)


def start_from(source: Path, config: TrainConfig, dataset: PreparedDataset, setup: Setup) -> Start:
    """What a fresh state of `config` takes over from the run in `source`; raises as `start_of` does."""
    other = dataset_of_run(read_run_config(source), source)
    keys = {
        ITEM: lambda dataset: dataset.item_keys,
        USER: lambda dataset: dataset.user_keys,
    }
    matches = {}
    for name in {table.keyed_by for table in setup.tables.values()}:
        here, there = keys[name](dataset), keys[name](other)
        matches[name] = Match(known_ids=known_ids(here, there), num_known=len(there))
    return _from_best(source, lambda checkpoints: Start(setup, checkpoints, matches, config.init_without))


def _from_best(workdir: Path, load: Callable[[Checkpoints], T]) -> T:
    """What `load` makes of a run's best state by validation where it kept one that is whole, else of its newest.

    Raises:
      ValueError: no complete checkpoint.
    """
    for name in ("best", "checkpoints"):
        with Checkpoints(str(workdir / name), keep=1, save_every_steps=1) as checkpoints:
            if checkpoints.latest_step() is None:
                continue
            try:
                return load(checkpoints)
            except DamagedCheckpointError as error:
                if name == "checkpoints":
                    raise
                logger.warning("%s; taking the newest checkpoint of the run instead", error)
    raise ValueError(
        f"{workdir} holds no complete checkpoint yet; let python -m jaxrec.train --workdir={workdir} save one."
    )


def _fitting_shape(shape: tuple[int, int]) -> tuple[int, int]:
    known = [size for size in shape if size != -1]
    product = int(np.prod(known)) if known else 1
    devices = device_count()
    fits = devices % product == 0 if -1 in shape else product == devices
    return shape if fits else (-1, 1)
