"""Impressions of the Open Bandit Dataset: advertisements shown, with the context they were shown in, and the clicks.

There is no user id. The user of an event is whom nothing tells apart: all who see the same campaign and have the same
features are one history, in the order of time. Items are numbered anew in each campaign, so that their ids bear its
name.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxrec.data.columns import ABSENT, ColumnMap
from jaxrec.data.own_source import OwnSource

__all__ = ["OpenBandit"]

_USER = tuple(f"user_feature_{number}" for number in range(4))
_ITEM = tuple(f"item_feature_{number}" for number in range(1, 4))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenBandit(OwnSource):
    """`impressions.parquet` and `items.parquet` of a directory.

    `data.columns.context` chooses among `position`, `campaign`, `user_feature_0` to `_3` and `item_feature_1` to `_3`.

    Attributes:
      directory: of the two files.
    """

    directory: str

    @property
    def name(self) -> str:
        """The data set's own."""
        return "open-bandit"

    @property
    def places(self) -> Mapping[str, str]:
        """The one directory."""
        return {self.name: self.directory}

    @property
    def columns(self) -> ColumnMap:
        """The click is the label."""
        return ColumnMap(
            user="segment",
            item="advertisement",
            timestamp="timestamp",
            flags=("click",),
            behaviour=ABSENT,
        )

    def event_batches(self) -> Iterator[pa.RecordBatch]:
        """The impressions by time, with the features of what was shown."""
        path = Path(self.directory)
        shown = _plain(pq.read_table(path / "impressions.parquet"))
        items = _plain(pq.read_table(path / "items.parquet", columns=["item_id", "campaign", *_ITEM]))
        keys = [f"{campaign}/{item}" for campaign, item in _pairs(items)]
        of_items = {key: row for row, key in enumerate(keys)}
        advertisements = [f"{campaign}/{item}" for campaign, item in _pairs(shown)]
        rows = pa.array([of_items[key] for key in advertisements], pa.int64())
        parts = [shown[name].cast(pa.string()) for name in ("campaign", *_USER)]
        table = pa.table(
            {
                "segment": pc.binary_join_element_wise(*parts, "/"),
                "advertisement": advertisements,
                **{name: shown[name] for name in ("timestamp", "click", "position", "campaign", *_USER)},
                **{name: items[name].take(rows) for name in _ITEM},
            }
        )
        yield from table.sort_by("timestamp").combine_chunks().to_batches()


def _plain(table: pa.Table) -> pa.Table:
    """The values of categories in place of categories."""
    kinds = [
        pa.field(one.name, pa.string() if pa.types.is_dictionary(one.type) else one.type)
        for one in table.schema
    ]
    return table.cast(pa.schema(kinds))


def _pairs(table: pa.Table) -> Iterator[tuple[str, int]]:
    return zip(table["campaign"].to_pylist(), table["item_id"].to_pylist(), strict=True)
