"""The order of training: batch `k` is a pure function of (dataset, seed, k).

Rows are packed once; each epoch is a seeded permutation of them; position `p = k * B + j` of the endless
stream is row `permutation(p div R)[p mod R]`. Where there are several domains each has rows and epochs of its
own, and `data.mixing` says whose row comes next. Processes take contiguous blocks of a batch, so their
number changes no example, and a resumed run asks for batch `k` and has it: no iterator is saved.

B = packed rows of the global batch, L = positions of a row, K = behaviours, R = rows of the plan.
"""

import dataclasses
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Int64

from jaxrec.core.batch import Batch
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.mixing import Mixing
from jaxrec.data.packing import (
    PackingPlan,
    Windows,
    joined_plans,
    joined_windows,
    new_windows,
    pack,
    random_stream,
    training_windows,
)
from jaxrec.data.rows import fill_rows, row_segments
from jaxrec.data.tensorflow_import import import_tensorflow

__all__ = [
    "BatchStream",
    "TrainingRows",
    "build_batch",
    "stream_batches",
    "train_batches",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRows:
    """The packed rows of a dataset's training part, and the order in which epochs visit them."""

    dataset: PreparedDataset
    windows: Windows
    plan: PackingPlan
    mixing: Mixing

    @classmethod
    def make(
        cls,
        dataset: PreparedDataset,
        *,
        history_length: int,
        windows: str = "last",
        user_share: float = 1.0,
        train_since: int | None = None,
        replay_share: float = 0.0,
        domain_temperature: float = 1.0,
        seed: int = 0,
    ) -> "TrainingRows":
        """Packs the dataset's training events, or those of a share of its users; no row holds two domains.

        The users are the same for every `seed`, and those of a smaller share are among those of a larger one.
        `train_since` (seconds) leaves out histories without a training event from then on; a `replay_share` of the rows
        are histories as they were before. `domain_temperature` mixes the domains; see `Mixing.make`.

        Raises:
            ValueError: no user has a training event, or a setting is out of range.
        """
        ends, share = dataset.train_end, "in "
        if user_share < 1.0:
            chosen = random_stream(0, 0).permutation(len(ends))[: round(user_share * len(ends))]
            ends, share = (
                np.where(np.isin(np.arange(len(ends)), chosen), ends, 0),
                f"in {user_share:g} of its ",
            )
        if train_since is None:
            parts = [training_windows(ends, history_length, windows)]
        else:
            before = np.minimum(dataset.events_before(train_since), ends)
            parts = [new_windows(ends, before, history_length)]
            if replay_share:
                parts.append(training_windows(before, history_length, windows))
            share = f"from data.train_since={train_since} on {share}"
        if not len(parts[0]):
            raise ValueError(
                f"dataset {dataset.metadata.name!r} has no training event {share}"
                f"{dataset.metadata.num_users} users; prepare it with an earlier split or more data."
            )
        stretches = joined_windows(parts)
        part_of = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        mixing, plans = None, []
        for part in range(len(parts)):
            of_part = [
                pack(np.where(own & (part_of == part), stretches.lengths, 0), history_length, seed)
                for own in _by_domain(dataset, stretches.users)
            ]
            of_part = [plan for plan in of_part if plan.num_rows]
            if not of_part:
                continue  # nothing is older
            sizes = np.array([plan.num_rows for plan in of_part])
            rows = Mixing.make(sizes, domain_temperature, seed)
            mixing = rows if mixing is None else mixing.followed_by(rows, replay_share)
            plans += of_part
        assert mixing is not None, "there is a training event"
        return cls(dataset=dataset, windows=stretches, plan=joined_plans(plans), mixing=mixing)

    @property
    def num_rows(self) -> int:
        return self.plan.num_rows

    def rows_at(self, positions: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The rows at these positions of the endless stream."""
        return self.mixing.rows_at(positions)


def _by_domain(dataset: PreparedDataset, users: Int[np.ndarray, " s"]) -> list[Bool[np.ndarray, " s"]]:
    """Which of these users are of each domain; all of them where there is one."""
    if not dataset.metadata.has_domains:
        return [np.ones(len(users), bool)]
    return [dataset.user_domains[users] == number + 1 for number in range(len(dataset.metadata.domains))]


def build_batch(
    rows: TrainingRows, step: int, *, global_batch_size: int, process_index: int = 0, process_count: int = 1
) -> Batch:
    """Process `process_index`'s block of the global batch of `step`.

    Raises:
        ValueError: the processes do not divide the batch.
    """
    block = _rows_per_process(global_batch_size, process_index, process_count)
    first = step * global_batch_size + process_index * block
    chosen = rows.rows_at(np.arange(first, first + block))
    segments, cells, numbers = row_segments(rows.plan, chosen)
    windows = rows.windows.take(segments)
    events = rows.dataset.windows(windows)
    domains = rows.dataset.user_domains[windows.users] if rows.dataset.metadata.has_domains else None
    return fill_rows(events, cells, numbers, windows.users, (block, rows.plan.row_length), domains)


def _rows_per_process(global_batch_size: int, process_index: int, process_count: int) -> int:
    if global_batch_size < 1 or global_batch_size % process_count:
        raise ValueError(
            f"global_batch_size={global_batch_size} is not a multiple of the {process_count} processes; "
            f"make it {max(-(-global_batch_size // process_count), 1) * process_count}."
        )
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index={process_index} is not one of the {process_count} processes' 0, 1, ..."
        )
    return global_batch_size // process_count


def train_batches(
    dataset: PreparedDataset,
    *,
    global_batch_size: int,
    history_length: int,
    windows: str = "last",
    user_share: float = 1.0,
    train_since: int | None = None,
    replay_share: float = 0.0,
    domain_temperature: float = 1.0,
    seed: int = 0,
    start_step: int = 0,
    stop_step: int,
    process_index: int = 0,
    process_count: int = 1,
) -> "BatchStream":
    """The batches of steps `start_step .. stop_step - 1`, built ahead of time by tf.data."""
    rows = TrainingRows.make(
        dataset,
        history_length=history_length,
        windows=windows,
        user_share=user_share,
        train_since=train_since,
        replay_share=replay_share,
        domain_temperature=domain_temperature,
        seed=seed,
    )
    return stream_batches(
        rows,
        global_batch_size=global_batch_size,
        start_step=start_step,
        stop_step=stop_step,
        process_index=process_index,
        process_count=process_count,
    )


def stream_batches(
    rows: TrainingRows,
    *,
    global_batch_size: int,
    start_step: int = 0,
    stop_step: int,
    process_index: int = 0,
    process_count: int = 1,
) -> "BatchStream":
    """`train_batches` over rows that are packed already.

    Raises:
        ValueError: the processes do not divide the batch.
    """
    _rows_per_process(global_batch_size, process_index, process_count)  # at once: not from inside tf.data
    tf = import_tensorflow()
    names = [field.name for field in dataclasses.fields(Batch)]
    if not rows.dataset.metadata.context:
        names.remove("context")
    if not rows.dataset.metadata.has_domains:
        names.remove("domain_ids")
    dtypes = [{"labels": tf.int8, "values": tf.float32}.get(name, tf.int32) for name in names]

    def arrays(step: np.int64) -> list[np.ndarray]:
        batch = build_batch(
            rows,
            int(step),
            global_batch_size=global_batch_size,
            process_index=process_index,
            process_count=process_count,
        )
        return [getattr(batch, name) for name in names]

    stream = tf.data.Dataset.range(start_step, stop_step).map(
        tf.autograph.experimental.do_not_convert(lambda step: tf.numpy_function(arrays, [step], dtypes)),
        num_parallel_calls=2,  # one batch is read while another is laid out
        deterministic=True,
    )
    return BatchStream(stream.prefetch(4), names)


class BatchStream(Iterator[Batch]):
    """Batches that are read ahead, until the last one or `close`.

    The threads that read ahead run Python. One that still does when the interpreter ends waits for its
    lock for ever, and the process with it: so reading ends before that, whatever ends the run.
    """

    def __init__(self, dataset: Any, names: Sequence[str]):
        self._names = names
        self._reader = [dataset.as_numpy_iterator()]
        # Called at the latest when Python exits; to drop the reader stops and joins its threads.
        self.close = weakref.finalize(self, self._reader.clear)

    def __next__(self) -> Batch:
        if not self._reader:
            raise StopIteration
        try:
            values = next(self._reader[0])
        except BaseException as error:
            self.close()
            raise error.with_traceback(None)  # noqa: B904  its frames would keep the reader alive
        return Batch(**dict(zip(self._names, values, strict=True)))
