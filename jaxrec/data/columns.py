"""The column map: which column of a source is the user, the item, the time, the labels.

A field that is "" is found by its usual name; a field that is "-" is declared absent, whatever the file holds. So
an empty `ColumnMap()` fits every directory in the layout of docs/data.md, and one dotted override changes one field:
`--data.columns.value.at_least=3.5`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

ABSENT = "-"

TimestampUnit = Literal["s", "ms", "us", "ns"]
UNITS_PER_SECOND: Mapping[str, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


@dataclass(frozen=True, kw_only=True)
class ValueLabel:
    """A number beside each event that becomes a behaviour: label 1 where it reaches the threshold.

    Attributes:
      column: the column of numbers (a rating, a count)
      name: what the behaviour is called; "" = the usual name, such as `like` for a rating
      at_least: the threshold; none = the usual one, such as 4 for a rating
    """

    column: str = ""
    name: str = ""
    at_least: float | None = None


@dataclass(frozen=True, kw_only=True)
class ColumnMap:
    """Where each part of an event is found; "" = by its usual name, "-" = declared absent.

    Attributes:
      events: file, folder or pattern of the events, relative to the directory
      items: file, folder or pattern of the items
      users: file, folder or pattern of the users
      user: column of the user's id
      item: column of the item's id
      timestamp: column of the time
      timestamp_unit: what a number in that column counts
      timestamps_are_ranks: the times are only positions in a history; none = found out
      order: column of the position in the user's history; it wins over the time
      id_type: auto = the column's own type
      value: a number that becomes a behaviour by a threshold
      flags: wide 0/1 columns, each a behaviour; "-" = none
      behaviour: column of names, each a behaviour
      context: columns that say where an event happens, known before its outcome: a device, a place on the page
      title: column of the items table
      categories: column of the items table: a list, or a string to split
      category_separator: where to split; "" = found out
      text: columns of the items table that become tokens, in this order; "-" = none
      features: columns of the items table that say what an item is, each value a word or a number; see `item_features`
      filter_seen: whether an item that a user has seen is no answer; none = by the share of repeats
    """

    events: str = ""
    items: str = ""
    users: str = ""

    user: str = ""
    item: str = ""
    timestamp: str = ""
    timestamp_unit: TimestampUnit = "s"
    timestamps_are_ranks: bool | None = None
    order: str = ""
    id_type: Literal["auto", "int64", "string"] = "auto"

    value: ValueLabel = field(default_factory=ValueLabel)
    flags: tuple[str, ...] = ()
    behaviour: str = ""
    context: tuple[str, ...] = ()

    title: str = ""
    categories: str = ""
    category_separator: str = ""
    text: tuple[str, ...] = ()
    features: tuple[str, ...] = ()

    filter_seen: bool | None = None

    def __post_init__(self) -> None:
        if self.timestamp_unit not in UNITS_PER_SECOND:
            raise ValueError(
                f"columns.timestamp_unit={self.timestamp_unit!r} must be one of {', '.join(UNITS_PER_SECOND)}."
            )
        if self.id_type not in ("auto", "int64", "string"):
            raise ValueError(f"columns.id_type={self.id_type!r} must be 'auto', 'int64' or 'string'.")


# The usual names, most specific first. Only whole names match: a wrong guess is worse than a question.
USUAL_NAMES: Mapping[str, tuple[str, ...]] = {
    "user": (
        "user_id",
        "userId",
        "userid",
        "user",
        "uid",
        "session_id",
        "SessionId",
        "sessionId",
        "visitorid",
    ),
    "item": (
        "item_id",
        "itemId",
        "itemid",
        "item",
        "iid",
        "movie_id",
        "movieId",
        "product_id",
        "ItemId",
        "video_id",
    ),
    "timestamp": ("timestamp", "Timestamp", "time", "ts", "datetime", "date", "event_time"),
    "order": ("order",),
    "behaviour": ("behaviour", "behavior", "event_type", "event", "action"),
    "title": ("title", "movie_title", "item_title", "name"),
    "categories": ("genres", "categories", "category", "movie_genres", "attribute_ids"),
}
# Column -> (behaviour, threshold). A rating of 4 of 5 is the customary reading of "liked it".
VALUE_COLUMNS: Mapping[str, tuple[str, float]] = {
    "rating": ("like", 4.0),
    "user_rating": ("like", 4.0),
    "stars": ("like", 4.0),
    "listen_count": ("listen_often", 100.0),
    "play_count": ("play_often", 10.0),
}
FLAG_PREFIX = "is_"
FLAG_NAMES = (
    "click",
    "like",
    "buy",
    "cart",
    "purchase",
    "long_view",
    "share",
    "follow",
    "favourite",
    "favorite",
)
TEXT_COLUMNS = (
    "title",
    "genres",
    "categories",
    "keywords",
    "authors",
    "brand",
    "description",
    "abstract",
    "text",
)


def flag_behaviour(column: str) -> str:
    """`is_click` -> `click`: the behaviour that a wide 0/1 column stands for."""
    return column.removeprefix(FLAG_PREFIX) or column


def fill_from(column_map: ColumnMap, known: ColumnMap) -> ColumnMap:
    """Fields that `column_map` leaves at their default are taken from `known`; what the user set stays."""
    unset = ColumnMap()
    changes: dict[str, object] = {}
    for one in dataclasses.fields(ColumnMap):
        mine = getattr(column_map, one.name)
        if one.name == "value":
            theirs = known.value
            changes["value"] = ValueLabel(
                column=mine.column or theirs.column,
                name=mine.name or ("" if mine.column and mine.column != theirs.column else theirs.name),
                at_least=mine.at_least if mine.at_least is not None else theirs.at_least,
            )
        elif mine == getattr(unset, one.name):
            changes[one.name] = getattr(known, one.name)
    return dataclasses.replace(column_map, **changes)  # type: ignore[arg-type]


def resolve_events(column_map: ColumnMap, names: Sequence[str], where: str) -> ColumnMap:
    """Every event field of the map becomes a column that exists, or "-".

    Raises:
      ValueError: a column that the map names, or the user or item column, does not exist.
    """
    changes: dict[str, object] = {}
    for part in ("user", "item", "timestamp", "order", "behaviour"):
        changes[part] = _find(getattr(column_map, part), part, names, where)
    for part in ("user", "item"):
        if changes[part] == ABSENT:
            raise ValueError(
                f"{where} has no {part} column: its columns are {', '.join(names) or 'none'}, and none is called "
                f"{', '.join(USUAL_NAMES[part])}; name it with --data.columns.{part}=COLUMN."
            )
    changes["value"] = _resolve_value(column_map.value, names, where)
    flags = column_map.flags
    if not flags:
        flags = tuple(n for n in names if n.startswith(FLAG_PREFIX) or n in FLAG_NAMES)
        flags = tuple(n for n in flags if n not in changes.values())
    elif flags == (ABSENT,):
        flags = ()
    for flag in flags:
        require(flag, "flags", names, where)
    changes["flags"] = flags
    for column in column_map.context:
        require(column, "context", names, where)
        labels = {*flags, changes["behaviour"], column_map.value.column}
        if column in labels - {ABSENT, ""}:
            raise ValueError(
                f"columns.context names {column!r}, which is a label; no label may enter an input."
            )
    return dataclasses.replace(column_map, **changes)  # type: ignore[arg-type]


def direct_behaviours(column_map: ColumnMap) -> tuple[str, ...]:
    """Behaviours that the columns name by themselves: the thresholded value, then the flags.

    Raises:
      ValueError: two columns claim the same behaviour.
    """
    names = [column_map.value.name] if column_map.value.column != ABSENT else []
    for flag in column_map.flags:
        short = flag_behaviour(flag)
        # A rating and an is_like beside it would both be `like`: the flag then keeps its whole name.
        names.append(flag if short in names else short)
    if len(set(names)) != len(names):
        raise ValueError(
            f"the behaviours {', '.join(names)} are not distinct; set --data.columns.value.name to another name."
        )
    return tuple(names)


def _find(wanted: str, part: str, names: Sequence[str], where: str) -> str:
    if wanted == ABSENT:
        return ABSENT
    if wanted:
        return require(wanted, part, names, where)
    return next((name for name in USUAL_NAMES[part] if name in names), ABSENT)


def require(column: str, part: str, names: Sequence[str], where: str) -> str:
    """The column; ValueError where there is none of that name."""
    if column not in names:
        raise ValueError(
            f"columns.{part}={column!r}, but {where} has the columns {', '.join(names) or 'none'}; name one of "
            f"these, or '-' when there is none."
        )
    return column


def _resolve_value(value: ValueLabel, names: Sequence[str], where: str) -> ValueLabel:
    column = value.column
    if column == ABSENT:
        return ValueLabel(column=ABSENT)
    if column:
        require(column, "value.column", names, where)
    else:
        column = next((name for name in VALUE_COLUMNS if name in names), ABSENT)
    if column == ABSENT:
        return ValueLabel(column=ABSENT)
    name, at_least = VALUE_COLUMNS.get(column, (column, 1.0))
    return ValueLabel(
        column=column,
        name=value.name or name,
        at_least=at_least if value.at_least is None else float(value.at_least),
    )


def find_item_column(column_map: ColumnMap, part: str, names: Sequence[str], where: str) -> str:
    """The column of the items table for `part` (item, title, categories), or "-".

    Raises:
      ValueError: the map names a column that the table lacks.
    """
    wanted = getattr(column_map, part)
    if part == "item":
        # The items table may use the usual name although the events use another one.
        if wanted and wanted != ABSENT and wanted in names:
            return str(wanted)
        wanted = ""
    return _find(wanted, part, names, where)


def text_columns(column_map: ColumnMap, names: Sequence[str], where: str) -> tuple[str, ...]:
    """The columns of the items table whose words become tokens.

    Raises:
      ValueError: the map names a column that the table lacks.
    """
    if column_map.text == (ABSENT,):
        return ()
    if column_map.text:
        return tuple(require(name, "text", names, where) for name in column_map.text)
    title = find_item_column(column_map, "title", names, where)
    first = () if title == ABSENT else (title,)
    return first + tuple(name for name in TEXT_COLUMNS if name in names and name not in first)
