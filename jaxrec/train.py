"""Trains a model: `python -m jaxrec.train --config=configs/quickstart.py --workdir=runs/quickstart`.

The same command resumes a run that was stopped. A config with stages trains them one after the other, each in a
directory of its own in the workdir. It runs on CPU, one GPU, several GPUs and TPU pods alike; only
`mesh_shape` changes, and -1 infers.
"""

import logging
import sys
import time
from pathlib import Path

import jax
import numpy as np

from jaxrec.config import (
    TrainConfig,
    note_stages,
    parse_train_arguments,
    stage_configs,
    write_run_config,
)
from jaxrec.core.log import failed, start_logging
from jaxrec.core.mesh import DETERMINISTIC, device_kind, initialize_platform, make_mesh, repeats_bits
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.evaluation_batches import asked_users
from jaxrec.evaluation.user_ranking import UserRanker
from jaxrec.metrics.ranking import mean_metrics
from jaxrec.runs import is_trained, open_dataset, run_of_state, setup_run, start_of
from jaxrec.training.feature_rows import with_new_items
from jaxrec.training.loop import LoopConfig, NotFiniteError, train
from jaxrec.training.setup import Setup, describe
from jaxrec.training.state import TrainState

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """The entry; returns the exit status."""
    start_logging()
    given = parse_train_arguments(__doc__, arguments)
    try:
        initialize_platform()
        train_workdir(given.config, given.workdir)
    except (ValueError, OSError, NotFiniteError) as error:
        return failed(error)
    return 0


def train_workdir(config: TrainConfig, workdir: Path) -> None:
    """Trains the run of `config`, or its stages in their order, from where they were stopped."""
    runs = stage_configs(config, workdir)
    for name, run in runs.items():  # what is wrong with a later one is said before the first one trains
        setup_run(run, open_dataset(run, workdir / name), make_mesh(run.mesh_shape))
    note_stages(workdir, list(runs))
    if not runs:
        train_run(config, workdir)
    for number, (name, run) in enumerate(runs.items(), 1):
        logger.info("stage %s, %d of %d", name, number, len(runs))
        if not train_run(run, workdir / name):
            break


def train_run(config: TrainConfig, workdir: Path) -> bool:
    """Trains `config` in `workdir`, or resumes the run that is there; False = it was stopped before its end."""
    # 1. The mesh, and the config against it, before anything costly.
    mesh = make_mesh(config.mesh_shape)
    logger.info("%d devices (%s), mesh %s", mesh.size, device_kind(), dict(mesh.shape))
    if not repeats_bits():
        logger.info(
            "a repeated or resumed run equals this one to the bit with XLA_FLAGS=%s only", DETERMINISTIC
        )

    # 2. The data: prepared once, kept with the run.
    dataset = open_dataset(config, workdir)
    with jax.set_mesh(mesh):
        setup = setup_run(config, dataset, mesh)
        initialize = start_of(config, dataset, setup, workdir)
        write_run_config(workdir, config, data_fingerprint=dataset.metadata.fingerprint)
        if is_trained(config, workdir):
            logger.info("%s is trained: %d steps", workdir, config.num_train_steps)
            return True
        describe(setup, dataset)

        # 3. Train. Validation is handed in: the loop knows no metric.
        loop = LoopConfig(
            num_train_steps=config.num_train_steps,
            global_batch_size=config.global_batch_size,
            history_length=config.data.history_length,
            user_share=config.data.train_users,
            train_since=config.data.train_since,
            replay_share=config.data.replay_share,
            domain_temperature=config.data.domain_temperature,
            windows=config.data.windows,
            log_every_steps=config.log_every_steps,
            checkpoint_every_steps=config.checkpoint_every_steps,
            keep_checkpoints=config.keep_checkpoints,
            validate_every_steps=config.evaluation.every_steps,
            metric=config.evaluation.metric,
        )
        users = validation_users(config, dataset)
        state = train(
            setup, dataset, loop, workdir,
            lambda state: validation_metrics(config, dataset, setup, state, users), initialize,
        )  # fmt: skip
    if int(jax.device_get(state.step)) < config.num_train_steps:
        return False
    logger.info("done: %s; evaluate it with python -m jaxrec.evaluate --workdir=%s", workdir, workdir)
    return True


def validation_users(config: TrainConfig, dataset: PreparedDataset) -> np.ndarray | None:
    """The users that validation asks while training, of those with a target and a past; None = all.

    Raises:
      ValueError: validation is wanted, and nobody can be asked.
    """
    users = asked_users(dataset, "validation")
    if config.evaluation.every_steps and not len(users):
        raise ValueError(
            f"evaluation.every_steps={config.evaluation.every_steps}, and no user has a validation event after an "
            "earlier one; set it to 0, or let data.split leave events to validate on."
        )
    limit = config.evaluation.max_users
    if not limit or limit >= len(users):
        return None
    return np.sort(np.random.default_rng(config.evaluation.seed).permutation(users)[:limit])


def validation_metrics(
    config: TrainConfig, dataset: PreparedDataset, setup: Setup, state: TrainState, users: np.ndarray | None
) -> dict[str, float]:
    """Full-catalogue ranking metrics of the validation targets."""
    begin = time.perf_counter()
    state = with_new_items(setup, state, dataset)
    ranker = UserRanker(run_of_state(config, dataset, setup, state, int(jax.device_get(state.step))))
    rows = ranker.rows(
        "validation",
        rows_per_batch=config.evaluation.rows_per_batch,
        user_indices=users,
        every_event=config.evaluation.ranking_events == "all",
    )
    ranks = np.concatenate([part.ranks for part in ranker.batches(rows)] or [np.zeros(0, np.int32)])
    found = mean_metrics(ranks[ranks >= 0], config.evaluation.ks)
    logger.info(
        "validation: %s over %d targets in %.1f s",
        " ".join(f"{name} {found[name]:.4f}" for name in ("hr@10", "ndcg@10") if name in found), len(ranks),
        time.perf_counter() - begin,
    )  # fmt: skip
    return found


if __name__ == "__main__":
    sys.exit(main())
