"""The second pass: buckets become sorted histories, cut by the split, and are merged in the order of the users.

Letters: E events of a bucket, U users of a bucket, K behaviours.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, Int64

from jaxrec.data.columns import ABSENT
from jaxrec.data.config import GlobalTime, LeaveOneOut
from jaxrec.data.ingest import Ingested
from jaxrec.data.quarantine import Quarantine
from jaxrec.data.split import global_time_cuts, leave_one_out_cuts, streaming_quantiles
from jaxrec.data.spool import UNKNOWN, history_order

__all__ = ["Sorted", "cut_histories", "merged_users", "sort_buckets"]

_EVENTS_AT_ONCE = 1 << 18
Progress = Callable[[int], None]


@dataclass
class Sorted:
    """Sorted histories on disk, and what is known of each user, by user index (rank of the user's id)."""

    state: Ingested
    dtype: np.dtype
    user_rank: Int64[np.ndarray, " u"]
    lengths: Int64[np.ndarray, " u"]
    train_end: Int64[np.ndarray, " u"] = field(default_factory=lambda: np.zeros(0, np.int64))
    validation_end: Int64[np.ndarray, " u"] = field(default_factory=lambda: np.zeros(0, np.int64))
    item_counts: Int64[np.ndarray, " v"] = field(default_factory=lambda: np.zeros(0, np.int64))
    # Of the training part's values: count, sum, sum of squares.
    value_sums: tuple[float, float, float] = (0.0, 0.0, 0.0)
    cut_times: tuple[int, ...] = ()
    duplicates: int = 0
    dropped: int = 0
    repeats: int = 0
    against_time: int = 0
    positives: dict[str, int] = field(default_factory=dict)
    unknown_labels: dict[str, int] = field(default_factory=dict)
    cold_items: int = 0
    removed: int = 0
    falsified: int = 0

    def users_of(self, bucket: int) -> Int64[np.ndarray, " u"]:
        """The user indices of a bucket, ascending: the order in which its file holds them."""
        codes = np.arange(bucket, len(self.user_rank), self.state.spool.num_buckets)
        return np.sort(self.user_rank[codes])


def sort_buckets(
    state: Ingested, use_times: bool, drop_duplicates: bool, quarantine: Quarantine, progress: Progress
) -> Sorted:
    """Sort each bucket by user and place in the history, and count what the report tells."""
    _, rank = state.users.ranked()
    names, name_rank = state.names.ranked() if len(state.names) else ([], np.zeros(0, np.int64))
    behaviours = (*state.behaviours, *[str(name) for name in names])
    if len(set(behaviours)) != len(behaviours):
        raise ValueError(
            f"the behaviours {', '.join(behaviours)} are not distinct; set --data.columns.value.name to another name."
        )
    context = (len(state.columns.context),)
    dtype = np.dtype(
        [
            ("item", "<i4"),
            ("seconds", "<i8"),
            ("labels", "i1", (len(behaviours),)),
            ("value", "<f4"),
            ("context", "<i4", context),
        ]
    )
    result = Sorted(state, dtype, rank, np.zeros(len(rank), np.int64))
    result.positives = dict.fromkeys(behaviours, 0)
    result.unknown_labels = dict.fromkeys(behaviours, 0)
    done = 0
    for bucket in range(state.spool.num_buckets):
        records = state.spool.bucket(bucket)
        done += len(records)
        records = _sorted_records(records, rank, state)
        records = _duplicates(records, drop_duplicates, result, quarantine)
        _count(records, rank, result)
        out = np.zeros(len(records), dtype)
        out["item"] = records["item"]
        out["context"] = records["context"]
        out["seconds"] = _seconds(records, state) if use_times else UNKNOWN
        out["labels"] = _labels(records, len(state.behaviours), name_rank)
        out["value"] = _values(records)
        for column, name in enumerate(behaviours):
            result.positives[name] += int((out["labels"][:, column] == 1).sum())
            result.unknown_labels[name] += int((out["labels"][:, column] == -1).sum())
        state.spool.replace(bucket, out)
        progress(done)
    return result


def _sorted_records(records: np.ndarray, rank: Int64[np.ndarray, " u"], state: Ingested) -> np.ndarray:
    fields = records.dtype.names or ()
    time = records["time"] if "time" in fields else None
    order = records["order"] if "order" in fields else None
    return records[history_order(rank[records["user"]], time, order)]


def _duplicates(records: np.ndarray, drop: bool, result: Sorted, quarantine: Quarantine) -> np.ndarray:
    """Rows equal in all columns: counted, and set aside when the config says so (the first one stays)."""
    _, first = np.unique(records["hash"], return_index=True)
    copies = len(records) - len(first)
    result.duplicates += copies
    if not drop or not copies:
        return records
    result.dropped += copies
    keep = np.zeros(len(records), bool)
    keep[first] = True
    users, items = result.state.users.keys_by_code(), result.state.items.keys_by_code()
    for record in records[~keep]:
        content = {"user": users[int(record["user"])], "item": items[int(record["item"])]}
        quarantine.add("events:duplicates", -1, "exact duplicate of another row", content)
    return records[keep]


def _count(records: np.ndarray, rank: Int64[np.ndarray, " u"], result: Sorted) -> None:
    users = rank[records["user"]]
    result.lengths += np.bincount(users, minlength=len(rank))
    pairs = users.astype(np.int64) * len(result.state.items) + records["item"]
    result.repeats += len(records) - len(np.unique(pairs))
    columns = result.state.columns
    if columns.order != ABSENT and columns.timestamp != ABSENT:
        known = records["time"] != UNKNOWN
        times, owners = records["time"][known], users[known]
        result.against_time += int(((times[1:] < times[:-1]) & (owners[1:] == owners[:-1])).sum())


def _seconds(records: np.ndarray, state: Ingested) -> Int64[np.ndarray, " e"]:
    if "time" not in (records.dtype.names or ()):
        return np.full(len(records), UNKNOWN)
    return np.where(records["time"] == UNKNOWN, UNKNOWN, records["time"] // state.ticks_per_second)


def _labels(records: np.ndarray, num_direct: int, name_rank: Int64[np.ndarray, " v"]) -> np.ndarray:
    """Direct labels, then one column per named behaviour: 1 for the event's own, 0 for the others, -1 if unnamed."""
    labels = np.zeros((len(records), num_direct + len(name_rank)), np.int8)
    labels[:, :num_direct] = records["labels"]
    if len(name_rank):
        codes = records["behaviour"]
        column = np.append(name_rank, -1)[codes]
        named = column[:, None] == np.arange(len(name_rank))
        labels[:, num_direct:] = np.where(codes[:, None] < 0, -1, named)
    return labels


def _values(records: np.ndarray) -> Float32[np.ndarray, " e"]:
    """The number beside each event; NaN where there is none that float32 can hold."""
    if "value" not in (records.dtype.names or ()):
        return np.full(len(records), np.nan, np.float32)
    return np.where(np.isfinite(records["value"]), records["value"], np.float32(np.nan))


def cut_histories(histories: Sorted, split: LeaveOneOut | GlobalTime) -> None:
    """Fill the cut points of every user and the training count of every item.

    Raises:
      ValueError: the cut times leave nothing to train on, or nothing to test.
    """
    state, lengths = histories.state, histories.lengths
    if isinstance(split, LeaveOneOut):
        cuts = leave_one_out_cuts(lengths, split.min_events, validation=split.validation)
        histories.train_end, histories.validation_end = cuts
    else:
        quantiles = (split.validation_quantile, split.test_quantile)
        histories.cut_times = split.moments or streaming_quantiles(lambda: _times(histories), quantiles)
        histories.train_end, histories.validation_end = np.zeros_like(lengths), np.zeros_like(lengths)
    histories.item_counts, sums = np.zeros(len(state.items), np.int64), np.zeros(3)
    for bucket in range(state.spool.num_buckets):
        records = state.spool.reader(bucket, histories.dtype).take(-1)
        users = histories.users_of(bucket)
        offsets = np.append(0, np.cumsum(lengths[users]))
        if histories.cut_times:
            cuts = global_time_cuts(offsets, records["seconds"], *histories.cut_times)
            histories.train_end[users], histories.validation_end[users] = cuts
        place = np.arange(len(records)) - np.repeat(offsets[:-1], lengths[users])
        in_training = place < np.repeat(histories.train_end[users], lengths[users])
        histories.item_counts += np.bincount(records["item"][in_training], minlength=len(state.items))
        values = records["value"][in_training].astype(np.float64)
        values = values[~np.isnan(values)]
        sums += len(values), values.sum(), (values**2).sum()
    histories.value_sums = (float(sums[0]), float(sums[1]), float(sums[2]))
    if histories.cut_times and (not histories.train_end.any() or (histories.validation_end == lengths).all()):
        raise ValueError(
            f"the cut times {histories.cut_times} (of {split}) leave "
            f"{int(histories.train_end.sum())} training and {int((lengths - histories.validation_end).sum())} test "
            "events: too many events bear the same time, or lie on one side. Choose other quantiles or moments, or "
            "data.split=LeaveOneOut."
        )


def _times(histories: Sorted) -> Iterator[np.ndarray]:
    for bucket in range(histories.state.spool.num_buckets):
        for chunk in histories.state.spool.chunks(bucket, histories.dtype):
            yield chunk["seconds"]


def merged_users(histories: Sorted) -> Iterator[tuple[Int64[np.ndarray, " n_plus_1"], np.ndarray]]:
    """`(offsets, records)` of consecutive users in index order, some 262,144 events at a time.

    Every bucket holds its users in the same ascending order, so each is read front to back, once.
    """
    spool, lengths = histories.state.spool, histories.lengths
    bucket_of = np.zeros(len(lengths), np.int64)
    bucket_of[histories.user_rank] = np.arange(len(lengths)) % spool.num_buckets
    readers = [spool.reader(bucket, histories.dtype) for bucket in range(spool.num_buckets)]
    ends, start = np.cumsum(lengths), 0
    while start < len(lengths):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _EVENTS_AT_ONCE, side="right")))
        sizes, buckets = lengths[start:stop], bucket_of[start:stop]
        offsets = np.append(0, np.cumsum(sizes))
        records = np.zeros(int(offsets[-1]), histories.dtype)
        owner = np.repeat(buckets, sizes)
        for bucket in np.unique(buckets).tolist():
            records[owner == bucket] = readers[bucket].take(int(sizes[buckets == bucket].sum()))
        yield offsets, records
        start = stop
