"""Splits as two cut points per user over the time-ordered history.

`train = [:train_end]`, `validation = [train_end:validation_end]`, `test = [validation_end:]`. Leave-one-out and
global time are both of that form, so nothing behind this file knows which one was asked for.

Letters: U users, E events.
"""

from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Int64

Times = Int64[np.ndarray, " e"]
Cuts = tuple[Int64[np.ndarray, " u"], Int64[np.ndarray, " u"]]

_BINS = 1 << 16


def leave_one_out_cuts(
    lengths: Int64[np.ndarray, " u"], min_events: int = 3, *, validation: bool = True
) -> Cuts:
    """`(train_end, validation_end)`: the last event is the test target, the one before it validation, if any."""
    long_enough = lengths >= min_events
    return lengths - (1 + validation) * long_enough, lengths - long_enough


def global_time_cuts(
    offsets: Int64[np.ndarray, " u_plus_1"], seconds: Times, validation_from: int, test_from: int
) -> Cuts:
    """`(train_end, validation_end)`: a part ends before its user's first event at or after the cut time.

    Where `order` contradicts the clock, an early event after a late one goes with the late one: no event at or
    after a cut ever falls into the part before it.
    """
    return first_at_or_after(offsets, seconds, validation_from), first_at_or_after(
        offsets, seconds, test_from
    )


def first_at_or_after(
    offsets: Int64[np.ndarray, " u_plus_1"], seconds: Times, cut: int
) -> Int64[np.ndarray, " u"]:
    """How many events each history has before its first one at or after a time."""
    late = np.flatnonzero(seconds >= cut)
    first = np.searchsorted(late, offsets[:-1])
    position = np.append(late, np.iinfo(np.int64).max)[first]
    return (np.minimum(position, offsets[1:]) - offsets[:-1]).astype(np.int64)


def streaming_quantiles(
    chunks: Callable[[], Iterable[Times]], quantiles: tuple[float, ...]
) -> tuple[int, ...]:
    """The exact element of rank `floor(q * E)` for each quantile, in memory that does not grow with E.

    Each round counts the values of the interval that holds the rank in 65,536 bins and goes on with one bin: four
    rounds at most for 64-bit values. `chunks` is called once a round.

    Raises:
      ValueError: there are no values.
    """
    total, low, high = 0, np.iinfo(np.int64).max, np.iinfo(np.int64).min
    for chunk in chunks():
        if len(chunk):
            total, low, high = total + len(chunk), min(low, int(chunk.min())), max(high, int(chunk.max()))
    if not total:
        raise ValueError("there are no timestamps to take a quantile of; use data.split=LeaveOneOut.")
    ranks = [min(int(q * total), total - 1) for q in quantiles]
    return tuple(_select(chunks, rank, int(low), int(high)) for rank in ranks)


def _select(chunks: Callable[[], Iterable[Times]], rank: int, low: int, high: int) -> int:
    """The element of `rank` among the values, all of which lie in [low, high]."""
    while low < high:
        width = -(-(high - low + 1) // _BINS)
        counts = np.zeros(_BINS, np.int64)
        for chunk in chunks():
            inside = chunk[(chunk >= low) & (chunk <= high)]
            # Differences of two int64 fit in uint64 although they may not fit in int64.
            distance = inside.astype(np.uint64) - np.uint64(low % 2**64)
            counts += np.bincount((distance // np.uint64(width)).astype(np.int64), minlength=_BINS)
        before = np.cumsum(counts)
        chosen = int(np.searchsorted(before, rank, side="right"))
        rank -= int(before[chosen - 1]) if chosen else 0
        low, high = low + chosen * width, min(high, low + (chosen + 1) * width - 1)
    return low
