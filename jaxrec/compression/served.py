"""A compressed model as a run that can be asked, and each user's rank under it.

C = candidates, D = item dim, N = users of a batch.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrec.compression.files import SCAN, CompressedModel
from jaxrec.compression.parameters import (
    abstract_parameters,
    check_compressible,
    serving_setup,
    state_of,
)
from jaxrec.core.placement import physical_rows
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.evaluation_batches import EvaluationRows
from jaxrec.evaluation.user_ranking import UserRanker, UserRanks
from jaxrec.runs import Run, run_of_state
from jaxrec.training.inference import Inference
from jaxrec.training.setup import Setup
from jaxrec.training.state import TrainState

LIST_LENGTH = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class RescoredRun(Run):
    """A run whose catalogue is ranked by codes; the best candidates are then scored by the rows of the tables.

    Attributes:
      scan: the same model with the codes' rows in the place of the tables'.
    """

    scan: Inference
    num_candidates: int

    def catalogue(self) -> tuple[Float[Array, "r d"], Float[Array, " r"]]:
        """What the codes stand for, and b_y."""
        return self.scan.catalogue()


def compressed_run(model: CompressedModel, dataset: PreparedDataset, mesh: jax.sharding.Mesh) -> Run:
    """The run that a compressed model is; ask it under `jax.set_mesh(mesh)`.

    Raises:
      ValueError: the data are not those that it was trained on, or its codes are not what its config asks for.
    """
    setup, state = compressed_state(model, dataset, mesh)
    with jax.set_mesh(mesh):
        run = run_of_state(model.config, dataset, setup, state, model.step)
        if not model.num_candidates:
            return run
        coarse = state_of(setup, _decoded(model) | _decoded(model, SCAN), model.step)
        return RescoredRun(scan=Inference(setup, coarse), num_candidates=model.num_candidates, **vars(run))


def compressed_state(
    model: CompressedModel, dataset: PreparedDataset, mesh: jax.sharding.Mesh
) -> tuple[Setup, TrainState]:
    """What the codes stand for, those that score; raises as `compressed_run` does."""
    check_compressible(model.config)
    if dataset.metadata.fingerprint != model.fingerprint:
        raise ValueError(
            f"the model was trained on data of fingerprint {model.fingerprint}, and dataset {dataset.metadata.name!r} "
            f"has {dataset.metadata.fingerprint}; give the workdir that it was compressed from."
        )
    with jax.set_mesh(mesh):
        setup = serving_setup(model.config, dataset, mesh)
        _check_shapes(model, setup)
        return setup, state_of(setup, _decoded(model), model.step)


def _check_shapes(model: CompressedModel, setup: Setup) -> None:
    wanted = abstract_parameters(setup)
    shapes = {name: code.shape for name, code in model.codes.items() if not name.startswith(SCAN)}
    others = {
        name.removeprefix(SCAN): code.shape for name, code in model.codes.items() if name.startswith(SCAN)
    }
    if shapes != wanted or any(wanted.get(name) != shape for name, shape in others.items()):
        name = next(n for n in sorted(wanted.keys() | shapes) if wanted.get(n) != (shapes | others).get(n))
        raise ValueError(
            f"{name} has the shape {(shapes | others).get(name)}, and the config asks for {wanted.get(name)}; "
            "compress the run again."
        )


def _decoded(model: CompressedModel, prefix: str = "") -> dict[str, jax.Array]:
    """By the names of `parameters`: the codes that score, or with `SCAN` those that choose candidates."""
    return {
        name.removeprefix(prefix): code.decode()
        for name, code in model.codes.items()
        if name.startswith(SCAN) == bool(prefix)
    }


def rank_users(run: Run, split: str) -> UserRanks:
    """Every target of `split` in the whole catalogue, as the run's own evaluation has it.

    Raises:
      ValueError: nobody has a target.
    """
    evaluation = run.config.evaluation
    length = run.num_candidates if isinstance(run, RescoredRun) else LIST_LENGTH
    ranker = UserRanker(run, top_k=length)
    rows = ranker.rows(
        split, rows_per_batch=evaluation.rows_per_batch, every_event=evaluation.ranking_events == "all"
    )
    if not rows.num_users:
        raise ValueError(
            f"dataset {run.dataset.metadata.name!r} has no user with a target in split {split!r}; take another split."
        )
    if isinstance(run, RescoredRun):
        return _rescored(run, ranker, rows)
    return ranker.rank(rows)[0]


def _rescored(run: RescoredRun, ranker: UserRanker, rows: EvaluationRows) -> UserRanks:
    """The candidates in the order of their exact scores; who is no candidate stays behind all of them."""
    exact, _ = run.inference.catalogue()
    coarse, _ = run.catalogue()
    parts = []
    for index, found in enumerate(ranker.batches(rows)):
        batch = rows.build(index, 0, 1)
        queries, _ = run.query_fn(batch)
        real = np.asarray(batch.user_indices) >= 0
        gain = _gain(run.mesh.size, exact, coarse, queries, jnp.asarray(_padded(found.top_item_ids, real)))
        scores = found.top_scores + np.asarray(gain)[real]
        scores = np.where(found.top_item_ids > 0, scores, -np.inf)
        order = np.lexsort((found.top_item_ids, -scores))
        ids = np.take_along_axis(found.top_item_ids, order, 1)
        is_target = (ids == found.targets[:, None]) & (ids > 0)
        ranks = np.where(is_target.any(1), is_target.argmax(1), found.ranks).astype(np.int32)
        parts.append(
            dataclasses.replace(
                found, ranks=ranks, top_item_ids=ids, top_scores=np.take_along_axis(scores, order, 1)
            )
        )
    joined = UserRanks(
        **{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])}
    )
    joined = joined.take(np.argsort(rows.order, kind="stable"))
    return joined.take(np.argsort(joined.user_indices, kind="stable"))


def _padded(values: np.ndarray, real: np.ndarray) -> np.ndarray:
    whole = np.zeros((len(real), values.shape[1]), values.dtype)
    whole[real] = values
    return whole


def _gain(
    shards: int, exact: jax.Array, coarse: jax.Array, queries: jax.Array, item_ids: jax.Array
) -> Float[Array, "N C"]:
    """How much more the exact rows score than the codes; biases and what a memory adds are alike in both."""
    rows = physical_rows(item_ids, shards, exact.shape[0] // shards)
    return jnp.einsum(
        "nd,ncd->nc", queries.astype(jnp.float32), (exact[rows] - coarse[rows]).astype(jnp.float32)
    )
