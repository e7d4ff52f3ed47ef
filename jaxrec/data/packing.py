"""Which histories share a row: packing plans from lengths alone.

A row holds `L` positions. Padding every history to `L` wastes most of them (half of ML-1M, nine tenths
of a shop's sessions), so several windows of histories lie one after the other in a row. The plan is
made once, from lengths and a seed; no event is read for it.

S = windows to pack, R = rows, L = positions of a row.

Source: Krell et al., 2021 (packing of sequences without cross-contamination; idea). Theirs works on a
histogram of lengths; ours is best-fit decreasing over open rows, indexed by the space they have left.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

__all__ = [
    "PackingPlan",
    "Windows",
    "joined_plans",
    "joined_windows",
    "new_windows",
    "pack",
    "random_stream",
    "training_windows",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
    """Stretches of histories: window `s` is `history(users[s])[starts[s] : starts[s] + lengths[s]]`."""

    users: Int[np.ndarray, " s"]
    starts: Int[np.ndarray, " s"]
    lengths: Int[np.ndarray, " s"]

    def __len__(self) -> int:
        return len(self.users)

    def take(self, indices: Int[np.ndarray, " n"]) -> "Windows":
        """The windows at `indices`, in that order."""
        return Windows(users=self.users[indices], starts=self.starts[indices], lengths=self.lengths[indices])


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackingPlan:
    """Rows of windows: row `r` holds `segments[row_offsets[r] : row_offsets[r + 1]]`, left to right.

    `segments` are indices into the lengths that were packed; `columns` is where each begins in its row.
    """

    row_length: int
    row_offsets: Int[np.ndarray, " r_plus_1"]
    segments: Int[np.ndarray, " s"]
    columns: Int[np.ndarray, " s"]
    num_events: int

    @property
    def num_rows(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def row_index(self) -> Int[np.ndarray, " s"]:
        """The row of each entry of `segments`."""
        return np.repeat(np.arange(self.num_rows), np.diff(self.row_offsets))

    @property
    def max_segments(self) -> int:
        """The most segments that any row holds."""
        return int(np.diff(self.row_offsets).max(initial=0))

    @property
    def fill_fraction(self) -> float:
        """Positions that hold an event, of all positions."""
        return self.num_events / max(self.num_rows * self.row_length, 1)


def training_windows(train_end: Int[np.ndarray, " u"], history_length: int, windows: str = "last") -> Windows:
    """The stretches of each user's training part that are learnt from.

    `"last"`: the latest `history_length` events of each user. `"all"`: every event, in consecutive
    chunks counted from the end, so that the latest chunk is full and the oldest takes the remainder.
    A chunk of one event stays: a next-item task finds no pair in it, a masked-item task learns from it,
    and so no event is lost. The pair across a border of two chunks is nobody's target.

    Raises:
        ValueError: `windows` is neither of the two, or `history_length` is not positive.
    """
    if history_length < 1:
        raise ValueError(f"history_length={history_length} must be at least 1 event.")
    ends = np.asarray(train_end, np.int64)
    users = np.flatnonzero(ends > 0)
    ends = ends[users]
    if windows == "last":
        starts = np.maximum(ends - history_length, 0)
    elif windows == "all":
        chunks = -(-ends // history_length)
        users = np.repeat(users, chunks)
        newest_first = np.arange(len(users)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
        ends = np.repeat(ends, chunks) - newest_first * history_length
        starts = np.maximum(ends - history_length, 0)
    else:
        raise ValueError(f'windows={windows!r} is unknown; say "last" or "all".')
    return Windows(users=users, starts=starts, lengths=ends - starts)


def new_windows(
    train_end: Int[np.ndarray, " u"], before: Int[np.ndarray, " u"], history_length: int
) -> Windows:
    """The stretches of each user's training part that hold an event after the first `before`.

    Every such event is in one of them: consecutive chunks of `history_length` events counted from the end, of which the
    oldest reaches back into what was there before.
    """
    chunks = training_windows(train_end, history_length, "all")
    return chunks.take(np.flatnonzero(chunks.starts + chunks.lengths > before[chunks.users]))


def joined_windows(parts: Sequence[Windows]) -> Windows:
    """The windows of all parts, one part after another."""
    fields = ("users", "starts", "lengths")
    return Windows(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in fields})


def pack(
    lengths: Int[np.ndarray, " s"], row_length: int, seed: int = 0, *, max_segments: int | None = None
) -> PackingPlan:
    """Lays windows of the given `lengths` into rows of `row_length` positions.

    Longest first, each into the open row that it fills best. The seed decides which of the equally long
    windows share a row. A window of length 0 gets no place. `max_segments` bounds the windows of a row.

    Raises:
        ValueError: a length is negative or above `row_length`, or a bound is not positive.
    """
    lengths = np.asarray(lengths, np.int64)
    if row_length < 1:
        raise ValueError(f"row_length={row_length} must be at least 1 position.")
    if max_segments is not None and max_segments < 1:
        raise ValueError(f"max_segments={max_segments} must be at least 1 window a row.")
    if len(lengths) and (lengths.min() < 0 or lengths.max() > row_length):
        worst = int(np.argmax(np.where(lengths < 0, row_length + 1, lengths)))
        raise ValueError(
            f"window {worst} has {lengths[worst]} events, but a row holds 0 to {row_length}; cut it first."
        )
    order = random_stream(seed, 0).permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    order = order[: np.count_nonzero(lengths)]
    ordered = lengths[order]
    rows, num_rows = _best_fit_rows(ordered, row_length, max_segments or row_length)

    by_row = np.argsort(rows, kind="stable")
    segments, rows, ordered = order[by_row], rows[by_row], ordered[by_row]
    row_offsets = np.searchsorted(rows, np.arange(num_rows + 1))
    before = np.cumsum(ordered) - ordered
    columns = before - before[row_offsets[:-1]][rows] if num_rows else before
    return PackingPlan(
        row_length=row_length, row_offsets=row_offsets, segments=segments, columns=columns,
        num_events=int(ordered.sum()),
    )  # fmt: skip


def joined_plans(plans: Sequence[PackingPlan]) -> PackingPlan:
    """The rows of all plans, one plan after another; they are of the same lengths and rows."""
    if len(plans) == 1:
        return plans[0]
    before = np.cumsum([0, *(len(plan.segments) for plan in plans[:-1])])
    starts = [plan.row_offsets[:-1] + first for plan, first in zip(plans, before, strict=True)]
    return PackingPlan(
        row_length=plans[0].row_length,
        row_offsets=np.append(np.concatenate(starts), sum(len(plan.segments) for plan in plans)),
        segments=np.concatenate([plan.segments for plan in plans]),
        columns=np.concatenate([plan.columns for plan in plans]),
        num_events=sum(plan.num_events for plan in plans),
    )


def _best_fit_rows(
    ordered: Int[np.ndarray, " s"], row_length: int, max_segments: int
) -> tuple[Int[np.ndarray, " s"], int]:
    """The row of each of the falling lengths, and how many rows there are."""
    num_full = int(np.count_nonzero(ordered == row_length))
    rows = np.arange(len(ordered))  # full windows need no search: each is its own row
    open_rows: list[list[int]] = [[] for _ in range(row_length + 1)]  # by the space they have left
    num_segments: list[int] = []  # of each row that was opened by the search
    spaces = 0  # bit n is set where open_rows[n] is not empty: the best fit is one bit operation away
    found = []
    for length in ordered[num_full:].tolist():
        fits = spaces >> length
        if fits:
            space = length + (fits & -fits).bit_length() - 1
            row = open_rows[space].pop()
            if not open_rows[space]:
                spaces ^= 1 << space
            num_segments[row] += 1
        else:
            space, row = row_length, len(num_segments)
            num_segments.append(1)
        found.append(row)
        left = space - length
        if left and num_segments[row] < max_segments:
            open_rows[left].append(row)
            spaces |= 1 << left
    rows[num_full:] = np.asarray(found, np.int64) + num_full
    return rows, num_full + len(num_segments)


def random_stream(seed: int, stream: int) -> np.random.Generator:
    """The generator of one of a seed's independent streams: 0 is packing's, epoch `e` has `e + 1`."""
    return np.random.Generator(np.random.Philox(key=np.array([seed & (2**64 - 1), stream], np.uint64)))
