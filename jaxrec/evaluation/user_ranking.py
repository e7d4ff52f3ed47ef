"""From a trained run to each user's rank and list: encode, score, rank, batch by batch, streaming.

The host packs the next batch while the devices work on this one. Results come in the order of the user index,
whatever the batches were.

N = places of a batch, D = dim of the scored space, R = physical rows of the catalogue, K = behaviours,
T = length of the lists, U = users.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float, Float32, Int8, Int32, Int64

from jaxrec.core.mixture_score import MixtureScore
from jaxrec.core.partition import sharding
from jaxrec.core.sparse_logits import SparseLogits
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.evaluation_batches import EvaluationBatch, EvaluationRows
from jaxrec.evaluation.full_ranking import FullRanking, Ranking

Computed = TypeVar("Computed")


class Run(Protocol):
    """A trained run, as the evaluation sees it; `jaxrec.runs.load_run` opens one.

    Ask it under `jax.set_mesh(run.mesh)`.
    """

    @property
    def config(self) -> Any:
        """The run's `TrainConfig`."""

    @property
    def score(self) -> MixtureScore | None:
        """How queries and v(y) are scored; None = by their product."""

    @property
    def dataset(self) -> PreparedDataset:
        """The prepared dataset that the run was trained on."""

    @property
    def mesh(self) -> Mesh:
        """The devices that hold the state."""

    @property
    def step(self) -> int:
        """Of the state that was loaded."""

    @property
    def history(self) -> Sequence[Mapping[str, float]]:
        """The lines of `metrics.jsonl`."""

    @property
    def appends_slot(self) -> bool:
        """Whether histories end with an empty slot, which the model fills (masked item)."""

    def query_fn(self, batch: EvaluationBatch) -> tuple[Float[jax.Array, "n d"], SparseLogits | None]:
        """The users' side of the score, W included, one row per place of the batch, and what is added to scores."""

    def catalogue(self) -> tuple[Float[jax.Array, "r d"], Float[jax.Array, " r"]]:
        """The item vectors and biases in physical row order, sharded over all axes of the mesh."""

    def text_queries(self, token_ids: Int32[np.ndarray, "q t"]) -> Float[jax.Array, "q d"]:
        """Unit vectors of texts that items are searched by, for runs that a task QueryItem trains."""

    def behaviour_logits(self, batch: EvaluationBatch) -> Float[np.ndarray, "n k"]:
        """Logits of the behaviours at the target event."""

    def values(self, batch: EvaluationBatch) -> Float[np.ndarray, " n"]:
        """The number beside the target event, as the model expects it."""


@dataclass(frozen=True, kw_only=True)
class UserRanks:
    """What is known of each user after ranking; NumPy, by user. U = targets, where a user has more than one.

    Attributes:
      ranks: 0 = the target came first; -1 = there was no target.
      top_item_ids: best first; 0 where fewer items were left.
    """

    user_indices: Int64[np.ndarray, " u"]
    targets: Int32[np.ndarray, " u"]
    ranks: Int32[np.ndarray, " u"]
    top_item_ids: Int32[np.ndarray, "u t"]
    top_scores: Float32[np.ndarray, "u t"]

    def __len__(self) -> int:
        return len(self.user_indices)

    def take(self, index: np.ndarray) -> "UserRanks":
        """The users at `index`, which may be a mask."""
        return UserRanks(**{name: values[index] for name, values in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Timing:
    """`seconds` of all batches, packing included; `compile_seconds` came before them."""

    num_users: int
    seconds: float
    compile_seconds: float

    @property
    def users_per_second(self) -> float:
        """Users ranked per second, after compilation."""
        return self.num_users / max(self.seconds, 1e-9)


def evaluation_rows(
    run: Run,
    split: str,
    *,
    rows_per_batch: int,
    user_indices: np.ndarray | None = None,
    every_event: bool = False,
    with_seen: bool | None = None,
) -> EvaluationRows:
    """The packed histories of `split`; a batch is rounded up to divide over the devices.

    Args:
      every_event: of the split is a target, not each user's first alone.
      with_seen: list what was seen; None = where the dataset filters it.
    """
    devices = run.mesh.size
    return EvaluationRows.make(
        run.dataset,
        split,
        rows_per_batch=-(-rows_per_batch // devices) * devices,
        history_length=run.config.data.history_length,
        user_indices=user_indices,
        append_slot=run.appends_slot,
        with_seen=with_seen,
        every_event=every_event,
    )


class UserRanker:
    """Ranks users of a run against its catalogue, which is cut into slices once; each against the user's own domain.

    Where items are of several kinds each target is ranked among those of its kind.

    Args:
      run: the trained run.
      top_k: length of the lists; 0 = ranks only.
      first_item: rank among the items from this id on.
      kind: list items of this one of the dataset's kinds, 1, 2, ...; 0 = of the kind of the target.

    Raises:
      ValueError: the model's item vectors are not finite.
    """

    def __init__(self, run: Run, *, top_k: int = 0, first_item: int = 1, kind: int = 0):
        self._run, self._kind = run, kind
        num_items = run.dataset.metadata.num_items
        self._ranking = FullRanking(
            mesh=run.mesh,
            num_items=num_items,
            first_item=first_item,
            top_k=min(top_k, num_items),
            score=run.score,
        )
        vectors, bias = run.catalogue()
        if not bool(_all_finite(vectors) & _all_finite(bias)):
            raise ValueError(_diverged("item", run.step))
        self._catalogue = self._ranking.catalogue(vectors, bias, run.dataset.item_groups)

    def rows(
        self,
        split: str,
        *,
        rows_per_batch: int,
        user_indices: np.ndarray | None = None,
        every_event: bool = False,
    ) -> EvaluationRows:
        """See `evaluation_rows`."""
        return evaluation_rows(
            self._run,
            split,
            rows_per_batch=rows_per_batch,
            user_indices=user_indices,
            every_event=every_event,
        )

    def batches(self, rows: EvaluationRows, *, keep_targets: bool = True) -> Iterator[UserRanks]:
        """The users of each batch, as the devices get done with them.

        Args:
          keep_targets: False forgets the targets, so that the lists leave out every seen item, as they would
            for a user whose future nobody knows.

        Raises:
          ValueError: the model's queries are not finite.
        """
        for batch, computed in _stream(rows, lambda batch: self._dispatch(batch, keep_targets)):
            yield self._read(batch, *computed)

    def rank(self, rows: EvaluationRows) -> tuple[UserRanks, Timing]:
        """All users of `rows`, in the order of the user index; the targets of a user in the order of time."""
        start = time.perf_counter()
        if rows.num_batches:  # compiles; the batch is ranked again below, inside the measured time
            first = rows.build(0, jax.process_index(), jax.process_count())
            jax.block_until_ready(self._dispatch(first, keep_targets=True))
        compiled = time.perf_counter()
        parts = list(self.batches(rows))
        timing = Timing(
            num_users=rows.num_users, seconds=time.perf_counter() - compiled, compile_seconds=compiled - start
        )
        width = self._ranking.top_k
        empty = UserRanks(
            user_indices=np.zeros(0, np.int64),
            targets=np.zeros(0, np.int32),
            ranks=np.zeros(0, np.int32),
            top_item_ids=np.zeros((0, width), np.int32),
            top_scores=np.zeros((0, width), np.float32),
        )
        parts = [empty, *parts]
        joined = UserRanks(
            **{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(empty)}
        )
        joined = joined.take(np.argsort(rows.order, kind="stable"))
        return joined.take(np.argsort(joined.user_indices, kind="stable")), timing

    def _dispatch(self, batch: EvaluationBatch, keep_targets: bool) -> tuple[Ranking, jax.Array]:
        queries, extra = self._run.query_fn(batch)
        targets = batch.targets if keep_targets else np.zeros_like(batch.targets)
        arguments = (_global(self._run.mesh, x) for x in (targets, batch.seen_users, batch.seen_items))
        groups, dataset = None, self._run.dataset
        if dataset.item_groups is not None:
            users, wanted = np.asarray(batch.user_indices), np.asarray(batch.targets)
            asked = dataset.asked_groups(users, wanted, self._kind)
            groups = _global(self._run.mesh, asked)
        found = self._ranking.rank(self._catalogue, queries, *arguments, extra=extra, query_domains=groups)
        return found, _row_finite(queries)

    def _read(self, batch: EvaluationBatch, ranking: Ranking, finite: jax.Array) -> UserRanks:
        users, targets = _gather(batch.user_indices), _gather(batch.targets)
        real = users >= 0
        if not np.all(_gather_device(finite)[real]):
            raise ValueError(_diverged("query", self._run.step))
        return UserRanks(
            user_indices=users.astype(np.int64),
            targets=targets,
            ranks=np.where(targets > 0, np.asarray(ranking.ranks), -1),
            top_item_ids=np.asarray(ranking.top_item_ids),
            top_scores=np.asarray(ranking.top_scores),
        ).take(real)


@dataclass(frozen=True, kw_only=True)
class BehaviourPredictions:
    """What the model said of the target events' behaviours, and what happened; NumPy, by user.

    U = target events, where a user has more than one. `context` is the events' own, or None where they have none.
    """

    user_indices: Int64[np.ndarray, " u"]
    targets: Int32[np.ndarray, " u"]
    logits: Float32[np.ndarray, "u k"]
    labels: Int8[np.ndarray, "u k"]
    context: Int32[np.ndarray, "u f"] | None = None


@dataclass(frozen=True, kw_only=True)
class ValuePredictions:
    """Of each target event, by user index: the number beside it, as the model expects it and as it is.

    Attributes:
      values: NaN = unknown.
    """

    user_indices: Int64[np.ndarray, " u"]
    targets: Int32[np.ndarray, " u"]
    predicted: Float32[np.ndarray, " u"]
    values: Float32[np.ndarray, " u"]


def predict_behaviours(run: Run, rows: EvaluationRows) -> BehaviourPredictions | None:
    """The behaviours of every target event; None where there is none.

    Raises:
      ValueError: a logit is not finite, or no task of the run learns behaviours.
    """
    found = _predict(run, rows, run.behaviour_logits, ("target_labels", "target_context"), "behaviour")
    if found is None:
        return None
    users, targets, logits, labels, *context = found
    return BehaviourPredictions(
        user_indices=users,
        targets=targets,
        logits=logits,
        labels=labels,
        context=context[0] if context else None,
    )


def predict_values(run: Run, rows: EvaluationRows) -> ValuePredictions | None:
    """The number beside every target event; None where there is none.

    Raises:
      ValueError: a prediction is not finite, or no task of the run learns values.
    """
    found = _predict(run, rows, run.values, ("target_values",), "value")
    if found is None:
        return None
    users, targets, predicted, values = found
    return ValuePredictions(user_indices=users, targets=targets, predicted=predicted, values=values)


def _predict(
    run: Run,
    rows: EvaluationRows,
    dispatch: Callable[[EvaluationBatch], np.ndarray],
    beside: Sequence[str],
    part: str,
) -> list[np.ndarray] | None:
    """Of every target event, by user index: user, item, what is predicted, and fields of the batch that are there."""
    columns: list[list[np.ndarray]] = []
    for batch, predicted in _stream(rows, dispatch):
        user_indices = _gather(batch.user_indices)
        known = [getattr(batch, name) for name in beside if getattr(batch, name) is not None]
        found = [user_indices.astype(np.int64), _gather(batch.targets), np.asarray(predicted, np.float32)]
        found += [_gather(column) for column in known]
        columns.append([column[user_indices >= 0] for column in found])
    if not columns:
        return None
    joined = [np.concatenate(parts) for parts in zip(*columns, strict=True)]
    if not np.isfinite(joined[2]).all():
        raise ValueError(_diverged(part, run.step))
    order = np.argsort(joined[0], kind="stable")
    return [column[order] for column in joined]


def _stream(
    rows: EvaluationRows, dispatch: Callable[[EvaluationBatch], Computed]
) -> Iterator[tuple[EvaluationBatch, Computed]]:
    """Each batch with what `dispatch` began on it; one is packed and one computed while one is read."""
    process = jax.process_index(), jax.process_count()
    under_way: deque[tuple[EvaluationBatch, Computed]] = deque()
    with ThreadPoolExecutor(max_workers=1) as pool:
        packing = deque(pool.submit(rows.build, index, *process) for index in range(min(2, rows.num_batches)))
        for index in range(rows.num_batches):
            batch = packing.popleft().result()
            if index + 2 < rows.num_batches:
                packing.append(pool.submit(rows.build, index + 2, *process))
            under_way.append((batch, dispatch(batch)))
            if len(under_way) > 1:
                yield under_way.popleft()
        yield from under_way


def _diverged(part: str, step: int) -> str:
    return (
        f"the model's {part} vectors at step {step} hold NaN or infinity; the run diverged: evaluate an older "
        "checkpoint, or train again with a lower learning rate."
    )


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


@jax.jit
def _row_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all(axis=1)


def _global(mesh: Mesh, x: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """The processes' shares as one array; with one process the share is the whole."""
    if jax.process_count() == 1:
        return x
    return jax.make_array_from_process_local_data(sharding(mesh, "batch"), np.asarray(x))


def _gather(x: jax.Array | np.ndarray) -> np.ndarray:
    """All processes' shares on every host, in the order of the processes."""
    return np.asarray(x if jax.process_count() == 1 else multihost_utils.process_allgather(x, tiled=True))


def _gather_device(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
