"""MovieLens-1M in the order of the SASRec file, with the times that are known or estimated, and its films."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jaxrec.data.columns import ColumnMap
from jaxrec.data.own_source import OwnSource

__all__ = ["TimedFilms"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimedFilms(OwnSource):
    """The events of the SASRec file, with the times that ML-1M knows or estimates of them, and the films.

    Attributes:
      directory: that holds `ml-1m` and `ml-1m-sasrec`.
    """

    directory: str

    @property
    def places(self) -> Mapping[str, str]:
        """The two directories."""
        return {name: str(Path(self.directory) / name) for name in ("ml-1m", "ml-1m-sasrec")}

    @property
    def columns(self) -> ColumnMap:
        """The order of the file wins over times that are estimates."""
        return ColumnMap(timestamp="timestamp_est", order="order", text=("title", "genres", "abstract"))

    def event_batches(self) -> Iterator[pa.RecordBatch]:
        """In the file's order: among events of one second ML-1M has another."""
        events = pq.read_table(Path(self.directory) / "ml-1m-sasrec" / "events.parquet")
        pair, beside = ["user_id", "item_id"], ["rating", "timestamp_est"]
        known = pq.read_table(Path(self.directory) / "ml-1m" / "events.parquet", columns=[*pair, *beside])
        joined = events.select([*pair, "order"]).join(known, keys=pair, join_type="left outer")
        yield from joined.sort_by([("user_id", "ascending"), ("order", "ascending")]).to_batches()

    def item_batches(self) -> Iterator[pa.RecordBatch]:
        """Of all films."""
        yield from pq.read_table(Path(self.directory) / "ml-1m" / "items.parquet").to_batches()
