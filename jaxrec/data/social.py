"""Users who know each other: their friends become items beside those that they take, of a kind of their own.

A history holds what a user took and whom a user knows, and begins with the user. People are rows of the table of items
and no features of users, so that whatever ranks items ranks friends, and whatever reads a history reads friends. The
two kinds are never told from each other: each target is ranked among those of its kind.

An edge has no direction: it is in the histories of both users, in the same part of the split. Parts are drawn by hashes
of the pair of ids, so that no row moves another, and no order of the file becomes an order of time. Source of the
hold-out of edges: Liben-Nowell & Kleinberg, JASIST 2007.
"""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from jaxrec.data.columns import ABSENT, ColumnMap, ValueLabel, resolve_events
from jaxrec.data.config import DataConfig
from jaxrec.data.domain_keys import SEPARATOR, domain_keys
from jaxrec.data.domains import joined_items
from jaxrec.data.items import ItemColumns
from jaxrec.data.own_source import OwnSource
from jaxrec.data.prepare import open_source
from jaxrec.data.sources import Source, TableFiles
from jaxrec.data.validate import RowCheck, parse_ids

__all__ = ["ITEMS", "MOMENTS", "PEOPLE", "Social"]

ITEMS, PEOPLE = "items", "people"
MOMENTS = (1, 2)  # `data.split=GlobalTime(moments=MOMENTS)`: an event's time is the part that it is of
_TRAIN, _VALIDATION, _TEST = range(3)
_SCHEMA = pa.schema(
    [("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64()), ("order", pa.int64())]
)
_ROWS_AT_ONCE = 1 << 16

log = logging.getLogger(__name__)

Rows = list[tuple[str | None, str | None, int, int]]  # of `_SCHEMA`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Social(OwnSource):
    """Events and edges between users; goes with `data.split=GlobalTime(moments=(1, 2))`.

    Ids become text. Only who took what is kept of an event.

    Attributes:
      path: what `data.path` would be for the events.
      edges: Parquet or CSV beside them, one edge a row, in one direction or in both.
      user, friend: its columns.
      held_out: share of each user's events, and of all edges, that training does not see; half of it is for
        validation, half for test.
      friends_as_input: False = only edges of the test part are kept, and histories hold no friends, to see what friends
        are worth.
      seed: of the draw of the parts.
    """

    path: str
    edges: str
    user: str = "user_id"
    friend: str = "friend_id"
    held_out: float = 0.2
    friends_as_input: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"source.held_out={self.held_out} must lie between 0 and 1, e.g. 0.2.")

    @property
    def name(self) -> str:
        """That of the events."""
        return self._events.name

    @property
    def places(self) -> Mapping[str, str]:
        """The events'; the edges lie beside them."""
        return {"events": self.path}

    @property
    def columns(self) -> ColumnMap:
        """What the joined columns mean."""
        return ColumnMap(
            user="user_id",
            item="item_id",
            timestamp="timestamp",
            timestamps_are_ranks=False,
            timestamp_unit="s",
            order="order",
            id_type="string",
            value=ValueLabel(column=ABSENT),
            flags=(ABSENT,),
            behaviour=ABSENT,
            title="title",
            categories="categories",
            text=("text",),
            filter_seen=True,
        )

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is taken, and who is known."""
        return ITEMS, PEOPLE

    def event_batches(self) -> Iterator[pa.RecordBatch]:
        """The events, then each edge from both sides, then each user in the own history."""
        users: set[str] = set()
        for rows in self._event_rows(users):
            yield _batch(rows)
        edges = self._edges
        users |= {user for edge in edges for user in edge}
        for start in range(0, len(edges), _ROWS_AT_ONCE):
            yield _batch(self._edge_rows(edges[start : start + _ROWS_AT_ONCE]))
        everybody = sorted(users)
        for start in range(0, len(everybody), _ROWS_AT_ONCE):
            some = everybody[start : start + _ROWS_AT_ONCE]
            yield _batch([(user, _key(PEOPLE, user), _TRAIN, -1) for user in some])

    def item_batches(self) -> Iterator[pa.RecordBatch] | None:
        """The items of the events; people have no text."""
        table = self._events.items()
        if table is None:
            return None
        found = ItemColumns.find(self._map, table)
        return (joined_items(ITEMS, found, part.batch) for part in table.batches(found.names))

    def _event_rows(self, users: set[str]) -> Iterator[Rows]:
        """The rows of the events; their users are added to `users`. An id that is none stays null, to be set aside."""
        columns = self._map
        for part in self._events.events().batches([columns.user, columns.item]):
            check = RowCheck(part.batch.num_rows)
            ids = [
                domain_keys(kind, parse_ids(part.batch.column(name), name, "string", check), check.bad)
                for kind, name in ((PEOPLE, columns.user), (ITEMS, columns.item))
            ]
            rows: Rows = []
            for person, item in zip(*(column.to_pylist() for column in ids), strict=True):
                if person is None or item is None:
                    rows.append((None, None, _TRAIN, 0))
                    continue
                user = person.removeprefix(f"{PEOPLE}{SEPARATOR}")
                users.add(user)
                rows.append((user, item, *self._placed(0, user, item)))
            yield rows

    def _edge_rows(self, edges: Sequence[tuple[str, str]]) -> Rows:
        rows: Rows = []
        for one, other in edges:
            part, order = self._placed(1, one, other)
            if self.friends_as_input or part == _TEST:
                rows += [
                    (one, _key(PEOPLE, other), part, order),
                    (other, _key(PEOPLE, one), part, order),
                ]
        return rows

    def _placed(self, kind: int, one: str, other: str) -> tuple[int, int]:
        """The part of a pair and its order in a history: held-out items come before held-out people."""
        text = f"{self.seed}\n{kind}\n{one}\n{other}".encode()
        drawn = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
        share, within = (drawn >> 32) / 2**32, drawn % 2**32
        part = _TRAIN if share >= self.held_out else _TEST if share < self.held_out / 2 else _VALIDATION
        return part, (part << 40) + ((kind << 36) if part else 0) + within

    @functools.cached_property
    def _events(self) -> Source:
        return open_source(DataConfig(path=self.path))

    @functools.cached_property
    def _map(self) -> ColumnMap:
        table = self._events.events()
        return resolve_events(self._events.columns, table.schema.names, table.where)

    @functools.cached_property
    def _edges(self) -> list[tuple[str, str]]:
        """Each edge once, its ids rising."""
        path = Path(self.path)
        file = (path if path.is_dir() else path.parent) / self.edges
        if not file.is_file():
            raise ValueError(
                f"source.edges={self.edges!r}: there is no {file}; name a Parquet or CSV file beside the events."
            )
        table = TableFiles((file,))
        for field in ("user", "friend"):
            if getattr(self, field) not in table.schema.names:
                raise ValueError(
                    f"source.{field}={getattr(self, field)!r} is no column of {file}, which has "
                    f"{', '.join(table.schema.names)}."
                )
        found: set[tuple[str, str]] = set()
        unusable = 0
        for part in table.batches([self.user, self.friend]):
            check = RowCheck(part.batch.num_rows)
            ones, others = (
                pa.array(parse_ids(part.batch.column(name), name, "string", check)).to_pylist()
                for name in (self.user, self.friend)
            )
            unusable += len(part.unreadable)
            for one, other, bad in zip(ones, others, check.bad.tolist(), strict=True):
                if bad or one == other:
                    unusable += 1
                else:
                    found.add((min(one, other), max(one, other)))
        if unusable:
            log.warning("%s: %d rows are left out: no id, or a user as the own friend", file, unusable)
        if not found:
            raise ValueError(f"{file} holds no edge between two users; name another file, or use data.path.")
        return sorted(found)


def _key(kind: str, own_id: str) -> str:
    return f"{kind}{SEPARATOR}{own_id}"


def _batch(rows: Rows) -> pa.RecordBatch:
    columns = zip(*rows, strict=True) if rows else [[]] * len(_SCHEMA)
    return pa.RecordBatch.from_arrays(
        [pa.array(list(column), one.type) for column, one in zip(columns, _SCHEMA, strict=True)],
        schema=_SCHEMA,
    )
