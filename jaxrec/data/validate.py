"""Cells and rows: what a source's columns are turned into, and why a row is set aside.

A row is either kept whole or set aside whole, with one reason: nothing is repaired by guessing and nothing is
dropped in silence. All functions work on one record batch, so memory follows the batch and not the file.

Letters: E events of a record batch, K behaviours.
"""

import datetime
import decimal
import math
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int64

from jaxrec.data.histories import UNKNOWN_TIME

__all__ = ["RowCheck", "as_text", "cell", "parse_flags", "parse_ids", "parse_numbers", "parse_times"]

UNKNOWN = UNKNOWN_TIME  # of an order too
_MAX_EXACT_FLOAT = 2.0**53
_INTEGER = r"^[+-]?[0-9]{1,18}$"
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,9})?")
_MAX_DIGITS = 4000
_MICROSECONDS = 10**6
_BLANKS = ("", "na", "n/a", "nan", "null", "none", "nil", "\\n")


@dataclass
class RowCheck:
    """The rows of one batch that are set aside: the first reason for each, and a value that shows it."""

    num_rows: int
    bad: Bool[np.ndarray, " e"] = field(init=False)
    reasons: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bad = np.zeros(self.num_rows, bool)

    def flag(self, mask: Bool[np.ndarray, " e"], reason: str) -> None:
        """Set the rows of `mask` aside, those with an earlier reason excepted."""
        for row in np.flatnonzero(mask & ~self.bad).tolist():
            self.reasons[row] = reason
        self.bad |= mask


def cell(value: pa.Scalar) -> Any:
    """A value as Python has it; where Python has none for it, at any depth, as text.

    Python's times end at microseconds, in the year 9999 and at the zones that the machine knows, and its strings are
    UTF-8; a column's need not. A time of such a zone is told in UTC.
    """
    try:
        return value.as_py()
    except (ValueError, OverflowError):  # Arrow's own errors of this kind are ValueErrors
        pass
    kind = value.type
    if isinstance(value, pa.DictionaryScalar | pa.ExtensionScalar):
        return cell(value.value)
    if isinstance(value, pa.StructScalar):
        return {kind.field(at).name: cell(value[at]) for at in range(kind.num_fields)}
    if pa.types.is_nested(kind):
        return [cell(one) for one in value.values]
    if pa.types.is_timestamp(kind):
        text = value.cast(pa.timestamp(kind.unit)).cast(pa.string()).as_py()
        return f"{text} UTC" if kind.tz else text
    if pa.types.is_temporal(kind):
        return value.cast(pa.string()).as_py()
    return value.cast(pa.binary()).as_py().decode("utf-8", "backslashreplace")


def as_text(column: pa.Array) -> tuple[pa.Array, Bool[np.ndarray, " e"]]:
    """`(strings, unreadable)`: any string-like column as UTF-8; bytes that are not UTF-8 become null and are told."""
    unreadable = np.zeros(len(column), bool)
    # By way of bytes: the strings of a Parquet file may be none, which only this cast looks at.
    column = pc.cast(column, pa.binary()) if is_text(column.type) else column
    try:
        return pc.cast(column, pa.string()), unreadable
    except pa.ArrowInvalid:
        values: list[str | None] = []
        for row, value in enumerate(map(cell, column)):
            try:
                text = value.decode() if isinstance(value, bytes) else value
                values.append(None if text is None else str(text))
            except UnicodeDecodeError:
                values.append(None)
                unreadable[row] = True
        return pa.array(values, pa.string()), unreadable


def is_text(kind: pa.DataType) -> bool:
    """Strings, and the bytes that a CSV is read as."""
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(test(kind) for test in tests)


def blank_to_null(text: pa.Array) -> pa.Array:
    """What CSV tools write for "nothing" becomes null: for numbers and times, where no word is a value."""
    text = pc.utf8_trim_whitespace(text)
    blank = pc.is_in(pc.utf8_lower(text), value_set=pa.array(_BLANKS, pa.string()))
    return pc.if_else(blank, pa.scalar(None, pa.string()), text)


def parse_ids(column: pa.Array, name: str, wanted: str, check: RowCheck) -> np.ndarray | pa.Array:
    """The ids as int64, uint64 or an Arrow string array; rows without a usable id are set aside.

    `wanted` is "int64" or "string" where that is known (declared, or found by reading a text column once), else
    "auto": the column's own type. Where a row is set aside its value is meaningless.

    Raises:
      ValueError: the column is of a type that holds no ids.
    """
    kind = column.type
    null = column.is_null().to_numpy(zero_copy_only=False)
    check.flag(null, f"{name} is null")
    if is_text(kind):
        text, unreadable = as_text(column)
        check.flag(unreadable, f"{name} is not UTF-8")
        empty = pc.equal(pc.utf8_trim_whitespace(text), "").fill_null(False).to_numpy(zero_copy_only=False)
        check.flag(empty, f"{name} is empty")
        if wanted != "int64":
            return text.fill_null("")
        text = blank_to_null(text)
        check.flag(text.is_null().to_numpy(zero_copy_only=False), f"{name} is null")
        return _text_integers(text.fill_null("0"), name, check)
    if pa.types.is_null(kind):
        return np.zeros(len(column), np.int64) if wanted != "string" else pa.array([""] * len(column))
    if wanted == "string":
        if not (pa.types.is_integer(kind) or pa.types.is_decimal(kind)):
            raise ValueError(
                f"{name} is of type {kind}, which has no exact text; use id_type=auto or cast the column."
            )
        return pc.cast(column, pa.string()).fill_null("")
    if pa.types.is_uint64(kind):
        return np.asarray(column.fill_null(0))
    if pa.types.is_integer(kind):
        return np.asarray(pc.cast(column, pa.int64()).fill_null(0))
    if pa.types.is_floating(kind):
        return _float_ids(column, name, check)
    if pa.types.is_decimal(kind):
        return _text_integers(pc.cast(column, pa.string()), name, check)
    raise ValueError(
        f"{name} is of type {kind}, but an id must be an integer of at most 64 bits or a string; cast the column, or "
        "name another with --data.columns."
    )


def _float_ids(column: pa.Array, name: str, check: RowCheck) -> Int64[np.ndarray, " e"]:
    values = np.asarray(pc.cast(column, pa.float64()).fill_null(0.0))
    finite = np.isfinite(values)
    check.flag(~finite, f"{name} is not a number")
    values = np.where(finite, values, 0.0)
    check.flag(values != np.floor(values), f"{name} is not an integer")
    # Past 2^53 neighbouring integers are one float: two users would become one.
    check.flag(np.abs(values) > _MAX_EXACT_FLOAT, f"{name} is a float beyond 2^53 and no longer exact")
    usable = (np.abs(values) <= _MAX_EXACT_FLOAT) & (values == np.floor(values))
    return np.where(usable, values, 0.0).astype(np.int64)


def _text_integers(text: pa.Array, name: str, check: RowCheck) -> Int64[np.ndarray, " e"]:
    text = pc.utf8_trim_whitespace(text)
    plain = pc.match_substring_regex(text, _INTEGER).fill_null(False)
    values = np.array(pc.cast(pc.if_else(plain, text, "0"), pa.int64()))
    odd = ~plain.to_numpy(zero_copy_only=False) & ~check.bad
    for row in np.flatnonzero(odd).tolist():
        number = integer_of(text[row].as_py())
        one = np.zeros(check.num_rows, bool)
        one[row] = True
        if number is None:
            check.flag(one, f"{name} is not an integer")
        elif not UNKNOWN < number <= np.iinfo(np.int64).max:
            check.flag(one, f"{name} is an integer beyond 64 bits (id_type=string keeps it)")
        else:
            values[row] = number
    return values


def integer_of(text: str) -> int | None:
    """The integer that a cell says, exactly, however it is written (`7`, `7.0`, `7e3`); None where it says none."""
    if not _NUMBER.fullmatch(text):
        return None
    number = decimal.Decimal(text)
    if number and number.adjusted() > _MAX_DIGITS:
        return 10**_MAX_DIGITS  # far beyond 64 bits; `1e999999999` itself would fill the memory
    return int(number) if number == number.to_integral_value() else None


def parse_times(
    column: pa.Array, name: str, text_kind: str, check: RowCheck, unit_per_second: int = 1
) -> Int64[np.ndarray, " e"]:
    """Times as int64 in the column's own resolution (`ticks_per_second`), `UNKNOWN` where null.

    Args:
      unit_per_second: how many of what a number counts make a second.

    Raises:
      ValueError: the column is of a type that holds no time.
    """
    kind = column.type
    if is_text(kind):
        text, unreadable = as_text(column)
        check.flag(unreadable, f"{name} is not UTF-8")
        text = blank_to_null(text)
        if text_kind == "datetime":
            return _text_datetimes(text, name, check)
        if text_kind == "float":
            return _float_times(_text_floats(text, name, check), name, check, unit_per_second)
        known = text.is_valid().to_numpy(zero_copy_only=False)
        filled = _text_integers(text.fill_null("0"), name, check)
        return np.where(known, filled, UNKNOWN)
    if pa.types.is_null(kind):
        return np.full(len(column), UNKNOWN)
    if pa.types.is_date(kind):
        column = pc.cast(column, pa.timestamp("s"))
    if pa.types.is_timestamp(column.type):
        return np.asarray(pc.cast(column, pa.int64()).fill_null(UNKNOWN))
    if pa.types.is_uint64(kind):
        values = np.asarray(column.fill_null(0))
        large = values > np.uint64(np.iinfo(np.int64).max)
        check.flag(large, f"{name} is beyond 64 bits")
        known = column.is_valid().to_numpy(zero_copy_only=False) & ~large
        return np.where(known, np.where(large, 0, values).astype(np.int64), UNKNOWN)
    if pa.types.is_integer(kind):
        return np.asarray(pc.cast(column, pa.int64()).fill_null(UNKNOWN))
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        values = pc.cast(column, pa.float64())
        null = values.is_null().to_numpy(zero_copy_only=False)
        values = np.where(null, math.nan, np.asarray(values.fill_null(0.0)))
        return _float_times(values, name, check, unit_per_second)
    raise ValueError(
        f"{name} is of type {kind}, but must be a number, a date or a time; name another column with "
        "--data.columns.timestamp or --data.columns.order, or '-' for none."
    )


def ticks_per_second(kind: pa.DataType, text_kind: str, unit_per_second: int) -> int:
    """How many of `parse_times`' ticks make a second."""
    if is_text(kind):
        return {"datetime": _MICROSECONDS, "float": unit_per_second * _ticks_per_unit(unit_per_second)}.get(
            text_kind, unit_per_second
        )
    if pa.types.is_timestamp(kind):
        return {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[kind.unit]
    if pa.types.is_date(kind):
        return 1
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return unit_per_second * _ticks_per_unit(unit_per_second)
    return unit_per_second


def _ticks_per_unit(unit_per_second: int) -> int:
    """Of floats: microseconds, so that events of one second keep their order; finer units stay what they are."""
    return max(1, _MICROSECONDS // unit_per_second)


def _float_times(
    values: np.ndarray, name: str, check: RowCheck, unit_per_second: int
) -> Int64[np.ndarray, " e"]:
    """Floats in ticks; NaN is how CSV tools write null."""
    ticks = np.floor(values * _ticks_per_unit(unit_per_second))
    large = np.abs(ticks) >= 2.0**63
    check.flag(large, f"{name} is beyond 64 bits")
    unknown = np.isnan(values)
    return np.where(unknown, UNKNOWN, np.where(unknown | large, 0.0, ticks).astype(np.int64))


def _text_datetimes(text: pa.Array, name: str, check: RowCheck) -> Int64[np.ndarray, " e"]:
    values = np.full(len(text), UNKNOWN)
    failed = np.zeros(len(text), bool)
    for row, value in enumerate(text.to_pylist()):
        if value is None:
            continue
        try:
            moment = datetime.datetime.fromisoformat(value)
        except ValueError:
            failed[row] = True
            continue
        # A time without a zone is read as UTC: the result must not depend on the machine.
        moment = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
        span = moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
        values[row] = span // datetime.timedelta(microseconds=1)
    check.flag(failed, f"{name} is not a time")
    return values


def parse_numbers(column: pa.Array, name: str, check: RowCheck) -> np.ndarray:
    """float64 with NaN where null.

    Raises:
      ValueError: the column is of a type that holds no numbers.
    """
    kind = column.type
    if is_text(kind):
        text, unreadable = as_text(column)
        check.flag(unreadable, f"{name} is not UTF-8")
        return _text_floats(blank_to_null(text), name, check)
    if pa.types.is_null(kind):
        return np.full(len(column), math.nan)
    if (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_decimal(kind)
        or kind == pa.bool_()
    ):
        if kind == pa.bool_():
            column = pc.cast(column, pa.int8())
        # Unsafe on purpose: an int64 past 2^53 may lose its last digits, which no threshold sees.
        values = pc.cast(column, pa.float64(), safe=False)
        null = values.is_null().to_numpy(zero_copy_only=False)
        return np.where(null, math.nan, np.asarray(values.fill_null(0.0)))
    raise ValueError(f"{name} is of type {kind}, but must be a number; name another column, or '-' for none.")


def _text_floats(text: pa.Array, name: str, check: RowCheck) -> np.ndarray:
    null = text.is_null().to_numpy(zero_copy_only=False)
    try:
        values = np.array(pc.cast(text, pa.float64()).fill_null(math.nan))
    except pa.ArrowInvalid:
        values = np.full(len(text), math.nan)
        failed = np.zeros(len(text), bool)
        for row, value in enumerate(text.to_pylist()):
            try:
                values[row] = math.nan if value is None else float(value)
            except ValueError:
                failed[row] = True
        check.flag(failed, f"{name} is not a number")
    return np.where(null, math.nan, values)


def parse_flags(column: pa.Array, name: str, check: RowCheck) -> np.ndarray:
    """int8 labels: 1, 0, or -1 where the cell is null; other values set their row aside.

    Raises:
      ValueError: the column is of a type that holds no 0/1 labels.
    """
    if is_text(column.type):
        text, _ = as_text(column)
        words: dict[Any, str] = {"true": "1", "false": "0"}
        lowered = pc.utf8_lower(pc.utf8_trim_whitespace(text))
        for word, digit in words.items():
            lowered = pc.if_else(pc.equal(lowered, word), digit, lowered)
        column = lowered
    values = parse_numbers(column, name, check)
    unknown = np.isnan(values)
    check.flag(~unknown & (values != 0) & (values != 1), f"{name} is not 0 or 1")
    return np.where(unknown, -1, np.where(values == 1, 1, 0)).astype(np.int8)
