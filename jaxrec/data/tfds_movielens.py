"""MovieLens through TensorFlow Datasets: `tfds:movielens/100k-ratings`, `1m`, `20m`, `latest-small` and so on.

The ratings carry the title and genres of their movie, so one TFDS config gives both the events and the items.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jaxrec.data.columns import ABSENT, ColumnMap, ValueLabel, fill_from
from jaxrec.data.sources import SourceBatch, file_digest
from jaxrec.data.tensorflow_import import import_tensorflow

__all__ = ["TfdsMovieLens", "TfdsTable", "open_tfds"]

_EXAMPLES_AT_ONCE = 8192
_VARIANTS = ("100k", "1m", "20m", "25m", "latest-small", "latest")
_EVENT_SCHEMA = pa.schema(
    [("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64()), ("rating", pa.float32())]
)
_ITEM_SCHEMA = pa.schema(
    [("item_id", pa.string()), ("title", pa.string()), ("genres", pa.list_(pa.string()))]
)
_COLUMNS = ColumnMap(
    user="user_id",
    item="item_id",
    timestamp="timestamp",
    order=ABSENT,
    value=ValueLabel(column="rating", name="like", at_least=4.0),
    flags=(ABSENT,),
    behaviour=ABSENT,
    title="title",
    categories="genres",
    text=("title", "genres"),
    filter_seen=True,
)

log = logging.getLogger(__name__)


class TfdsTable:
    """One table out of the ratings of a builder, as Arrow batches."""

    # Numbers, but written as text in every variant.
    has_text_ids = True

    def __init__(
        self,
        builder: Any,
        schema: pa.Schema,
        convert: Callable[[Any, dict[str, Any]], pa.RecordBatch],
        where: str,
    ):
        self._builder, self._convert = builder, convert
        self.schema, self.where = schema, where

    def estimated_rows(self) -> int:
        """The number of ratings that the builder states."""
        splits = self._builder.info.splits
        return int(splits["train"].num_examples) if "train" in splits else 0

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[SourceBatch]:
        """The rows, in the order of the builder's files, whatever the machine."""
        import tensorflow_datasets as tfds

        reading = tfds.ReadConfig(try_autocache=False, interleave_cycle_length=1)
        dataset = self._builder.as_dataset(split="train", shuffle_files=False, read_config=reading)
        wanted = ("user_id", "movie_id", "timestamp", "user_rating", "movie_title", "movie_genres")
        dataset = dataset.map(lambda example: {name: example[name] for name in wanted})
        start = 0
        for examples in dataset.ragged_batch(_EXAMPLES_AT_ONCE):
            batch = self._convert(self._builder, examples)
            if columns is not None:
                batch = batch.select(list(columns))
            yield SourceBatch("tfds", np.arange(start, start + batch.num_rows), batch)
            start += batch.num_rows

    def digest(self) -> str:
        """A hash of the builder's files; of its name, version and size where it keeps none."""
        parts = [self._builder.info.full_name, str(self.estimated_rows())]
        place = Path(str(self._builder.data_dir))
        if place.is_dir():
            parts += [file_digest(path) for path in sorted(place.iterdir()) if "record" in path.name]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class TfdsMovieLens:
    """The source that prepare reads: events and items of one builder."""

    def __init__(self, name: str, columns: ColumnMap, builder: Any):
        self.name, self.columns = name, columns
        self.domains: tuple[str, ...] = ()
        self.kinds: tuple[str, ...] = ()
        where = f"tfds:{builder.info.full_name}"
        self._events = TfdsTable(builder, _EVENT_SCHEMA, _event_batch, where)
        self._items = TfdsTable(builder, _ITEM_SCHEMA, _item_batch, where)

    def events(self) -> TfdsTable:
        """The ratings."""
        return self._events

    def items(self) -> TfdsTable:
        """Title and genres of each movie that was rated."""
        return self._items

    def users(self) -> None:
        """MovieLens in TFDS has no table of users."""
        return None


def open_tfds(variant: str, name: str, columns: ColumnMap, data_dir: str) -> TfdsMovieLens:
    """The MovieLens builder of that name, downloaded when its files are not there.

    Raises:
      ValueError: there is no such variant, or its files are neither here nor to be had.
    """
    import_tensorflow()
    import tensorflow_datasets as tfds

    short = variant.removeprefix("movielens/").removesuffix("-ratings")
    if short not in _VARIANTS:
        raise ValueError(
            f"data.path='tfds:{variant}' is not a MovieLens set of TFDS; choose tfds:movielens/NAME-ratings with NAME "
            f"among {', '.join(_VARIANTS)}."
        )
    builder = tfds.builder(f"movielens/{short}-ratings", data_dir=data_dir or None)
    if not builder.info.splits:
        log.info("downloading %s to %s", builder.info.full_name, builder.data_dir)
        try:
            builder.download_and_prepare()
        except Exception as error:  # TFDS, its downloader and its file system raise unrelated types
            raise ValueError(
                f"{builder.info.full_name} is not in {builder.data_dir} and cannot be downloaded "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}); give "
                "data.tfds_data_dir, or put the files into a directory as docs/data.md says."
            ) from error
    return TfdsMovieLens(name or f"ml-{short}", fill_from(columns, _COLUMNS), builder)


def _texts(values: Any) -> pa.Array:
    return pa.array([value.decode("utf-8", "replace") for value in values.numpy().tolist()], pa.string())


def _event_batch(builder: Any, examples: dict[str, Any]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [
            _texts(examples["user_id"]),
            _texts(examples["movie_id"]),
            pa.array(examples["timestamp"].numpy(), pa.int64()),
            pa.array(examples["user_rating"].numpy(), pa.float32()),
        ],
        schema=_EVENT_SCHEMA,
    )


def _item_batch(builder: Any, examples: dict[str, Any]) -> pa.RecordBatch:
    """Each movie of the batch once; prepare keeps the first entry of an item."""
    genre = builder.info.features["movie_genres"].feature
    ids = examples["movie_id"].numpy()
    _, first = np.unique(ids.astype(object), return_index=True)
    titles, genres = examples["movie_title"].numpy(), examples["movie_genres"]
    rows = np.sort(first).tolist()
    return pa.RecordBatch.from_arrays(
        [
            pa.array([ids[row].decode("utf-8", "replace") for row in rows], pa.string()),
            pa.array([titles[row].decode("utf-8", "replace") for row in rows], pa.string()),
            pa.array(
                [[genre.int2str(int(one)) for one in genres[row].numpy()] for row in rows],
                pa.list_(pa.string()),
            ),
        ],
        schema=_ITEM_SCHEMA,
    )
