"""Events on disk between two passes: split by user into buckets, each small enough to sort in memory.

All events of a user are in one bucket, in the order of the source, so a bucket is sorted by itself and memory does
not grow with the number of events.

Letters: E events, K direct behaviours.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from jaxrec.data.histories import UNKNOWN_TIME

__all__ = ["ROWS_PER_BUCKET", "Spool", "history_order", "record_type"]

ROWS_PER_BUCKET = 1 << 20
_MAX_BUCKETS = 512
_COPY_ROWS = 1 << 16
UNKNOWN = UNKNOWN_TIME  # of an order too


def record_type(
    num_behaviours: int,
    *,
    has_time: bool,
    has_order: bool,
    has_names: bool,
    has_value: bool,
    num_context: int = 0,
) -> np.dtype:
    """One event on disk: codes of user and item, a hash of all columns, and what its source has besides."""
    fields: list[tuple[str, str] | tuple[str, str, tuple[int]]] = [
        ("user", "<i4"),
        ("item", "<i4"),
        ("hash", "<u8"),
    ]
    fields += (
        [("time", "<i8")] * has_time
        + [("order", "<i8")] * has_order
        + [("behaviour", "<i2")] * has_names
        + [("value", "<f4")] * has_value
    )
    return np.dtype([*fields, ("labels", "i1", (num_behaviours,)), ("context", "<i4", (num_context,))])


class Spool:
    """Fixed-size records in one file per bucket; bucket = user code mod number of buckets."""

    def __init__(self, directory: Path, dtype: np.dtype, expected_rows: int):
        directory.mkdir()
        self.dtype = dtype
        self.num_buckets = int(np.clip(-(-expected_rows // ROWS_PER_BUCKET), 1, _MAX_BUCKETS))
        self._paths = [directory / f"bucket-{bucket:04d}" for bucket in range(self.num_buckets)]
        for path in self._paths:
            path.touch()

    def append(self, records: np.ndarray) -> None:
        """Add records in the order of the source."""
        buckets = records["user"] % self.num_buckets
        order = np.argsort(buckets, kind="stable")
        ends = np.cumsum(np.bincount(buckets, minlength=self.num_buckets))
        grouped, start = records[order], 0
        for path, end in zip(self._paths, ends.tolist(), strict=True):
            if end > start:
                # Opened anew each time: hundreds of handles with buffers would be memory, and ulimits are small.
                with path.open("ab") as handle:
                    handle.write(grouped[start:end].tobytes())
            start = end

    def bucket(self, number: int) -> np.ndarray:
        """One bucket, whole."""
        return np.fromfile(self._paths[number], self.dtype)

    def replace(self, number: int, records: np.ndarray) -> None:
        """Put other records, of another type perhaps, into the place of a bucket."""
        with self._paths[number].open("wb") as handle:
            for start in range(0, len(records), _COPY_ROWS):
                handle.write(records[start : start + _COPY_ROWS].tobytes())

    def reader(self, number: int, dtype: np.dtype) -> "Reader":
        """Sequential reads of a replaced bucket."""
        return Reader(self._paths[number], dtype)

    def chunks(self, number: int, dtype: np.dtype, rows: int = 1 << 18) -> Iterator[np.ndarray]:
        """A replaced bucket in chunks."""
        reader = self.reader(number, dtype)
        while len(chunk := reader.take(rows)):
            yield chunk

    def remove(self) -> None:
        """Delete the files."""
        for path in self._paths:
            path.unlink(missing_ok=True)
        self._paths[0].parent.rmdir()


class Reader:
    """A file of records, read front to back; it holds no handle between two reads."""

    def __init__(self, path: Path, dtype: np.dtype):
        self._path, self._dtype, self._at = path, dtype, 0

    def take(self, rows: int) -> np.ndarray:
        """The next records; fewer at the end."""
        chunk = np.fromfile(self._path, self._dtype, rows, offset=self._at * self._dtype.itemsize)
        self._at += len(chunk)
        return chunk


def history_order(
    user_rank: Int64[np.ndarray, " e"],
    time: Int64[np.ndarray, " e"] | None,
    order: Int64[np.ndarray, " e"] | None,
) -> Int64[np.ndarray, " e"]:
    """The permutation that puts events into histories: by user, then `order`, then time, ties as in the source.

    An event with an order stands where the order says. One without (null) but with a time goes behind the last
    ordered event of its user that is known to be no later.
    """
    if order is None:
        return np.argsort(user_rank, kind="stable") if time is None else np.lexsort((time, user_rank))
    placed = order != UNKNOWN
    if time is None or placed.all():
        return np.lexsort((order, user_rank))
    # Along the ordered events of a user the latest time so far never falls, so sorting by it keeps their order,
    # and an event without an order slots in by its own time.
    key = time.copy()
    ordered = np.flatnonzero(placed)
    ordered = ordered[np.lexsort((order[ordered], user_rank[ordered]))]
    distinct, dense = np.unique(time[ordered], return_inverse=True)
    span = len(distinct) + 1
    key[ordered] = (
        distinct[np.maximum.accumulate(user_rank[ordered] * span + dense) % span] if len(ordered) else 0
    )
    return np.lexsort((np.where(placed, order, 0), ~placed, key, user_rank))
