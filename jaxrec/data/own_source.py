"""A data set of one's own: subclass `OwnSource` in one file, name the subclass in a config.

Whatever can be read as Arrow record batches is a source: a log format, a database, a service's export. Everything
after that (checks, quarantine, vocabularies, split) is prepare's.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from jaxrec.data.columns import ColumnMap
from jaxrec.data.sources import SourceBatch, Table

__all__ = ["BatchTable", "OwnSource"]


@dataclass(frozen=True, kw_only=True)
class OwnSource:
    """Base of the sources that a project adds; the fields of a subclass are its settings."""

    @property
    def name(self) -> str:
        """What the data set is called."""
        return type(self).__name__

    @property
    def columns(self) -> ColumnMap:
        """What the columns mean; the usual names need no map."""
        return ColumnMap()

    @property
    def domains(self) -> tuple[str, ...]:
        """Catalogues that the source joins; see `data.domains`."""
        return ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of items that are never told from each other; their ids are `kind:id`. () = all are of one kind."""
        return ()

    @property
    def places(self) -> Mapping[str, str]:
        """What it reads, as `data.path` would say it, by a name for each; {} = nothing that has a path."""
        return {}

    def event_batches(self) -> Iterator[pa.RecordBatch]:
        """The events in their own order, the same at every call."""
        raise TypeError(f"{type(self).__name__} must define event_batches")

    def item_batches(self) -> Iterator[pa.RecordBatch] | None:
        """The items with their titles; None = items have no text."""
        return None

    def events(self) -> Table:
        """The events, as prepare reads them."""
        return BatchTable(self.event_batches, f"{self.name} (events)")

    def items(self) -> Table | None:
        """The items, as prepare reads them."""
        if self.item_batches() is None:
            return None
        return BatchTable(lambda: self.item_batches() or iter(()), f"{self.name} (items)")

    def users(self) -> Table | None:
        """No table of users."""
        return None


class BatchTable:
    """A table out of a function that yields record batches anew at every call.

    Raises:
      ValueError: the function yields no batch, so that nothing says what the columns are.
    """

    has_text_ids = False

    def __init__(self, make: Callable[[], Iterator[pa.RecordBatch]], where: str):
        self._make, self.where = make, where
        first = next(iter(make()), None)
        if first is None:
            raise ValueError(
                f"{where} yields no record batch; yield at least one, with the columns' names and types."
            )
        self.schema: pa.Schema = first.schema

    def estimated_rows(self) -> int:
        """Exact, by reading."""
        return sum(batch.num_rows for batch in self._make())

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[SourceBatch]:
        """The rows, in order, `columns` of them only."""
        start = 0
        for batch in self._make():
            chosen = batch if columns is None else batch.select(list(columns))
            yield SourceBatch(self.where, np.arange(start, start + batch.num_rows), chosen)
            start += batch.num_rows

    def digest(self) -> str:
        """A hash of the content."""
        found = hashlib.sha256()
        for batch in self._make():
            found.update(batch.serialize())
        return found.hexdigest()
