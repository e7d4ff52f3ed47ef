"""Histories to a TFDS dataset in ArrayRecord: one example per user, in the order of the user indices.

Example number i is user i: nothing is shuffled, so a reader finds a user without an index. Arrays
are stored as raw little-endian bytes, which TFDS gives back as arrays of the declared type.

Letters: U users, n events of one user, K behaviours, F context columns.
"""

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Float32, Int8, Int32, Int64

__all__ = ["HistoryWriter"]

# TFDS keeps the split name "all" for the union of all splits: here that is the same.
NAME, SPLIT, VERSION = "histories", "users", "1.0.0"
USERS_PER_SHARD = 1 << 18


class HistoryWriter:
    """Writes the shards and the metadata of `directory`, in the layout that `tfds.builder_from_directory` reads."""

    def __init__(
        self,
        directory: Path,
        num_users: int,
        users_per_shard: int = USERS_PER_SHARD,
        *,
        with_context: bool = False,
    ):
        # Imported here: it brings TensorFlow, and most of prepare must run without its 400 MB.
        import tensorflow_datasets as tfds
        from array_record.python.array_record_module import ArrayRecordWriter

        directory.mkdir(parents=True)
        self._directory, self._tfds, self._open = directory, tfds, ArrayRecordWriter
        self._users_per_shard = users_per_shard
        self._num_shards = max(1, -(-num_users // users_per_shard))
        encoding = tfds.features.Encoding.BYTES
        features = {
            "item_ids": tfds.features.Tensor(shape=(None,), dtype=np.int32, encoding=encoding),
            "timestamps": tfds.features.Tensor(shape=(None,), dtype=np.int64, encoding=encoding),
            # Flat [n * K]: with K = 0 a two-dimensional array could not be told from its bytes.
            "labels": tfds.features.Tensor(shape=(None,), dtype=np.int8, encoding=encoding),
            "values": tfds.features.Tensor(shape=(None,), dtype=np.float32, encoding=encoding),
        }
        if with_context:  # flat [n * F] likewise
            features["context"] = tfds.features.Tensor(shape=(None,), dtype=np.int32, encoding=encoding)
        self._with_context = with_context
        self._features = tfds.features.FeaturesDict(features)
        self._serializer = tfds.core.example_serializer.ExampleSerializer(
            self._features.get_serialized_info()
        )
        self._writer: Any = None
        self._shard_lengths: list[int] = []
        self._num_bytes = 0

    def add(
        self,
        item_ids: Int32[np.ndarray, " n"],
        timestamps: Int64[np.ndarray, " n"],
        labels: Int8[np.ndarray, "n k"],
        values: Float32[np.ndarray, " n"],
        context: Int32[np.ndarray, "n f"] | None = None,
    ) -> None:
        """Write the next user; `context` where the writer was made with it."""
        if self._writer is None:
            path = self._directory / self._shard_name(len(self._shard_lengths))
            # One record a group: reading one user must not decode its neighbours.
            self._writer = self._open(str(path), "group_size:1")
            self._shard_lengths.append(0)
        example = {
            "item_ids": item_ids.astype("<i4").tobytes(),
            "timestamps": timestamps.astype("<i8").tobytes(),
            "labels": labels.astype("i1").tobytes(),
            "values": values.astype("<f4").tobytes(),
        }
        if self._with_context:
            assert context is not None, "the writer was made with context"
            example["context"] = context.astype("<i4").tobytes()
        record = self._serializer.serialize_example(example)
        self._writer.write(record)
        self._num_bytes += len(record)
        self._shard_lengths[-1] += 1
        if self._shard_lengths[-1] == self._users_per_shard:
            self._close_shard()

    def _shard_name(self, number: int) -> str:
        return f"{NAME}-{SPLIT}.array_record-{number:05d}-of-{self._num_shards:05d}"

    def _close_shard(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _write_metadata(self) -> None:
        tfds = self._tfds
        identity = tfds.core.dataset_info.DatasetIdentity(
            name=NAME, version=tfds.core.Version(VERSION), data_dir=str(self._directory), module_name=""
        )
        info = tfds.core.DatasetInfo(
            builder=identity,
            description="Histories of users, oldest event first; example i is user index i.",
            features=self._features,
            disable_shuffling=True,
        )
        info.set_file_format("array_record")
        template = tfds.core.ShardedFileTemplate(
            data_dir=self._directory, dataset_name=NAME, split=SPLIT, filetype_suffix="array_record"
        )
        split = tfds.core.SplitInfo(
            name=SPLIT,
            shard_lengths=self._shard_lengths,
            num_bytes=self._num_bytes,
            filename_template=template,
        )
        info.set_splits(tfds.core.SplitDict([split]))
        info.write_to_directory(self._directory)

    def __enter__(self) -> "HistoryWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_shard()
        if kind is None:
            self._write_metadata()
