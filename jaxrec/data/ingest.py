"""The first pass: every row of the source is read once, checked, counted and spooled by user.

Letters: E events of a record batch, K behaviours.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float64, Int8, UInt64

from jaxrec.data.columns import ABSENT, UNITS_PER_SECOND, ColumnMap, direct_behaviours
from jaxrec.data.context import context_ids
from jaxrec.data.mixed_bits import ODD, mixed
from jaxrec.data.quarantine import Quarantine
from jaxrec.data.sources import SourceBatch, Table
from jaxrec.data.spool import UNKNOWN, Spool, record_type
from jaxrec.data.validate import (
    RowCheck,
    as_text,
    blank_to_null,
    cell,
    is_text,
    parse_flags,
    parse_ids,
    parse_numbers,
    parse_times,
    ticks_per_second,
)
from jaxrec.data.vocabulary import KeyIndex

__all__ = ["Ingested", "ingest"]

log = logging.getLogger(__name__)

_MAX_NAMED_BEHAVIOURS = 120
UNREADABLE = "the row is unreadable: wrong number of cells"


@dataclass
class Ingested:
    """What the first pass knows: the spool, the ids, and the counts for the report."""

    spool: Spool
    columns: ColumnMap
    behaviours: tuple[str, ...]
    ticks_per_second: int
    users: KeyIndex = field(default_factory=KeyIndex)
    items: KeyIndex = field(default_factory=KeyIndex)
    names: KeyIndex = field(default_factory=KeyIndex)
    rows_read: int = 0
    rows_kept: int = 0
    null_times: int = 0
    null_orders: int = 0
    times_equal_orders: bool = True
    min_time: int | None = None
    max_time: int | None = None


def ingest(
    table: Table, columns: ColumnMap, directory: Path, quarantine: Quarantine, progress: Callable[[int], None]
) -> Ingested:
    """Read, check and spool all events.

    Raises:
      ValueError: a column is of a type that cannot be what the map says, or no row is usable.
    """
    kinds = _text_kinds(table, columns)
    direct = direct_behaviours(columns)
    dtype = record_type(
        len(direct),
        has_time=columns.timestamp != ABSENT,
        has_order=columns.order != ABSENT,
        has_names=columns.behaviour != ABSENT,
        has_value=columns.value.column != ABSENT,
        num_context=len(columns.context),
    )
    ticks = 1
    if columns.timestamp != ABSENT:
        kind = table.schema.field(columns.timestamp).type
        ticks = ticks_per_second(kind, kinds.get("timestamp", ""), UNITS_PER_SECOND[columns.timestamp_unit])
    state = Ingested(Spool(directory, dtype, table.estimated_rows()), columns, direct, ticks)
    for part in table.batches():
        _ingest_batch(part, state, kinds, quarantine)
        progress(state.rows_read)
    if not state.rows_read:
        raise ValueError(f"{table.where} holds no rows: an empty table cannot be prepared; check the export.")
    if not state.rows_kept:
        reasons = "; ".join(
            f"{one['reason']} ({one['rows']} rows, e.g. {one['example']})" for one in quarantine.summary()
        )
        raise ValueError(f"{table.where}: none of the {state.rows_read} rows is usable: {reasons}.")
    return state


def _text_kinds(table: Table, columns: ColumnMap) -> dict[str, str]:
    """What the text of the id and time columns says, by reading these columns once.

    Ids: integers if every cell is a number written without leading zeros, else strings. Times: integers, else
    floats, else ISO dates.
    """
    kinds: dict[str, str] = {}
    looked_at: dict[str, str] = {}
    for part in ("user", "item"):
        column = getattr(columns, part)
        if columns.id_type != "auto":
            kinds[part] = columns.id_type
        elif table.has_text_ids:
            looked_at[part] = column
    for part in ("timestamp", "order"):
        column = getattr(columns, part)
        if column != ABSENT and is_text(table.schema.field(column).type):
            looked_at[part] = column
    if not looked_at:
        return kinds
    patterns = {"user": (_NUMBER_ID,), "item": (_NUMBER_ID,)}
    misses = {part: [0] * 2 for part in looked_at}
    cells = dict.fromkeys(looked_at, 0)
    for batch in table.batches(list(dict.fromkeys(looked_at.values()))):
        for part, column in looked_at.items():
            text = pc.drop_null(blank_to_null(as_text(batch.batch.column(column))[0]))
            cells[part] += len(text)
            for at, pattern in enumerate(patterns.get(part, (_INTEGER_TIME, _FLOAT_TIME))):
                matches = pc.match_substring_regex(text, pattern)
                misses[part][at] += len(matches) - (pc.sum(matches).as_py() or 0)
    for part, (first, second) in misses.items():
        if part not in patterns:
            kinds[part] = "int" if not first else "float" if not second else "datetime"
            continue
        kinds[part] = "string" if first else "int64"
        if 0 < first < cells[part] * _FEW:
            log.warning(
                "%s: %d of the %d cells of %s are no plain numbers, so all of them are taken for text; with "
                "columns.id_type=int64 these rows are quarantined instead",
                table.where,
                first,
                cells[part],
                looked_at[part],
            )
    return kinds


_FEW = 0.01
# A leading zero is no number's: `007` and `7` are two ids.
_NUMBER_ID = r"^[+-]?(0|[1-9][0-9]*)(\.[0-9]*)?([eE][+-]?[0-9]+)?$"
_INTEGER_TIME = r"^[+-]?[0-9]+(\.0*)?$"
_FLOAT_TIME = r"^([+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[nN][aA][nN])$"


def _ingest_batch(part: SourceBatch, state: Ingested, kinds: dict[str, str], quarantine: Quarantine) -> None:
    batch, columns, size = part.batch, state.columns, part.batch.num_rows
    for row, line in part.unreadable:
        quarantine.add(f"events:{part.source}", row, UNREADABLE, line)
    state.rows_read += size + len(part.unreadable)
    if not size:
        return
    check = RowCheck(size)
    users = parse_ids(batch.column(columns.user), columns.user, kinds.get("user", "auto"), check)
    items = parse_ids(batch.column(columns.item), columns.item, kinds.get("item", "auto"), check)
    records = np.zeros(size, state.spool.dtype)
    # An order counts nothing: the unit is the time's alone.
    for name, part_name, unit in (("time", "timestamp", columns.timestamp_unit), ("order", "order", "s")):
        column = getattr(columns, part_name)
        if column != ABSENT:
            kind = kinds.get(part_name, "")
            records[name] = parse_times(batch.column(column), column, kind, check, UNITS_PER_SECOND[unit])
    values = None
    if columns.value.column != ABSENT:
        values = parse_numbers(batch.column(columns.value.column), columns.value.column, check)
        with np.errstate(over="ignore"):
            records["value"] = values
    if state.behaviours:
        # By the values as they were read: in float32 some fall below a threshold that they reach.
        records["labels"] = _direct_labels(batch, columns, values, check)
    if columns.context:
        hashed = [context_ids(batch.column(column), column) for column in columns.context]
        records["context"] = np.stack(hashed, axis=1)
    names: pa.Array | None = None
    if columns.behaviour != ABSENT:
        column = batch.column(columns.behaviour)
        if pa.types.is_nested(column.type):
            raise ValueError(
                f"{columns.behaviour} is of type {column.type}, but a behaviour is one word or number a row; "
                "name another column, or '-' for none."
            )
        names, unreadable = as_text(column)
        check.flag(unreadable, f"{columns.behaviour} is not UTF-8")
    if columns.order != ABSENT:
        nowhere = records["order"] == UNKNOWN
        if columns.timestamp != ABSENT:
            nowhere &= records["time"] == UNKNOWN
        check.flag(nowhere, "neither order nor timestamp: its place in the history is unknown")
    set_aside(part, check, f"events:{part.source}", quarantine)
    keep = ~check.bad
    mask = pa.array(keep)
    records["hash"] = row_hashes(batch)
    if names is not None:
        records["behaviour"] = _name_codes(names, keep, state)
    records = records[keep]
    if not len(records):
        return
    records["user"] = state.users.add(users.filter(mask) if isinstance(users, pa.Array) else users[keep])
    records["item"] = state.items.add(items.filter(mask) if isinstance(items, pa.Array) else items[keep])
    _count(records, state)
    state.spool.append(records)


def set_aside(part: SourceBatch, check: RowCheck, source: str, quarantine: Quarantine) -> None:
    """Write the rows that failed the check to the quarantine, as they were read."""
    names, columns = part.batch.schema.names, part.batch.columns
    for row, reason in sorted(check.reasons.items()):
        content = {name: cell(column[row]) for name, column in zip(names, columns, strict=True)}
        quarantine.add(source, int(part.rows[row]), reason, content)


def _direct_labels(
    batch: pa.RecordBatch, columns: ColumnMap, values: Float64[np.ndarray, " e"] | None, check: RowCheck
) -> Int8[np.ndarray, "e k"]:
    labels = []
    if values is not None:
        assert columns.value.at_least is not None, "resolve_events fills the threshold"
        with np.errstate(invalid="ignore"):
            labels.append(np.where(np.isnan(values), -1, values >= columns.value.at_least))
    labels += [parse_flags(batch.column(flag), flag, check) for flag in columns.flags]
    return np.stack(labels, axis=1).astype(np.int8)


def _name_codes(names: pa.Array, keep: np.ndarray, state: Ingested) -> np.ndarray:
    """Codes of behaviour names, -1 where null."""
    known = names.is_valid().to_numpy(zero_copy_only=False)
    codes = np.full(len(names), -1)
    usable = known & keep
    if usable.any():
        codes[usable] = state.names.add(names.filter(pa.array(usable)))
    if len(state.names) > _MAX_NAMED_BEHAVIOURS:
        raise ValueError(
            f"the column {state.columns.behaviour!r} holds more than {_MAX_NAMED_BEHAVIOURS} different behaviours; "
            "is it the right column? Name another with --data.columns.behaviour, or '-' for none."
        )
    return codes


def _count(records: np.ndarray, state: Ingested) -> None:
    state.rows_kept += len(records)
    has_time, has_order = state.columns.timestamp != ABSENT, state.columns.order != ABSENT
    if has_time:
        known = records["time"][records["time"] != UNKNOWN]
        state.null_times += len(records) - len(known)
        if len(known):
            low, high = int(known.min()), int(known.max())
            state.min_time = low if state.min_time is None else min(low, state.min_time)
            state.max_time = high if state.max_time is None else max(high, state.max_time)
    if has_order:
        state.null_orders += int((records["order"] == UNKNOWN).sum())
    state.times_equal_orders &= has_time and has_order and bool((records["time"] == records["order"]).all())


def row_hashes(batch: pa.RecordBatch) -> UInt64[np.ndarray, " e"]:
    """A 64-bit hash of all columns of each row, to find exact duplicates without holding the rows.

    Hashes are compared within one run only, so Python's own hash of a string will do.
    """
    total = np.zeros(batch.num_rows, np.uint64)
    for column in batch.columns:
        total = mixed(total * ODD + _column_hashes(column))
    return total


def _column_hashes(column: pa.Array) -> UInt64[np.ndarray, " e"]:
    null = column.is_null().to_numpy(zero_copy_only=False)
    kind = column.type
    if pa.types.is_temporal(kind) and kind.bit_width == 64:
        column = column.view(pa.int64())
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        values = np.asarray(column.fill_null(0))
        # Bit patterns: NaN equals itself, and no integer is rounded.
        bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}").astype(np.uint64)
    elif is_text(kind):
        # As bytes, which need not be UTF-8.
        encoded = pc.dictionary_encode(pc.cast(column, pa.large_binary()).fill_null(b""))
        words = np.array([hash(word) for word in encoded.dictionary.to_pylist()], np.int64).view(np.uint64)
        bits = words[np.asarray(encoded.indices)] if len(words) else np.zeros(len(column), np.uint64)
    else:
        bits = np.array([hash(repr(cell(value))) for value in column], np.int64).view(np.uint64)
    return mixed(bits + np.where(null, ODD, np.uint64(1)))
