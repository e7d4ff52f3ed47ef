"""Cells: every type a column may have, what it becomes, and why a row is set aside."""

import datetime
import decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.data.validate import (
    UNKNOWN,
    RowCheck,
    as_text,
    blank_to_null,
    cell,
    integer_of,
    parse_flags,
    parse_ids,
    parse_numbers,
    parse_times,
    ticks_per_second,
)


def ids(column, wanted="auto"):
    check = RowCheck(len(column))
    found = parse_ids(column, "id", wanted, check)
    found = found.to_pylist() if isinstance(found, pa.Array) else found.tolist()
    return [None if bad else value for value, bad in zip(found, check.bad, strict=True)], check.reasons


def test_ids_of_every_integer_and_string_type_are_exact():
    large = 2**63 - 1
    assert ids(pa.array([1, large, -large], pa.int64()))[0] == [1, large, -large]
    assert ids(pa.array([2**64 - 1], pa.uint64()))[0] == [2**64 - 1]
    assert ids(pa.array([7], pa.uint8()))[0] == [7]
    for kind in (pa.string(), pa.large_string(), pa.binary()):
        assert ids(pa.array(["é", "7"], pa.string()).cast(kind))[0] == ["é", "7"]
    assert ids(pa.array([decimal.Decimal("12")], pa.decimal128(30, 0)))[0] == [12]
    assert ids(pa.array([2.0, 2.0**53]))[0] == [2, 2**53]
    assert ids(pa.array([12, 2], pa.int64()), "string")[0] == ["12", "2"]
    assert ids(pa.array(["12", "1e2"]), "int64")[0] == [12, 100]


def test_ids_that_are_none_are_set_aside_with_a_reason():
    assert ids(pa.array([1, None]))[1] == {1: "id is null"}
    assert ids(pa.nulls(2))[1] == {0: "id is null", 1: "id is null"}
    assert ids(pa.nulls(1), "string")[1] == {0: "id is null"}
    assert ids(pa.array(["", " ", None]))[1] == {0: "id is empty", 1: "id is empty", 2: "id is null"}
    assert ids(pa.array([b"\xff"]))[1] == {0: "id is not UTF-8"}
    floats = ids(pa.array([float("nan"), float("inf"), 0.5, 2.0**54]))[1]
    assert list(floats.values()) == [
        "id is not a number",
        "id is not a number",
        "id is not an integer",
        "id is a float beyond 2^53 and no longer exact",
    ]
    big = decimal.Decimal(2**63)
    assert "beyond 64 bits" in ids(pa.array([big], pa.decimal128(38, 0)))[1][0]
    assert ids(pa.array([decimal.Decimal("1.5")], pa.decimal128(38, 1)))[1] == {0: "id is not an integer"}
    texts = ids(pa.array(["NULL", "x", str(2**63), str(-(2**63) + 1), "1" * 5000]), "int64")
    assert texts[0][3] == -(2**63) + 1
    assert [texts[1][row].split(" (")[0] for row in (0, 1, 2, 4)] == [
        "id is null",
        "id is not an integer",
        "id is an integer beyond 64 bits",
        "id is an integer beyond 64 bits",
    ]


@pytest.mark.parametrize(
    ("column", "wanted", "words"),
    [
        (pa.array([True]), "auto", "of type bool"),
        (pa.array([[1]]), "auto", "of type list"),
        (pa.array([datetime.date(2020, 1, 1)]), "auto", "of type date32"),
        (pa.array([1.5]), "string", "no exact text"),
    ],
)
def test_columns_that_hold_no_ids_are_refused(column, wanted, words):
    with pytest.raises(ValueError, match=words):
        ids(column, wanted)


def times(column, text_kind="int"):
    check = RowCheck(len(column))
    return parse_times(column, "time", text_kind, check).tolist(), check.reasons


def test_times_of_every_type():
    moment = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    assert times(pa.array([5, None], pa.int32())) == ([5, UNKNOWN], {})
    assert times(pa.nulls(1)) == ([UNKNOWN], {})
    assert times(pa.array([1.5, float("nan"), None]))[0] == [1_500_000, UNKNOWN, UNKNOWN]
    assert times(pa.array([decimal.Decimal("1.5")]))[0] == [1_500_000]
    for unit, ticks in (("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)):
        kind = pa.timestamp(unit, tz="UTC")
        assert times(pa.array([moment, None], kind))[0] == [1_577_836_800 * ticks, UNKNOWN]
        assert ticks_per_second(kind, "", 1) == ticks
    assert times(pa.array([moment.date()], pa.date32()))[0] == [1_577_836_800]
    assert ticks_per_second(pa.date32(), "", 1) == 1
    assert times(pa.array(["7", " 8.0 ", "", "NA", None])) == ([7, 8, UNKNOWN, UNKNOWN, UNKNOWN], {})
    assert times(pa.array(["0.5", "nan"]), "float")[0] == [500_000, UNKNOWN]
    assert (
        times(pa.array(["2020-01-01", "2020-01-01T01:00:00+01:00"]), "datetime")[0]
        == [1_577_836_800_000_000] * 2
    )
    assert [ticks_per_second(pa.string(), kind, 1000) for kind in ("int", "float", "datetime")] == [
        1000, 10**6, 10**6,
    ]  # fmt: skip
    assert (ticks_per_second(pa.int64(), "", 1000), ticks_per_second(pa.float64(), "", 1)) == (1000, 10**6)


def test_times_that_are_none_are_set_aside_with_a_reason():
    assert times(pa.array([2**63], pa.uint64()))[1] == {0: "time is beyond 64 bits"}
    assert times(pa.array([1e300, float("inf")]))[1] == {
        0: "time is beyond 64 bits",
        1: "time is beyond 64 bits",
    }
    assert times(pa.array(["soon"]), "datetime")[1] == {0: "time is not a time"}
    assert times(pa.array(["soon"]), "float")[1] == {0: "time is not a number"}
    assert times(pa.array([b"\xff"]))[1] == {0: "time is not UTF-8"}
    with pytest.raises(ValueError, match="of type bool"):
        times(pa.array([True]))


UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


@given(st.data(), st.sampled_from(sorted(UNITS)))
def test_a_moment_has_the_same_second_however_its_column_counts(data, unit):
    # To the year 5138, and what a float holds exactly.
    per_second = UNITS[unit]
    largest = min(2**53, 10**11 * per_second)
    counts = data.draw(st.lists(st.integers(-largest, largest), min_size=1, max_size=4))
    columns = [
        (pa.array(counts, pa.int64()), ""),
        (pa.array(counts, pa.float64()), ""),
        (pa.array(map(decimal.Decimal, counts), pa.decimal128(20, 3)), ""),
        (pa.array(map(str, counts), pa.string()), "int"),
        (pa.array(map(str, counts), pa.string()), "float"),
        (pa.array(counts, pa.timestamp(unit)), ""),
    ]
    for column, text_kind in columns:
        check = RowCheck(len(counts))
        ticks = parse_times(column, "time", text_kind, check, per_second)
        assert not check.reasons
        seconds = ticks // ticks_per_second(column.type, text_kind, per_second)
        assert seconds.tolist() == [count // per_second for count in counts], column.type


def test_floats_of_one_second_keep_their_order():
    for unit, moment in (("s", 1.6e9), ("ms", 1.6e12), ("us", 1.6e15), ("ns", 1.6e18)):
        column = pa.array([moment, moment + UNITS[unit] / 1000])
        first, second = parse_times(column, "time", "", RowCheck(2), UNITS[unit])
        assert first < second, unit


def test_numbers_and_flags():
    check = RowCheck(4)
    column = pa.array([1, None, 3, 4], pa.int8())
    np.testing.assert_array_equal(parse_numbers(column, "x", check), [1, np.nan, 3, 4])
    np.testing.assert_array_equal(
        parse_numbers(pa.array(["1.5", "n/a", "x", None]), "x", check), [1.5] + [np.nan] * 3
    )
    assert check.reasons == {2: "x is not a number"}
    np.testing.assert_array_equal(parse_numbers(pa.nulls(1), "x", RowCheck(1)), [np.nan])
    np.testing.assert_array_equal(parse_numbers(pa.array([2**63 - 1]), "x", RowCheck(1)), [2.0**63])
    for column in (pa.array([1, 0, None]), pa.array([True, False, None]), pa.array(["TRUE", " 0", ""])):
        assert parse_flags(column, "x", RowCheck(3)).tolist() == [1, 0, -1]
    check = RowCheck(2)
    parse_flags(pa.array([2.0, 0.5]), "x", check)
    assert check.reasons == {0: "x is not 0 or 1", 1: "x is not 0 or 1"}
    with pytest.raises(ValueError, match="of type list"):
        parse_numbers(pa.array([[1]]), "x", RowCheck(1))


def test_the_first_reason_of_a_row_counts():
    check = RowCheck(3)
    check.flag(np.array([True, False, False]), "one")
    check.flag(np.array([True, True, False]), "two")
    assert check.reasons == {0: "one", 1: "two"}
    assert check.bad.tolist() == [True, True, False]


def test_text_helpers():
    raw = pa.array([b"a", b"\xff", None])
    for column in (raw, pa.Array.from_buffers(pa.string(), 3, raw.buffers())):
        text, unreadable = as_text(column)
        assert (text.to_pylist(), unreadable.tolist()) == (["a", None, None], [False, True, False])
    assert as_text(pa.array([1, None], NOWHERE))[0].to_pylist() == ["1970-01-01 00:00:00.001 UTC", None]
    assert blank_to_null(pa.array([" a ", "NaN", "null", "\\N", "", None])).to_pylist() == ["a"] + [None] * 5


NANOSECOND = 1_600_000_000_000_000_001
NOWHERE = pa.timestamp("ms", tz="Mars/Base")


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([NANOSECOND], pa.timestamp("ns")), "2020-09-13 12:26:40.000000001"),
        (
            pa.array([NANOSECOND], pa.timestamp("ns", tz="Europe/Berlin")),
            "2020-09-13 12:26:40.000000001 UTC",
        ),
        (pa.array([2**62], pa.timestamp("ms")), f"<value out of range: {2**62}>"),
        (pa.array([1_600_000_000_000], NOWHERE), "2020-09-13 12:26:40.000 UTC"),
        (pa.array([1], pa.time64("ns")), "00:00:00.000000001"),
        (pa.array([2**62], pa.int64()).view(pa.time64("us")), f"<value out of range: {2**62}>"),
        (pa.array([1], pa.duration("ns")), "1"),
        (pa.array([2**62], pa.duration("s")), f"{2**62}"),
        (pa.array([2**30], pa.int32()).view(pa.date32()), f"<value out of range: {2**30}>"),
        (pa.array([2**62], pa.int64()).view(pa.date64()), f"<value out of range: {2**62}>"),
        (pa.Array.from_buffers(pa.string(), 1, pa.array([b"a\xff"]).buffers()), "a\\xff"),
        (pa.array([NANOSECOND], pa.timestamp("ns")).dictionary_encode(), "2020-09-13 12:26:40.000000001"),
        (pa.array([[1, None], None], pa.list_(pa.duration("ns"))), ["1", None]),
        (pa.array([[1, 2]], pa.list_(pa.duration("ns"), 2)), ["1", "2"]),
        (
            pa.array([{"a": [1], "b": 2, "c": None}], pa.struct(
                [("a", pa.list_(pa.time64("ns"))), ("b", pa.int8()), ("c", NOWHERE)]
            )),
            {"a": ["00:00:00.000000001"], "b": 2, "c": None},
        ),
        (pa.array([[("k", 1)]], pa.map_(pa.string(), pa.duration("ns"))), [{"key": "k", "value": "1"}]),
        (pa.array([decimal.Decimal("1.5")]), decimal.Decimal("1.5")),
        (pa.array([b"\xff"]), b"\xff"),
        (pa.array([NANOSECOND - 1], pa.timestamp("ns")), datetime.datetime(2020, 9, 13, 12, 26, 40)),
    ],
)  # fmt: skip
def test_any_cell_has_a_form_in_python(column, expected):
    assert cell(column[0]) == expected


@given(st.integers(-(10**40), 10**40))
def test_integers_are_read_exactly_however_they_are_written(number):
    assert integer_of(str(number)) == number
    assert integer_of(f"{number}.000") == number
    assert integer_of(f"{number}e2") == 100 * number
    assert integer_of(f"{number}.5") is None


@pytest.mark.parametrize("text", ["", "x", "1_000", "１", "0x1", "inf", "nan", "1e", ".", "--1"])
def test_what_is_no_integer_is_none(text):
    assert integer_of(text) is None


def test_a_monstrous_exponent_costs_nothing():
    assert integer_of("1e999999999").bit_length() > 64
    assert integer_of("0e999999999") == 0
    assert integer_of("1e-999999999") is None
