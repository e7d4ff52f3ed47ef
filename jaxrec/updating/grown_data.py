"""The data of a run and the server's log as one data set, the log's events after those of the run.

A history is what the server had before it: the events that the run was prepared from, then those of the log in the
order in which they were taken. E = events.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxrec.data.columns import ABSENT, ColumnMap, ValueLabel
from jaxrec.data.config import DataConfig, GlobalTime
from jaxrec.data.dataset import UNKNOWN_TIME, PreparedDataset
from jaxrec.data.items import FEATURES
from jaxrec.data.own_source import BatchTable, OwnSource
from jaxrec.data.sources import SourceBatch, file_digest
from jaxrec.export.catalogue import is_number
from jaxrec.updating.snapshot import EVENTS_FILE, ITEMS_FILE

__all__ = ["GrownData", "grown_config"]

FLAG = "is_"  # what makes a column a behaviour; see `columns.flag_behaviour`


def grown_config(base: DataConfig, dataset: PreparedDataset, snapshot: Path, cut_seconds: int) -> DataConfig:
    """How the grown data are prepared: events before the cut are trained on, those from it on are the test part.

    Args:
      base: of the run.
      dataset: the run's.
      snapshot: the directory of a snapshot of the log.

    Raises:
      ValueError: the data have what a log cannot go on with.
    """
    for name, given, remedy in (
        ("data.columns.context", dataset.metadata.context, "train the run without context"),
        ("data.queries", base.queries, "train the run without queries"),
    ):
        if given:
            raise ValueError(
                f"the run has {name}, and the server's log has nothing of the kind, so that the data cannot go on with "
                f"it; {remedy}."
            )
    assert dataset.directory is not None, "a run's data lie on disk"
    return dataclasses.replace(
        base,
        path="",
        name="",
        columns=ColumnMap(),
        source=GrownData(base=str(dataset.directory), snapshot=str(snapshot)),
        split=GlobalTime(moments=(cut_seconds, cut_seconds)),
        filter_seen=dataset.metadata.filter_seen,
        duplicates="keep",  # what the run's were is settled
        cold_items=None,
        noisy_events=None,
        tfds_data_dir="",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrownData(OwnSource):
    """A prepared data set and a snapshot of a server's log.

    Ids are of the type that the run's have. Where the log has one that is no number they are text for all: rows of
    tables find each other all the same (`vocabulary.known_ids`).

    Attributes:
      base: directory of the prepared data.
      snapshot: directory of the snapshot.
    """

    base: str
    snapshot: str

    @property
    def name(self) -> str:
        """As the run's data are called."""
        return self._dataset.metadata.name

    @property
    def domains(self) -> tuple[str, ...]:
        """The run's."""
        return self._dataset.metadata.domains

    @property
    def kinds(self) -> tuple[str, ...]:
        """The run's."""
        return self._dataset.metadata.kinds

    @property
    def columns(self) -> ColumnMap:
        """The behaviours have the order that they have in the run's data."""
        value, flags = self._value, self._flags
        return ColumnMap(
            user="user_id",
            item="item_id",
            timestamp="timestamp",
            timestamps_are_ranks=False,
            order="order",
            value=value or ValueLabel(column=ABSENT),
            flags=tuple(FLAG + name for name in flags) or (ABSENT,),
            behaviour=ABSENT,
            title="title",
            categories="categories",
            text=("text",),
            features=(FEATURES,) if any(self._dataset.item_features) else (),
        )

    def events(self) -> "_Events":
        """The run's events, user by user, then the log's."""
        return _Events(self)

    def items(self) -> BatchTable:
        """The run's items, then those that came in at the server."""
        return BatchTable(self._item_batches, f"{self.name} and the items of the log")

    @functools.cached_property
    def _dataset(self) -> PreparedDataset:
        return PreparedDataset.open(self.base)

    @functools.cached_property
    def _log(self) -> dict[str, Any]:
        """Columns of the log, as lists."""
        return pq.read_table(Path(self.snapshot) / EVENTS_FILE).to_pydict()

    @functools.cached_property
    def _columns_before(self) -> dict[str, Any]:
        """The column map that the run's data were prepared by."""
        return dict(self._dataset.statistics["columns"])

    @property
    def _value(self) -> ValueLabel | None:
        """The number beside events, which makes the first behaviour; None = the run's data have none."""
        value = ValueLabel(**self._columns_before["value"])
        return None if value.column in (ABSENT, "") else value

    @property
    def _flags(self) -> tuple[str, ...]:
        """The behaviours that no number makes."""
        names = self._dataset.metadata.behaviours
        return names if self._value is None else names[1:]

    def _item_batches(self) -> Iterator[pa.RecordBatch]:
        kind = self._types["item_id"]
        columns = ["item_id", "title", "categories", "text"]
        known = pq.read_table(Path(self.base) / "items.parquet", columns=columns)
        features = pa.array(map(list, self._dataset.item_features), pa.list_(pa.string()))
        known = known.append_column(FEATURES, features)
        known = known.set_column(0, "item_id", known["item_id"].cast(kind))
        schema = known.schema
        yield known.combine_chunks().to_batches()[0]
        added = pq.read_table(Path(self.snapshot) / ITEMS_FILE).to_pylist()
        there = set(known["item_id"].cast(pa.string()).to_pylist())
        # An item whose id could be none of the events' has no event: it is not of the data set yet.
        rows = [
            {
                "item_id": _as(item["item_id"], kind),
                "title": item["title"],
                "categories": item["categories"],
                FEATURES: [],
                "text": ". ".join(
                    words for words in (item["title"], ", ".join(item["categories"]), item["text"]) if words
                ),
            }
            for item in added
            if item["item_id"] not in there and (pa.types.is_string(kind) or is_number(item["item_id"]))
        ]
        if rows:
            yield pa.RecordBatch.from_pylist(rows, schema=schema)

    @functools.cached_property
    def _types(self) -> dict[str, pa.DataType]:
        """Of the ids."""
        keys = {"user_id": self._dataset.user_keys, "item_id": self._dataset.item_keys}
        found = {}
        for name, column in keys.items():
            kind = pa.array(column).type
            numbers = not pa.types.is_string(kind) and all(map(is_number, set(self._log[name])))
            found[name] = kind if numbers else pa.string()
        return found

    @functools.cached_property
    def _schema(self) -> pa.Schema:
        fields = [
            ("user_id", self._types["user_id"]),
            ("item_id", self._types["item_id"]),
            ("timestamp", pa.int64()),
            ("order", pa.int64()),
            *((FLAG + name, pa.int8()) for name in self._flags),
        ]
        if self._value is not None:
            fields.append((self._value.column, pa.float64()))
        return pa.schema(fields)

    def _event_batches(self) -> Iterator[pa.RecordBatch]:
        dataset, schema = self._dataset, self._schema
        skip = int(self._value is not None)
        for users, part in dataset.history_blocks():
            lengths = np.diff(part.offsets)
            if not len(part.item_ids):
                continue
            columns = {
                "user_id": pa.array(dataset.user_keys[np.repeat(users, lengths)]),
                "item_id": pa.array(dataset.item_keys[part.item_ids - 1]),
                "timestamp": pa.array(part.timestamps, mask=part.timestamps == UNKNOWN_TIME),
                "order": pa.array(np.arange(len(part.item_ids)) - np.repeat(part.offsets[:-1], lengths)),
            }
            for at, name in enumerate(self._flags, skip):
                columns[FLAG + name] = pa.array(part.labels[:, at], mask=part.labels[:, at] < 0)
            if self._value is not None:
                columns[self._value.column] = pa.array(
                    part.values.astype(np.float64), mask=np.isnan(part.values)
                )
            arrays = [columns[field.name].cast(field.type) for field in schema]
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)
        if self._log["number"]:
            yield self._log_batch()

    def _log_batch(self) -> pa.RecordBatch:
        log, behaviours = self._log, self._log["behaviour"]
        lengths = dict(zip(map(str, self._dataset.user_keys), self._dataset.lengths.tolist(), strict=True))
        order = []
        for user in log["user_id"]:
            order.append(lengths.get(user, 0))
            lengths[user] = order[-1] + 1
        columns: dict[str, list[Any]] = {
            "user_id": [_as(key, self._types["user_id"]) for key in log["user_id"]],
            "item_id": [_as(key, self._types["item_id"]) for key in log["item_id"]],
            "timestamp": log["timestamp"],
            "order": order,
        }
        # A name in a column of names says of the others that they are not meant; a flag says nothing of the others.
        other = 0 if self._columns_before["behaviour"] not in (ABSENT, "") else None
        for name in self._flags:
            columns[FLAG + name] = [1 if given == name else other if given else None for given in behaviours]
        if self._value is not None:
            columns[self._value.column] = log["value"]
        arrays = [pa.array(columns[field.name], field.type) for field in self._schema]
        return pa.RecordBatch.from_arrays(arrays, schema=self._schema)


class _Events:
    """The events as prepare reads them; their digest needs no pass over them."""

    has_text_ids = False

    def __init__(self, source: GrownData):
        self._source, self.schema = source, source._schema
        self.where = f"{source.name} and its log"

    def estimated_rows(self) -> int:
        """Exact."""
        return self._source._dataset.metadata.num_events + len(self._source._log["number"])

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[SourceBatch]:
        """The rows, in order, `columns` of them only."""
        start = 0
        for batch in self._source._event_batches():
            chosen = batch if columns is None else batch.select(list(columns))
            yield SourceBatch(self.where, np.arange(start, start + batch.num_rows), chosen)
            start += batch.num_rows

    def digest(self) -> str:
        """Of what the run's data were prepared from, and of the snapshot."""
        parts = (
            self._source._dataset.metadata.fingerprint,
            file_digest(Path(self._source.snapshot) / EVENTS_FILE),
        )
        return hashlib.sha256("".join(parts).encode()).hexdigest()


def _as(key: str, kind: pa.DataType) -> int | str:
    return key if pa.types.is_string(kind) else int(key)
