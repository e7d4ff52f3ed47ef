"""Evaluation batches: each user's history, packed, with its target and what the user has seen.

Several histories share a row, as in training; only the state at each one's last event is wanted, and
the batch says where that lies. For a model that fills in blanks the wanted state is the one of an empty
slot behind the last event. All batches have one shape, so an evaluation compiles once.

B = rows, L = positions of a row, S = places for users in a row, N = places for users in the batch,
M = places for seen pairs, K = behaviours, F = context columns. In a run of several processes all of these are
one process' share, while the numbers inside (`rows`, `seen_users`) count over the global batch.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int, Int8, Int32

from jaxrec.core.batch import Batch
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.packing import PackingPlan, Windows, pack, random_stream
from jaxrec.data.rows import fill_rows, row_segments, time_gap_buckets

__all__ = [
    "EvaluationBatch",
    "EvaluationRows",
    "asked_users",
    "evaluation_batches",
    "history_ends",
    "split_ends",
]

Array = jax.Array | np.ndarray

USER_MULTIPLE, SEEN_MULTIPLE = 64, 1024  # sizes are rounded up: they divide meshes, and runs share programs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationBatch:
    """Packed histories of up to N users, and what is asked about each.

    Attributes:
      batch: the histories, without the targets; an empty slot is a cell of the segment with item 0.
      last_positions: columns of the wanted states of a row's users, in the order of the row; 0 = padding.
      user_indices: the users, in the order of the rows; -1 = padding.
      rows: the row of each user's history in the global batch.
      columns: the column of each user's last event, or of the empty slot behind it.
      slots: where `last_positions[row]` holds that column.
      targets: the item to be ranked; 0 = none (or padding).
      target_labels: the labels of the target event; -1 = unknown (or padding).
      target_values: the number beside the target event; NaN = unknown (or padding).
      target_context: of the target event, which is known before its outcome; None = events have no context.
      target_gaps: bucket of the time from the history's last event to the target, as `Batch.time_gaps`; 0 = unknown.
      seen_users, seen_items: pairs: the user's place in the global batch (0 .. N * processes - 1) and
        an item of the user's history before the target, however long; padding is place 0, item 0.
    """

    batch: Batch
    last_positions: Int32[Array, "b s"]
    user_indices: Int32[Array, " n"]
    rows: Int32[Array, " n"]
    columns: Int32[Array, " n"]
    slots: Int32[Array, " n"]
    targets: Int32[Array, " n"]
    target_labels: Int8[Array, "n k"]
    target_values: Float32[Array, " n"]
    target_gaps: Int32[Array, " n"]
    seen_users: Int32[Array, " m"]
    seen_items: Int32[Array, " m"]
    target_context: Int32[Array, "n f"] | None = None

    @property
    def user_mask(self) -> Bool[Array, " n"]:
        """True = a real user."""
        return self.user_indices >= 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationRows:
    """The packed histories of an evaluation, dealt to batches; every size is known before any read."""

    dataset: PreparedDataset
    windows: Windows  # the latest events before each user's target
    has_target: Bool[np.ndarray, " u"]
    plan: PackingPlan
    batch_rows: Int[np.ndarray, "batches b"]
    append_slot: bool
    with_seen: bool
    num_without_history: int  # users that were asked for, but have no event before the target
    num_without_target: int  # users that were asked for, but have no event in the split

    @classmethod
    def make(
        cls,
        dataset: PreparedDataset,
        split: str,
        *,
        rows_per_batch: int,
        history_length: int,
        user_indices: Int[np.ndarray, " u"] | None = None,
        append_slot: bool = False,
        with_seen: bool | None = None,
        every_event: bool = False,
    ) -> "EvaluationRows":
        """Packs the histories before the targets of `split`.

        `"validation"` and `"test"`: the target is the user's first event of that part, the history is
        all before it. `"train"` and `"all"`: the history is the training part, or everything, and there
        is no target. `append_slot` ends
        each history with an empty slot, which takes one of the `history_length` places. `with_seen`
        lists the seen items; by default as the dataset's `filter_seen` says. `every_event` takes each event
        of the part as a target of its own, after all before it: a user then comes as often.

        Raises:
            ValueError: an unknown split, or sizes out of range.
        """
        users = np.arange(len(dataset.lengths)) if user_indices is None else np.asarray(user_indices)
        if len(users) and (users.min() < 0 or users.max() >= len(dataset.lengths)):
            raise ValueError(
                f"user index {users.min() if users.min() < 0 else users.max()} is not one of the "
                f"dataset's 0 .. {len(dataset.lengths) - 1}."
            )
        max_events = history_length - append_slot
        if rows_per_batch < 1 or max_events < 1:
            raise ValueError(
                f"rows_per_batch={rows_per_batch} and history_length={history_length} must be at least 1, "
                "and a history that ends with an empty slot at least 2."
            )
        ends, stops = (cut[users] for cut in history_ends(dataset, split))
        if every_event:
            counts = stops - ends
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            users, ends, stops = (np.repeat(values, counts) for values in (users, ends, stops))
            ends = ends + within
        has_target = stops > ends
        asks_nothing = split in ("train", "all")
        kept = (ends > 0) & (has_target | asks_nothing)
        windows = Windows(
            users=users[kept],
            starts=np.maximum(ends - max_events, 0)[kept],
            lengths=np.minimum(ends, max_events)[kept],
        )
        # Three times the mean keeps a row's places few at almost no loss of fill.
        cells = windows.lengths + append_slot
        mean = cells.mean() if len(cells) else 1.0
        places = min(max(4, int(np.ceil(3 * history_length / mean))), history_length)
        plan = pack(cells, history_length, max_segments=places)
        return cls(
            dataset=dataset,
            windows=windows,
            has_target=has_target[kept],
            plan=plan,
            batch_rows=_deal(plan, ends[kept], rows_per_batch),
            append_slot=append_slot,
            with_seen=dataset.metadata.filter_seen if with_seen is None else with_seen,
            num_without_history=int(np.count_nonzero((ends == 0) & (has_target | asks_nothing))),
            num_without_target=0 if asks_nothing else int(np.count_nonzero(~has_target)),
        )

    @property
    def num_users(self) -> int:
        return len(self.windows)

    @property
    def num_batches(self) -> int:
        return len(self.batch_rows)

    @functools.cached_property
    def order(self) -> Int[np.ndarray, " n"]:
        """The windows in the order in which the batches hold them, whatever the number of processes."""
        parts = [row_segments(self._padded_plan, rows)[0] for rows in self.batch_rows]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def sizes(self, process_count: int = 1) -> tuple[int, int]:
        """N and M: places for users and for seen pairs in a process' share of every batch.

        Raises:
            ValueError: the processes do not divide the rows of a batch.
        """
        rows_per_batch = self.batch_rows.shape[1]
        if rows_per_batch % process_count:
            raise ValueError(
                f"rows_per_batch={rows_per_batch} is not a multiple of the {process_count} processes; "
                f"make it {-(-rows_per_batch // process_count) * process_count}."
            )
        if process_count not in self._sizes:
            shares = self.batch_rows.reshape(-1, process_count, rows_per_batch // process_count)
            num_users = np.diff(self._padded_plan.row_offsets)[shares].sum(axis=-1)
            ends = self.windows.starts + self.windows.lengths
            num_seen = _seen_of_rows(self._padded_plan, ends)[shares].sum(axis=-1) * self.with_seen
            self._sizes[process_count] = (
                _round_up(int(num_users.max(initial=1)), USER_MULTIPLE),
                _round_up(int(num_seen.max(initial=0)), SEEN_MULTIPLE),
            )
        return self._sizes[process_count]

    @functools.cached_property
    def _sizes(self) -> dict[int, tuple[int, int]]:
        """`sizes` by the number of processes: they take a pass over all rows."""
        return {}

    @functools.cached_property
    def _padded_plan(self) -> PackingPlan:
        """The plan with an empty row at its end: it fills up the last batches."""
        ends = self.plan.row_offsets
        return dataclasses.replace(self.plan, row_offsets=np.append(ends, ends[-1]))

    def build(self, index: int, process_index: int = 0, process_count: int = 1) -> EvaluationBatch:
        """Process `process_index`'s share of batch `index`."""
        num_places, num_seen = self.sizes(process_count)
        block = self.batch_rows.shape[1] // process_count
        rows = self.batch_rows[index, process_index * block : (process_index + 1) * block]
        length = self.plan.row_length
        segments, cells, numbers = row_segments(self._padded_plan, rows)

        windows, has_target = self.windows.take(segments), self.has_target[segments]
        ends = windows.starts + windows.lengths
        histories = self.dataset.windows(
            Windows(users=windows.users, starts=np.zeros_like(ends), lengths=ends + has_target)
        )
        order = np.arange(len(segments))
        last_cells = cells + windows.lengths - 1 + self.append_slot
        last_positions = np.zeros((block, max(self.plan.max_segments, 1)), np.int32)
        last_positions[last_cells // length, numbers - 1] = last_cells % length

        target_at = np.where(has_target, histories.offsets[1:] - 1, 0)
        labels = np.where(has_target[:, None], histories.labels[target_at], -1).astype(np.int8)
        is_first = np.zeros(len(histories.item_ids), bool)
        is_first[histories.offsets[:-1]] = True
        gaps = time_gap_buckets(histories.timestamps, is_first)[target_at]
        values = np.where(has_target, histories.values[target_at], np.float32(np.nan))
        seen_ends = ends if self.with_seen else np.zeros_like(ends)
        seen_users = np.repeat(order, seen_ends) + process_index * num_places
        seen_items = histories.take(order, np.zeros_like(ends), seen_ends).item_ids

        def places(values: np.ndarray, padding: float = 0, size: int = num_places) -> np.ndarray:
            widths = [(0, size - len(values))] + [(0, 0)] * (values.ndim - 1)
            if values.dtype == np.int64:
                values = values.astype(np.int32)
            return np.pad(values, widths, constant_values=padding)

        context = None
        if histories.context is not None:
            context = places(np.where(has_target[:, None], histories.context[target_at], 0))
        events = histories.take(order, windows.starts, windows.lengths)
        domains = None
        if self.dataset.metadata.has_domains:
            domains = self.dataset.user_domains[windows.users]
        batch = fill_rows(events, cells, numbers, windows.users, (block, length), domains)
        if self.append_slot:
            if batch.domain_ids is not None:
                batch.domain_ids.reshape(-1)[last_cells] = domains
            batch.user_ids.reshape(-1)[last_cells] = windows.users + 1
            batch.segment_ids.reshape(-1)[last_cells] = numbers
            batch.positions.reshape(-1)[last_cells] = windows.lengths
        return EvaluationBatch(
            batch=batch,
            last_positions=last_positions,
            user_indices=places(windows.users, -1),
            rows=places(last_cells // length + process_index * block),
            columns=places(last_cells % length),
            slots=places(numbers - 1),
            targets=places(np.where(has_target, histories.item_ids[target_at], 0)),
            target_labels=places(labels, -1),
            target_values=places(values, np.nan),
            target_gaps=places(np.where(has_target, gaps, 0)),
            seen_users=places(seen_users, size=num_seen),
            seen_items=places(seen_items, size=num_seen),
            target_context=context,
        )


def evaluation_batches(
    dataset: PreparedDataset,
    split: str,
    *,
    rows_per_batch: int,
    history_length: int,
    user_indices: Int[np.ndarray, " u"] | None = None,
    append_slot: bool = False,
    with_seen: bool | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[EvaluationBatch]:
    """Every user of `split` once, in batches of one shape; see `EvaluationRows.make`."""
    rows = EvaluationRows.make(
        dataset,
        split,
        rows_per_batch=rows_per_batch,
        history_length=history_length,
        user_indices=user_indices,
        append_slot=append_slot,
        with_seen=with_seen,
    )
    for index in range(rows.num_batches):
        yield rows.build(index, process_index, process_count)


def split_ends(dataset: PreparedDataset, split: str) -> tuple[Int[np.ndarray, " u"], Int[np.ndarray, " u"]]:
    """Where the part of each user's history begins and ends.

    Raises:
      ValueError: the split is unknown.
    """
    if split == "validation":
        return dataset.train_end, dataset.validation_end
    if split == "test":
        return dataset.validation_end, dataset.lengths
    raise ValueError(f'split={split!r} is unknown; say "validation" or "test".')


def asked_users(dataset: PreparedDataset, split: str) -> Int[np.ndarray, " a"]:
    """The users with a target in the part and a history before it, ascending.

    Raises:
      ValueError: the split is unknown.
    """
    begins, ends = split_ends(dataset, split)
    return np.flatnonzero((begins > 0) & (ends > begins))


def history_ends(dataset: PreparedDataset, split: str) -> tuple[Int[np.ndarray, " u"], Int[np.ndarray, " u"]]:
    """Where each user's history ends, and the part that holds the target; "train" and "all" hold none.

    Raises:
      ValueError: the split is unknown.
    """
    if split == "all":
        return dataset.lengths, dataset.lengths
    if split == "train":
        return dataset.train_end, dataset.train_end
    if split not in ("validation", "test"):
        raise ValueError(f'split={split!r} is unknown; say "train", "validation", "test" or "all".')
    return split_ends(dataset, split)


def _seen_of_rows(plan: PackingPlan, ends: Int[np.ndarray, " s"]) -> Int[np.ndarray, " r"]:
    """How many seen pairs the users of each row have."""
    return np.bincount(plan.row_index, weights=ends[plan.segments], minlength=plan.num_rows).astype(np.int64)


def _deal(
    plan: PackingPlan, ends: Int[np.ndarray, " s"], rows_per_batch: int
) -> Int[np.ndarray, "batches b"]:
    """Deals the rows to batches like cards, so that no batch holds many more users than another.

    Inside a batch the rows are mixed, so that no process' block does either. Row `num_rows` is empty.
    """
    order = np.lexsort((-_seen_of_rows(plan, ends), -np.diff(plan.row_offsets)))
    num_batches = -(-len(order) // rows_per_batch)
    order = np.append(order, np.full(num_batches * rows_per_batch - len(order), plan.num_rows))
    dealt = order.reshape(rows_per_batch, num_batches).T
    mixed = random_stream(rows_per_batch, 0).permutation(rows_per_batch)
    return dealt[:, mixed]


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
