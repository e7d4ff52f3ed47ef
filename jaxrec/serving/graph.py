"""Rules of a knowledge graph: an item is kept from those who lack what comes before it.

A graph is a table of edges, `head`, `relation`, `tail`, in the catalogue's own ids: Parquet, or CSV with a first line
of names. "Never a sequel before its first part" is one relation of it.
"""

import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from jaxrec.serving.rules import Prerequisites
from jaxrec.serving.view import View

__all__ = ["GraphRules"]

COLUMNS = ("head", "relation", "tail")
MOST_EDGES = 1_000_000
# Text as it stands in the file: 0012 is not 12, and an id may be NA.
AS_WRITTEN = csv.ConvertOptions(
    column_types=dict.fromkeys(COLUMNS, pa.string()), strings_can_be_null=True, null_values=[""]
)


class GraphRules:
    """What an item needs, by the items' own ids; made by `read`."""

    def __init__(self, edges: Sequence[tuple[str, str]]):
        """`edges` are (item, what must be in the history)."""
        self._edges = edges
        self._of_views: weakref.WeakKeyDictionary[View, Prerequisites] = weakref.WeakKeyDictionary()

    @classmethod
    def read(cls, path: Path, relation: str) -> Self:
        """The edges of a relation: its heads need its tails; with a `~` before its name, its tails need its heads.

        Raises:
          ValueError: the file is no such table, is too large, or has no edge of the relation; says which there are.
        """
        name = relation.removeprefix("~")
        try:
            table = (
                pq.read_table(path)
                if path.suffix == ".parquet"
                else csv.read_csv(path, convert_options=AS_WRITTEN)
            )
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"the graph {path} cannot be read: {error}") from error
        if missing := [column for column in COLUMNS if column not in table.column_names]:
            raise ValueError(
                f"the graph {path} has no column {missing[0]!r}; it must have {', '.join(COLUMNS)}."
            )
        if len(table) > MOST_EDGES:
            raise ValueError(
                f"the graph {path} has {len(table):,} edges, and at most {MOST_EDGES:,} are read."
            )
        try:
            head, of_edge, tail = (pc.cast(table[column], pa.string()) for column in COLUMNS)
        except pa.ArrowException as error:
            raise ValueError(
                f"the graph {path} has a column that is neither text nor numbers: {error}; {', '.join(COLUMNS)} must "
                "be one or the other."
            ) from error
        chosen = pc.equal(of_edge, name)
        if not pc.any(chosen).as_py():
            known = ", ".join(sorted(str(value) for value in pc.unique(of_edge).to_pylist())[:20])
            raise ValueError(f"the graph {path} has no edge {name!r}; it has {known or 'none at all'}.")
        item, needed = (tail, head) if relation.startswith("~") else (head, tail)
        return cls(list(_pairs(item.filter(chosen), needed.filter(chosen))))

    def of(self, view: View) -> Prerequisites:
        """In the ids of a view, once for each.

        An item that needs something outside of the catalogue is never shown; edges of unknown items say nothing.
        """
        if (found := self._of_views.get(view)) is None:
            known = [(item, needed) for key, needed in self._edges if (item := view.id_of(key))]
            found = Prerequisites.of([(item, view.id_of(needed)) for item, needed in known])
            self._of_views[view] = found
        return found


def _pairs(items: pa.ChunkedArray, needed: pa.ChunkedArray) -> Iterator[tuple[str, str]]:
    for item, need in zip(items.to_pylist(), needed.to_pylist(), strict=True):
        if item is not None and need is not None:
            yield item, need
