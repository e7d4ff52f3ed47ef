"""From events to packed rows: the arrays of a `Batch`.

B = rows of the batch, L = positions of a row, K = behaviours, S = segments, E = events.
"""

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64

from jaxrec.core.batch import NUM_TIME_GAPS, UNKNOWN_SECONDS, Batch
from jaxrec.data.histories import UNKNOWN_TIME, Histories
from jaxrec.data.packing import PackingPlan

__all__ = ["fill_rows", "row_segments", "seconds_in_segment", "time_gap_buckets"]


def row_segments(
    plan: PackingPlan, rows: Int64[np.ndarray, " b"]
) -> tuple[Int[np.ndarray, " s"], Int[np.ndarray, " s"], Int[np.ndarray, " s"]]:
    """What lies in `rows`, row by row and left to right: for each segment, its index in the packed
    lengths, its first cell in the flattened batch, and its number in its row (1, 2, ...)."""
    counts = np.diff(plan.row_offsets)[rows]
    before = np.cumsum(counts) - counts
    numbers = np.arange(counts.sum()) - np.repeat(before, counts)
    entries = np.repeat(plan.row_offsets[rows], counts) + numbers
    cells = np.repeat(np.arange(len(rows)) * plan.row_length, counts) + plan.columns[entries]
    return plan.segments[entries], cells, numbers + 1


def fill_rows(
    events: Histories,
    first_cells: Int[np.ndarray, " s"],
    numbers: Int[np.ndarray, " s"],
    users: Int[np.ndarray, " s"],
    shape: tuple[int, int],
    domains: Int[np.ndarray, " s"] | None = None,
) -> Batch:
    """Lays segment `s` of `events`, of user index `users[s]`, into an empty batch from cell `first_cells[s]` on.

    Args:
      domains: of the users; None = the dataset has one.
    """
    lengths = np.diff(events.offsets)
    positions = np.arange(events.offsets[-1]) - np.repeat(events.offsets[:-1], lengths)
    cells = np.repeat(first_cells, lengths) + positions

    def laid(values: np.ndarray, dtype: type, padding: float = 0) -> np.ndarray:
        flat = np.full((shape[0] * shape[1], *values.shape[1:]), padding, dtype)
        flat[cells] = values
        return flat.reshape(*shape, *values.shape[1:])

    return Batch(
        item_ids=laid(events.item_ids, np.int32),
        user_ids=laid(np.repeat(users + 1, lengths), np.int32),
        segment_ids=laid(np.repeat(numbers, lengths), np.int32),
        positions=laid(positions, np.int32),
        time_gaps=laid(time_gap_buckets(events.timestamps, positions == 0), np.int32),
        times=laid(seconds_in_segment(events.timestamps, events.offsets), np.int32, padding=UNKNOWN_SECONDS),
        labels=laid(events.labels, np.int8, padding=-1),
        values=laid(events.values, np.float32, padding=np.nan),
        context=None if events.context is None else laid(events.context, np.int32),
        domain_ids=None if domains is None else laid(np.repeat(domains, lengths), np.int32),
    )


def time_gap_buckets(
    timestamps: Int64[np.ndarray, " e"], is_first: Bool[np.ndarray, " e"]
) -> Int32[np.ndarray, " e"]:
    """Buckets of the seconds since the event before: bit length + 1, or 0 where unknown or first.

    An event dated before its predecessor (a source's order wins over its clock) counts as the same
    second.
    """
    if (timestamps == UNKNOWN_TIME).all():
        return np.zeros(len(timestamps), np.int32)
    previous = np.roll(timestamps, 1)
    unknown = is_first | (timestamps == UNKNOWN_TIME) | (previous == UNKNOWN_TIME)
    gaps = np.where(unknown, 0, timestamps) - np.where(unknown, 0, previous)
    bits = np.frexp(np.maximum(gaps, 0).astype(np.float64))[1]  # frexp's exponent is the bit length
    return np.where(unknown, 0, np.minimum(bits + 1, NUM_TIME_GAPS - 1)).astype(np.int32)


def seconds_in_segment(
    timestamps: Int64[np.ndarray, " e"], offsets: Int64[np.ndarray, " s_plus_1"]
) -> Int32[np.ndarray, " e"]:
    """Seconds since the earliest known time of the event's segment, saturating; `UNKNOWN_SECONDS` where unknown."""
    known = timestamps != UNKNOWN_TIME
    if not known.any():
        return np.full(len(timestamps), UNKNOWN_SECONDS, np.int32)
    lengths = np.diff(offsets)
    latest = np.iinfo(np.int64).max
    starts = offsets[:-1][lengths > 0]
    earliest = np.minimum.reduceat(np.where(known, timestamps, latest), starts)
    passed = np.where(known, timestamps, 0) - np.where(known, np.repeat(earliest, lengths[lengths > 0]), 0)
    return np.where(known, np.minimum(passed, np.iinfo(np.int32).max), UNKNOWN_SECONDS).astype(np.int32)
