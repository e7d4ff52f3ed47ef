"""Random tables: prepare says what is wrong or loses nothing, whatever the columns hold."""

import json
import math
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.data.columns import ColumnMap
from jaxrec.data.config import DataConfig, GlobalTime, LeaveOneOut, TextConfig
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.prepare import prepare

INT64 = st.integers(-(2**63) + 1, 2**63 - 1)
SMALL = st.integers(0, 5)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)


def column(values, kind, size):
    return st.lists(st.none() | values, min_size=size, max_size=size).map(lambda cells: pa.array(cells, kind))


def any_column(size):
    """A column of any type at all: what a user might point prepare at."""
    return st.one_of(
        column(INT64, pa.int64(), size),
        column(SMALL, pa.int8(), size),
        column(st.integers(0, 2**64 - 1), pa.uint64(), size),
        column(st.floats(), pa.float64(), size),
        column(st.floats(width=16), pa.float16(), size),
        column(TEXT, pa.string(), size),
        column(TEXT, pa.large_string(), size),
        column(TEXT, pa.string(), size).map(lambda cells: cells.dictionary_encode()),
        column(st.binary(max_size=3), pa.binary(), size),
        column(st.booleans(), pa.bool_(), size),
        column(st.decimals(-(10**6), 10**6, places=2), pa.decimal128(12, 2), size),
        column(st.integers(-(10**15), 10**15), pa.timestamp("us"), size),
        column(INT64, pa.timestamp("ns"), size),
        column(INT64, pa.timestamp("ms", tz="Mars/Base"), size),
        column(INT64, pa.duration("us"), size),
        column(st.integers(0, 20_000), pa.date32(), size),
        column(st.integers(0, 86_399), pa.time32("s"), size),
        column(st.integers(0, 86_399 * 10**9), pa.time64("ns"), size),
        column(st.lists(SMALL, max_size=2), pa.list_(pa.int64()), size),
        column(st.lists(INT64, max_size=2), pa.list_(pa.timestamp("ns")), size),
        st.just(pa.nulls(size)),
    )


@st.composite
def any_table(draw):
    size = draw(st.integers(0, 12))
    names = draw(
        st.sets(
            st.sampled_from(
                ["user_id", "item_id", "timestamp", "order", "rating", "is_x", "behaviour", "more"]
            )
        )
    )
    return pa.table({name: draw(any_column(size)) for name in sorted(names)})


def in_a_new_directory(function):
    place = Path(tempfile.mkdtemp(prefix="jaxrec-property-"))
    # Loading the vocabulary of 30,522 words is half the time of preparing ten rows.
    (place / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    try:
        return function(place)
    finally:
        shutil.rmtree(place)


def config(path, **fields):
    place = next(one for one in (Path(path), *Path(path).parents) if (one / "vocab.txt").is_file())
    return DataConfig(path=str(path), text=TextConfig(vocabulary=str(place), max_tokens=4), **fields)


def assert_in_words(error):
    """Ours, with value, constraint and remedy; an Arrow error is a ValueError too, and says none of them."""
    assert not isinstance(error, pa.ArrowException), error
    assert len(str(error)) > 30


def check_counts(out: Path) -> dict:
    statistics = json.loads((out / "statistics.json").read_text(encoding="utf-8"))
    rows = statistics["rows"]
    aside = pq.read_table(out / "quarantine.parquet").to_pylist()
    assert rows["read"] == rows["kept"] + rows["quarantined"]
    assert rows["quarantined"] == sum(row["source"].startswith("events") for row in aside)
    dataset = PreparedDataset.open(out)
    assert rows["kept"] == dataset.lengths.sum() == dataset.metadata.num_events
    assert (dataset.train_end <= dataset.validation_end).all()
    assert (dataset.validation_end <= dataset.lengths).all()
    assert dataset.item_counts.sum() == dataset.train_end.sum()
    assert (np.diff(dataset.item_counts[1:]) <= 0).all()
    return statistics


@settings(max_examples=60)
@given(any_table(), st.sampled_from([LeaveOneOut(), GlobalTime()]), st.sampled_from(["keep", "drop"]))
def test_any_table_is_prepared_or_refused_in_words(table, split, duplicates):
    def body(place):
        pq.write_table(table, place / "events.parquet")
        try:
            prepare(config(str(place), split=split, duplicates=duplicates), place / "out")
        except ValueError as error:
            assert_in_words(error)
            assert not (place / "out").exists()
            return
        assert check_counts(place / "out")["rows"]["read"] == len(table)

    in_a_new_directory(body)


def oracle(rows):
    """Valid events by user, in history order, as plain Python sees it."""
    histories = {}
    for place, row in enumerate(rows):
        if None not in (row["user_id"], row["item_id"], row["order"]) and row["item_id"].strip():
            histories.setdefault(row["user_id"], []).append((row["order"], place, row["item_id"]))
    return {user: [item for _, _, item in sorted(events)] for user, events in histories.items()}


@settings(max_examples=30)
@given(st.data())
def test_no_valid_event_is_lost_and_histories_are_in_order(data):
    size = data.draw(st.integers(1, 25))
    table = pa.table(
        {
            "user_id": data.draw(column(SMALL | INT64, pa.int64(), size)),
            "item_id": data.draw(column(TEXT, pa.string(), size)),
            "order": data.draw(column(SMALL | INT64, pa.int64(), size)),
            "rating": data.draw(column(st.floats(), pa.float64(), size)),
        }
    )
    expected = oracle(table.to_pylist())

    def body(place):
        pq.write_table(table, place / "events.parquet")
        if not expected:
            try:
                prepare(config(str(place)), place / "out")
            except ValueError as error:
                assert "none of the" in str(error)
                return
            raise AssertionError("an unusable table was accepted")
        prepare(config(str(place)), place / "out")
        check_counts(place / "out")
        dataset = PreparedDataset.open(place / "out")
        keys, everyone = np.asarray(dataset.item_keys, object), dataset.histories(np.arange(len(expected)))
        found = {
            int(user): keys[everyone.item_ids[everyone.offsets[i] : everyone.offsets[i + 1]] - 1].tolist()
            for i, user in enumerate(np.asarray(dataset.user_keys).tolist())
        }
        assert found == expected
        assert list(found) == sorted(found)

    in_a_new_directory(body)


CELL = st.one_of(
    INT64.map(str),
    SMALL.map(str),
    st.floats().map(str),
    st.sampled_from(
        ["", "NULL", "nan", "1e3", "1e999999", "007", "-0", "1_0", "１", '"', "a,b", " 3 ", "x" * 50]
    ),
    TEXT,
)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=8),
    st.sampled_from(["auto", "int64", "string"]),
)
def test_any_csv_is_prepared_or_refused_in_words(rows, id_type):
    def body(place):
        lines = [",".join(row) for row in [("user_id", "item_id", "timestamp"), *rows]]
        (place / "events.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        columns = ColumnMap(id_type=id_type)
        try:
            prepare(config(str(place), columns=columns), place / "out")
        except ValueError as error:
            assert_in_words(error)
            return
        check_counts(place / "out")

    in_a_new_directory(body)


@settings(max_examples=10)
@given(st.lists(st.tuples(SMALL, SMALL, st.integers(0, 10**9)), min_size=1, max_size=30))
def test_csv_and_parquet_of_the_same_rows_agree(rows):
    table = pa.table(
        {name: [row[at] for row in rows] for at, name in enumerate(("user_id", "item_id", "timestamp"))}
    )

    def body(place):
        for kind in ("csv", "parquet"):
            (place / kind / "same").mkdir(parents=True)
        pq.write_table(table, place / "parquet" / "same" / "events.parquet")
        pacsv.write_csv(table, place / "csv" / "same" / "events.csv")
        contents = []
        for kind in ("csv", "parquet"):
            prepare(config(str(place / kind / "same")), place / kind / "out")
            check_counts(place / kind / "out")
            contents.append(
                {
                    path.name: path.read_bytes()
                    for path in sorted((place / kind / "out").rglob("*"))
                    if path.is_file()
                    and path.name != "statistics.json"  # the fingerprint is that of the source
                }
            )
        assert contents[0] == contents[1]

    in_a_new_directory(body)


@settings(max_examples=15)
@given(
    st.lists(st.one_of(st.integers(-(10**30), 10**30), st.floats(allow_nan=False)), min_size=1, max_size=10)
)
def test_ids_of_float_columns_are_exact_or_set_aside(values):
    table = pa.table({"user_id": pa.array([float(v) for v in values]), "item_id": [1] * len(values)})
    usable = Counter(
        int(v) for v in map(float, values) if math.isfinite(v) and v == int(v) and abs(v) <= 2**53
    )

    def body(place):
        pq.write_table(table, place / "events.parquet")
        try:
            prepare(config(str(place)), place / "out")
        except ValueError:
            assert not usable
            return
        dataset = PreparedDataset.open(place / "out")
        lengths = zip(np.asarray(dataset.user_keys).tolist(), dataset.lengths.tolist(), strict=True)
        assert dict(lengths) == dict(usable)

    in_a_new_directory(body)
