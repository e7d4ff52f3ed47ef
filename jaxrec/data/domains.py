"""Several domains as one data set: shops, markets, apps whose users and items differ.

Each domain is read as it would be by itself, by its own column map, and becomes rows with the same columns: ids as
`domain:id`, so that user 7 of one domain is nobody in another. What a domain lacks is null in its rows.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from jaxrec.data.columns import ABSENT, ColumnMap, ValueLabel, resolve_events
from jaxrec.data.config import DataConfig
from jaxrec.data.domain_keys import SEPARATOR, domain_keys
from jaxrec.data.items import FEATURES, ItemCells, ItemColumns
from jaxrec.data.own_source import OwnSource
from jaxrec.data.prepare import open_source
from jaxrec.data.sources import Source, SourceBatch, Table
from jaxrec.data.validate import RowCheck, is_text, parse_ids

__all__ = ["Domains", "joined_items"]

T = TypeVar("T")

USER, ITEM, TIMESTAMP, ORDER, BEHAVIOUR = "user_id", "item_id", "timestamp", "order", "behaviour"
_ITEM_SCHEMA = pa.schema(
    [
        (ITEM, pa.string()),
        ("title", pa.string()),
        ("categories", pa.list_(pa.string())),
        ("text", pa.string()),
        (FEATURES, pa.list_(pa.string())),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domains(OwnSource):
    """One data set out of several, each with its users and its catalogue.

    Attributes:
      paths: what `data.path` would be for each domain alone, by the domain's name.
    """

    paths: Mapping[str, str]

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("source.paths is empty; name a directory for each domain.")
        for name in self.paths:
            if not name or SEPARATOR in name:
                raise ValueError(
                    f"source.paths: {name!r} cannot be a domain's name: it stands before {SEPARATOR!r} in every id; "
                    "use letters, digits and '_'."
                )

    @property
    def name(self) -> str:
        """The domains' names."""
        return "+".join(self.paths)

    @property
    def domains(self) -> tuple[str, ...]:
        """In the order of `paths`."""
        return tuple(self.paths)

    @property
    def places(self) -> Mapping[str, str]:
        """The domains' directories."""
        return self.paths

    @property
    def columns(self) -> ColumnMap:
        """What the joined columns mean.

        Raises:
          ValueError: the domains' maps contradict each other.
        """
        maps = self._maps
        ranks, timestamp, order = _place_in_history(maps)
        value = _agreed(
            {name: one.value for name, one in maps.items() if one.value.column != ABSENT}, "value"
        )
        flags = tuple(dict.fromkeys(flag for one in maps.values() for flag in one.flags))
        return ColumnMap(
            user=USER,
            item=ITEM,
            timestamp=timestamp,
            timestamps_are_ranks=ranks,
            timestamp_unit="s"
            if timestamp == ABSENT
            else _agreed({name: one.timestamp_unit for name, one in maps.items()}, "timestamp_unit") or "s",
            order=order,
            id_type="string",
            value=value or ValueLabel(column=ABSENT),
            flags=flags or (ABSENT,),
            behaviour=BEHAVIOUR if any(one.behaviour != ABSENT for one in maps.values()) else ABSENT,
            title="title",
            categories="categories",
            text=("text",),
            features=(FEATURES,) if any(one.features for one in maps.values()) else (),
            filter_seen=_agreed({name: one.filter_seen for name, one in maps.items()}, "filter_seen"),
        )

    def events(self) -> "JoinedTable":
        """The events, domain after domain."""
        maps, joined = self._maps, self.columns
        raw = {name: _raw_columns(one, joined) for name, one in maps.items()}
        tables = {name: source.events() for name, source in self._sources.items()}
        kinds = {USER: pa.string(), ITEM: pa.string()}
        for column in dict.fromkeys(column for names in raw.values() for column in names):
            if column not in kinds:
                found = {d: tables[d].schema.field(raw[d][column]).type for d in raw if column in raw[d]}
                kinds[column] = _common_type(column, found)
        schema = pa.schema(list(kinds.items()))

        def convert(domain: str, batch: pa.RecordBatch) -> pa.RecordBatch:
            return _joined_events(domain, batch, raw[domain], schema)

        parts = {
            name: Part(
                table=tables[name],
                names=list(dict.fromkeys(raw[name].values())),
                meaning=raw[name],
                convert=functools.partial(convert, name),
            )
            for name in tables
        }
        return JoinedTable(parts, schema, f"{self.name} (events)")

    def items(self) -> "JoinedTable | None":
        """The items of the domains that have a table of them."""
        parts = {}
        for name, source in self._sources.items():
            table = source.items()
            if table is not None:
                found = ItemColumns.find(self._maps[name], table)
                parts[name] = Part(
                    table=table,
                    names=found.names,
                    meaning=dataclasses.asdict(found),
                    convert=functools.partial(joined_items, name, found),
                )
        return JoinedTable(parts, _ITEM_SCHEMA, f"{self.name} (items)") if parts else None

    @functools.cached_property
    def _sources(self) -> dict[str, Source]:
        found = {}
        for name, path in self.paths.items():
            try:
                found[name] = open_source(DataConfig(path=path))
            except (ValueError, OSError) as error:
                raise ValueError(f"source.paths.{name}: {error}") from error
        return found

    @functools.cached_property
    def _maps(self) -> dict[str, ColumnMap]:
        """Each domain's own map, every event field a column or "-"."""
        found = {}
        for name, source in self._sources.items():
            table = source.events()
            found[name] = resolve_events(source.columns, table.schema.names, table.where)
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A domain's table on its way into the joined one.

    Attributes:
      names: the columns that are read.
      meaning: what becomes of them; part of the digest.
      convert: its rows, as rows of the joined table.
    """

    table: Table
    names: Sequence[str]
    meaning: Mapping[str, object]
    convert: Callable[[pa.RecordBatch], pa.RecordBatch]


class JoinedTable:
    """The rows of all domains, each where its own file has it."""

    has_text_ids = False

    def __init__(self, parts: Mapping[str, Part], schema: pa.Schema, where: str):
        self._parts, self.schema, self.where = parts, schema, where

    def estimated_rows(self) -> int:
        """The sum of the domains'."""
        return sum(part.table.estimated_rows() for part in self._parts.values())

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[SourceBatch]:
        """The rows, domain after domain, `columns` of them only; a domain is named before its file."""
        for domain, part in self._parts.items():
            for one in part.table.batches(part.names):
                batch = part.convert(one.batch)
                if columns is not None:
                    batch = batch.select(list(columns))
                yield SourceBatch(f"{domain}/{one.source}", one.rows, batch, one.unreadable)

    def digest(self) -> str:
        """A hash of the domains' names, of their content, and of what their columns mean."""
        described = [
            [domain, part.meaning, part.table.digest(), str(self.schema)]
            for domain, part in self._parts.items()
        ]
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _place_in_history(maps: Mapping[str, ColumnMap]) -> tuple[bool | None, str, str]:
    """Whether times are ranks, and the columns of time and order: those that every domain has."""
    ranks = {bool(one.timestamps_are_ranks) for one in maps.values() if one.timestamp != ABSENT}
    timed = [one.timestamp != ABSENT for one in maps.values()]
    ordered = [one.order != ABSENT for one in maps.values()]
    # Ranks beside times would be seconds of 1970.
    keeps_time = all(timed) and len(ranks) == 1
    if not keeps_time and not all(ordered) and any(timed + ordered):
        have = ", ".join(
            f"{name} {'a time' if time else ''}{' and ' if time and order else ''}{'an order' if order else ''}"
            for name, time, order in zip(maps, timed, ordered, strict=True)
            if time or order
        )
        raise ValueError(
            f"the domains {', '.join(maps)} have no common column to put histories in order by ({have}); give each an "
            "order, or each real times."
        )
    declared = {one.timestamps_are_ranks for one in maps.values()}
    return (
        declared.pop() if keeps_time and len(declared) == 1 else None,
        TIMESTAMP if keeps_time else ABSENT,
        ORDER if all(ordered) else ABSENT,
    )


def _agreed(found: Mapping[str, T], field: str) -> T | None:
    """What the maps of all domains say; None where none says anything."""
    values = list(dict.fromkeys(value for value in found.values() if value is not None))
    if len(values) > 1:
        says = "; ".join(f"{name}: {value}" for name, value in found.items())
        raise ValueError(
            f"columns.{field} differs between the domains ({says}), and one data set has one; write the files alike, "
            "or train these domains apart."
        )
    return values[0] if values else None


def _raw_columns(own: ColumnMap, joined: ColumnMap) -> dict[str, str]:
    """Joined column -> the domain's own, for those that it has."""
    found = {USER: own.user, ITEM: own.item} | {flag: flag for flag in own.flags}
    pairs = (
        (TIMESTAMP, joined.timestamp, own.timestamp),
        (ORDER, joined.order, own.order),
        (joined.value.column, joined.value.column, own.value.column),
        (BEHAVIOUR, joined.behaviour, own.behaviour),
    )
    return found | {name: ours for name, theirs, ours in pairs if ABSENT not in (theirs, ours)}


def _common_type(column: str, kinds: Mapping[str, pa.DataType]) -> pa.DataType:
    """One type that holds the columns of all domains."""
    found = list(dict.fromkeys(kinds.values()))
    if len(found) == 1:
        return found[0]
    if all(map(pa.types.is_integer, found)):
        return pa.int64()
    if all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in found):
        return pa.float64()
    if all(map(is_text, found)):
        return pa.binary()
    says = ", ".join(f"{kind} in {name}" for name, kind in kinds.items())
    raise ValueError(f"the column {column!r} is {says}; write it as one type in all domains.")


def _joined_events(
    domain: str, batch: pa.RecordBatch, raw: Mapping[str, str], schema: pa.Schema
) -> pa.RecordBatch:
    columns = []
    for one in schema:
        if one.name in (USER, ITEM):
            columns.append(_keys(domain, batch.column(raw[one.name]), raw[one.name]))
        elif one.name in raw:
            columns.append(pc.cast(batch.column(raw[one.name]), one.type))
        else:
            columns.append(pa.nulls(batch.num_rows, one.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def joined_items(domain: str, columns: ItemColumns, batch: pa.RecordBatch) -> pa.RecordBatch:
    """Rows of an items table with ids, and categories, that say which domain they are of."""
    cells, rows = ItemCells(columns, batch), range(batch.num_rows)
    # A number without a name would mean one category in two catalogues.
    categories = [[f"{domain}{SEPARATOR}{name}" for name in cells.categories(row)] for row in rows]
    return pa.RecordBatch.from_arrays(
        [
            _keys(domain, batch.column(columns.item), columns.item),
            pa.array([cells.title(row) for row in rows], pa.string()),
            pa.array(categories, pa.list_(pa.string())),
            pa.array([cells.text(row) for row in rows], pa.string()),
            pa.array([list(cells.features(row)) for row in rows], pa.list_(pa.string())),
        ],
        schema=_ITEM_SCHEMA,
    )


def _keys(domain: str, column: pa.Array, name: str) -> pa.Array:
    """The ids among all domains; null, and so set aside, where the domain's own is no id."""
    check = RowCheck(len(column))
    return domain_keys(domain, parse_ids(column, name, "auto", check), check.bad)
