"""Ragged histories, and the two places where they live: arrays in memory, or ArrayRecord files.

N = histories, E = events, K = behaviours, F = context columns, U = users of the dataset.
"""

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Int8, Int32, Int64

__all__ = ["UNKNOWN_TIME", "Histories", "HistoryFiles", "blocks"]

UNKNOWN_TIME = int(np.iinfo(np.int64).min)  # the timestamp of an event whose time nobody knows
# As the files hold them.
COLUMNS = {"item_ids": "<i4", "timestamps": "<i8", "labels": "i1", "values": "<f4", "context": "<i4"}


@dataclasses.dataclass(frozen=True)
class Histories:
    """Ragged histories: the events of history `i` are `[offsets[i] : offsets[i + 1]]` of each column.

    `values` are the numbers beside the events, NaN where unknown; empty = no event has one.
    """

    offsets: Int64[np.ndarray, " n_plus_1"]
    item_ids: Int32[np.ndarray, " e"]
    timestamps: Int64[np.ndarray, " e"]  # seconds; UNKNOWN_TIME where unknown
    labels: Int8[np.ndarray, "e k"]  # 1 yes, 0 no, -1 unknown
    values: Float32[np.ndarray, " e"] = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))
    context: Int32[np.ndarray, "e f"] | None = None  # hashes, 0 unknown; None = events have no context

    def __post_init__(self) -> None:
        if not len(self.values):
            object.__setattr__(self, "values", np.full(len(self.item_ids), np.nan, np.float32))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def take(
        self, indices: Int[np.ndarray, " n"], starts: Int[np.ndarray, " n"], lengths: Int[np.ndarray, " n"]
    ) -> "Histories":
        """The `lengths[i]` events from `starts[i]` on of history `indices[i]`, in the order asked for."""
        offsets = offsets_of(lengths)
        shifts = self.offsets[indices] + starts - offsets[:-1]
        at = np.arange(offsets[-1]) + np.repeat(shifts, lengths)
        return Histories(
            offsets,
            self.item_ids[at],
            self.timestamps[at],
            self.labels[at],
            self.values[at],
            None if self.context is None else self.context[at],
        )


class HistoryFiles:
    """The histories of a prepared directory: a TFDS dataset in ArrayRecord, one record a user.

    A batch of records is fetched at once and its columns are joined as bytes: the generic decoder, one
    record at a time, takes twice as long. TensorFlow is not loaded for it.
    """

    def __init__(
        self, directory: Path, lengths: Int64[np.ndarray, " u"], num_behaviours: int, num_context: int = 0
    ):
        """Opens the files; nothing is read yet.

        Raises:
            ValueError: there is no dataset in `directory`, or it is not the one of `lengths`.
        """
        import tensorflow_datasets as tfds
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            builder = tfds.builder_from_directory(str(directory))
            self._records: Any = builder.as_data_source(
                split=next(iter(builder.info.splits)),
                deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
            )
        except Exception as error:  # whatever tfds and the file formats below it raise
            raise ValueError(
                f"{str(directory)!r} holds no readable histories ({error}); "
                "run python -m jaxrec.prepare again."
            ) from error
        if len(self._records) != len(lengths):
            raise ValueError(
                f"{str(directory)!r} holds {len(self._records)} histories, but users.parquet names "
                f"{len(lengths)} users; one of them is damaged: run python -m jaxrec.prepare again."
            )
        self._parse = tf_example_pb2.Example.FromString
        self._directory = directory
        self._lengths = lengths
        self._num_behaviours, self._num_context = num_behaviours, num_context
        # Bytes of an event in each column.
        self._widths = {"item_ids": 4, "timestamps": 8, "labels": num_behaviours, "values": 4}
        if num_context:
            self._widths["context"] = 4 * num_context
        self._lock = threading.Lock()  # one reader: its threads read the files of one request in parallel

    def read(self, indices: Int[np.ndarray, " n"]) -> Histories:
        """The whole histories of these users.

        Raises:
            ValueError: a record cannot be read, or is not as long as `users.parquet` says.
        """
        with self._lock:
            records = self._records.__getitems__(np.asarray(indices).tolist())
        features = [self._parse(record).features.feature for record in records]
        parts = {name: [_bytes(feature, name) for feature in features] for name in self._widths}
        lengths = np.asarray(self._lengths[indices])
        for name, width in self._widths.items():
            sizes = np.fromiter(map(len, parts[name]), np.int64, len(indices))
            wrong = np.flatnonzero(sizes != lengths * width)
            if len(wrong):
                raise ValueError(
                    f"user {indices[wrong[0]]} has {sizes[wrong[0]]} bytes of {name} in "
                    f"{str(self._directory)!r}, but {lengths[wrong[0]]} events by users.parquet; "
                    "one of them is damaged: run python -m jaxrec.prepare again."
                )
        found = {name: np.frombuffer(b"".join(parts[name]), COLUMNS[name]) for name in parts}
        num_events = len(found["item_ids"])
        context = found["context"].reshape(num_events, self._num_context) if "context" in found else None
        labels = found["labels"].reshape(num_events, self._num_behaviours)
        return Histories(
            offsets_of(lengths), found["item_ids"], found["timestamps"], labels, found["values"], context
        )

    def take(
        self, indices: Int[np.ndarray, " n"], starts: Int[np.ndarray, " n"], lengths: Int[np.ndarray, " n"]
    ) -> Histories:
        """The `lengths[i]` events from `starts[i]` on of history `indices[i]`, in the order asked for."""
        return self.read(indices).take(np.arange(len(indices)), starts, lengths)

    def load(self, users_per_read: int = 8192) -> Histories:
        """Every history, in memory."""
        offsets = offsets_of(self._lengths)
        size = int(offsets[-1])
        item_ids, timestamps = np.empty(size, np.int32), np.empty(size, np.int64)
        labels, values = np.empty((size, self._num_behaviours), np.int8), np.empty(size, np.float32)
        context = np.empty((size, self._num_context), np.int32) if self._num_context else None
        for users in blocks(len(self._lengths), users_per_read):
            part = self.read(users)
            here = slice(int(offsets[users[0]]), int(offsets[users[-1] + 1]))
            item_ids[here], timestamps[here] = part.item_ids, part.timestamps
            labels[here], values[here] = part.labels, part.values
            if context is not None and part.context is not None:
                context[here] = part.context
        return Histories(offsets, item_ids, timestamps, labels, values, context)


def _bytes(feature: Any, name: str) -> bytes:
    values = feature[name].bytes_list.value
    return values[0] if values else b""


def offsets_of(lengths: Int[np.ndarray, " n"]) -> Int64[np.ndarray, " n_plus_1"]:
    """Where each of the histories of these lengths begins, and where the last one ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def blocks(size: int, block_size: int) -> Iterator[Int64[np.ndarray, " n"]]:
    """`0 .. size - 1` in consecutive blocks."""
    for first in range(0, size, block_size):
        yield np.arange(first, min(first + block_size, size))
