"""Prepare, end to end on small tables: what is kept, what is set aside, and what is refused with which words."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.data import prepare as prepare_module
from jaxrec.data.columns import ColumnMap, ValueLabel
from jaxrec.data.config import DataConfig, GlobalTime, LeaveOneOut, TextConfig
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.prepare import embedded_path, is_prepared, prepare, prepared_fingerprint

UNKNOWN = np.iinfo(np.int64).min
EVENTS = {
    "user_id": [7, 7, 7, 7, 3, 3, 3, 9],
    "item_id": [10, 20, 30, 10, 20, 10, 40, 20],
    "timestamp": [400, 100, 300, 200, 50, 60, 70, 500],
    "rating": [5, 3, 4, None, 2, 5, 1, 4],
}


def write_source(directory: Path, events, items=None, users=None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, table in (("events", events), ("items", items), ("users", users)):
        if table is None:
            continue
        table = pa.table(table) if isinstance(table, dict) else table
        pq.write_table(table, directory / f"{name}.parquet")
    return directory


def run(source: Path, out: Path, **fields) -> PreparedDataset:
    prepare(DataConfig(path=str(source), **fields), out)
    return PreparedDataset.open(out)


def statistics_of(out: Path) -> dict:
    return json.loads((out / "statistics.json").read_text(encoding="utf-8"))


def history(dataset: PreparedDataset, index: int):
    one = dataset.histories(np.array([index]))
    keys = np.asarray(dataset.item_keys)
    return keys[one.item_ids - 1].tolist(), one.timestamps.tolist(), one.labels.tolist()


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_histories_are_in_time_order_with_labels_and_cuts(tmp_path):
    dataset = run(write_source(tmp_path / "set", EVENTS), tmp_path / "out")
    assert np.asarray(dataset.user_keys).tolist() == [3, 7, 9]
    assert history(dataset, 0) == ([20, 10, 40], [50, 60, 70], [[0], [1], [0]])
    assert history(dataset, 1) == ([20, 10, 30, 10], [100, 200, 300, 400], [[0], [-1], [1], [1]])
    assert history(dataset, 2) == ([20], [500], [[1]])
    assert dataset.train_end.tolist() == [1, 2, 1]
    assert dataset.validation_end.tolist() == [2, 3, 1]
    assert dataset.metadata.behaviours == ("like",)
    # Training events: 20 three times, 10 once; 30 and 40 never, so their own ids decide.
    assert np.asarray(dataset.item_keys).tolist() == [20, 10, 30, 40]
    assert dataset.item_counts.tolist() == [0, 3, 1, 0, 0]


def test_order_wins_over_time_and_ties_keep_the_order_of_the_file(tmp_path):
    events = {
        "user_id": [1, 1, 1, 1, 2, 2, 2],
        "item_id": [1, 2, 3, 4, 5, 6, 7],
        "timestamp": [10, 20, 5, None, 7, 7, 7],
        "order": [3, 2, 1, 0, 0, 0, 0],
    }
    dataset = run(write_source(tmp_path / "set", events), tmp_path / "out")
    assert history(dataset, 0) == ([4, 3, 2, 1], [UNKNOWN, 5, 20, 10], [[]] * 4)
    assert history(dataset, 1)[0] == [5, 6, 7]
    rows = statistics_of(tmp_path / "out")["rows"]
    assert (rows["null_timestamps"], rows["order_against_timestamp"]) == (1, 1)


def test_an_event_without_an_order_slots_in_by_its_time(tmp_path):
    events = {
        "user_id": [1, 1, 1, 1, 1, 1],
        "item_id": [1, 2, 3, 4, 5, 6],
        "timestamp": [10, None, 30, 20, 5, None],
        "order": [0, 1, 2, None, None, None],
    }
    dataset = run(write_source(tmp_path / "set", events), tmp_path / "out")
    assert history(dataset, 0)[0] == [5, 1, 2, 4, 3]
    quarantine = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert [row["row"] for row in quarantine] == [5]
    assert "neither order nor timestamp" in quarantine[0]["reason"]
    assert json.loads(quarantine[0]["content"])["item_id"] == 6


def test_global_time_splits_all_users_at_one_moment(tmp_path):
    events = {"user_id": [u for u in range(10) for _ in range(10)], "item_id": list(range(100))}
    events["timestamp"] = [u + 10 * k for u in range(10) for k in range(10)]
    dataset = run(write_source(tmp_path / "set", events), tmp_path / "out", split=GlobalTime())
    assert statistics_of(tmp_path / "out")["split"]["cut_times"] == [80, 90]
    assert dataset.metadata.split == "global_time"
    everyone = dataset.histories(np.arange(10))
    for user in range(10):
        times = everyone.timestamps[everyone.offsets[user] : everyone.offsets[user + 1]]
        assert (times[: dataset.train_end[user]] < 80).all()
        assert (times[dataset.train_end[user] : dataset.validation_end[user]] < 90).all()
        assert (times[dataset.validation_end[user] :] >= 90).all()
    assert (dataset.train_end == 8).all()


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ({"timestamp": [0, 1, 2, 3], "order": [0, 1, 2, 3]}, "ranks"),
        ({"order": [0, 1, 2, 3]}, "no timestamp column"),
        ({"timestamp": [5, None, 6, 7], "order": [0, 1, 2, 3]}, "1 of 4 events have a null timestamp"),
        ({"timestamp": [5, 5, 5, 5]}, "too many events bear the same time"),
    ],
)
def test_global_time_refuses_what_has_no_time(tmp_path, events, words):
    source = write_source(tmp_path / "set", {"user_id": [1, 1, 1, 1], "item_id": [1, 2, 3, 4], **events})
    with pytest.raises(ValueError, match=words):
        run(source, tmp_path / "out", split=GlobalTime())
    assert not (tmp_path / "out").exists()


def test_named_moments_leave_events_of_unknown_time_to_their_order(tmp_path):
    events = {"user_id": [1] * 5, "item_id": [1, 2, 3, 4, 5], "order": [0, 1, 2, 3, 4]}
    events["timestamp"] = [None, 5, None, 9, None]
    source = write_source(tmp_path / "set", events)
    dataset = run(source, tmp_path / "out", split=GlobalTime(moments=(9, 9)))
    assert (dataset.train_end.tolist(), dataset.validation_end.tolist()) == ([3], [3])
    assert dataset.events_before(5).tolist() == [1]
    assert dataset.events_before(10).tolist() == [5]


def test_ranks_can_be_declared_and_are_never_times(tmp_path):
    source = write_source(tmp_path / "set", {"user_id": [1, 1], "item_id": [1, 2], "timestamp": [0, 1]})
    with pytest.raises(ValueError, match="holds ranks"):
        run(source, tmp_path / "out", columns=ColumnMap(timestamps_are_ranks=True), split=GlobalTime())
    dataset = run(source, tmp_path / "out", columns=ColumnMap(timestamps_are_ranks=True))
    assert not dataset.metadata.has_timestamps
    assert history(dataset, 0)[1] == [UNKNOWN, UNKNOWN]


def test_repeated_runs_give_the_same_bytes(tmp_path):
    items = {
        "item_id": [10, 20, 30],
        "title": ["Amélie (2001)", "七人の侍", "🎬"],
        "genres": ["A|B", "", None],
    }
    for number in (1, 2):
        write_source(tmp_path / str(number) / "set", EVENTS, items)
        run(tmp_path / str(number) / "set", tmp_path / f"out{number}")
    first, second = files_of(tmp_path / "out1"), files_of(tmp_path / "out2")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_a_dataset_with_the_same_fingerprint_is_kept(tmp_path):
    source, out = write_source(tmp_path / "set", EVENTS), tmp_path / "out"
    run(source, out)
    before = (out / "statistics.json").stat().st_mtime_ns
    run(source, out, history_length=7)
    assert (out / "statistics.json").stat().st_mtime_ns == before
    fingerprint = prepared_fingerprint(out)
    run(source, out, split=LeaveOneOut(min_events=4))
    assert prepared_fingerprint(out) not in ("", fingerprint)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_foreign_directory_is_not_replaced(tmp_path):
    source, out = write_source(tmp_path / "set", EVENTS), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="no prepared dataset"):
        run(source, out)
    assert (out / "thesis.tex").read_text() == "years of work"


def test_a_prepared_directory_is_no_source(tmp_path):
    run(write_source(tmp_path / "set", EVENTS), tmp_path / "out")
    assert is_prepared(tmp_path / "out")
    with pytest.raises(ValueError, match="prepared already"):
        run(tmp_path / "out", tmp_path / "again")


def test_duplicates_are_counted_and_kept_unless_told_otherwise(tmp_path):
    events = {name: [*values, values[0], values[0]] for name, values in EVENTS.items()}
    source = write_source(tmp_path / "set", events)
    kept = run(source, tmp_path / "kept")
    assert statistics_of(tmp_path / "kept")["rows"]["exact_duplicates"] == 2
    assert kept.metadata.num_events == 10
    dropped = run(source, tmp_path / "dropped", duplicates="drop")
    rows = statistics_of(tmp_path / "dropped")["rows"]
    assert (dropped.metadata.num_events, rows["quarantined"], rows["duplicates_dropped"]) == (8, 2, 2)
    quarantine = pq.read_table(tmp_path / "dropped" / "quarantine.parquet").to_pylist()
    assert {row["reason"] for row in quarantine} == {"exact duplicate of another row"}
    assert history(dropped, 1) == history(run(write_source(tmp_path / "plain", EVENTS), tmp_path / "p"), 1)


def test_bad_rows_are_set_aside_with_their_reason_and_the_counts_add_up(tmp_path):
    events = {
        "user_id": [1.0, 1.5, None, float("nan"), 2.0**60, 2.0],
        "item_id": ["a", "b", "c", "d", "e", None],
        "timestamp": [1, 2, 3, 4, 5, 6],
        "is_click": [1, 1, 1, 1, 1, 0],
    }
    events = {
        "user_id": events["user_id"] + [3.0],
        **{k: [*v, v[0]] for k, v in events.items() if k != "user_id"},
    }
    events["is_click"][-1] = 7
    run(write_source(tmp_path / "set", events), tmp_path / "out")
    rows = statistics_of(tmp_path / "out")["rows"]
    assert (rows["read"], rows["kept"], rows["quarantined"]) == (7, 1, 6)
    quarantine = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert {row["row"]: row["reason"] for row in quarantine} == {
        1: "user_id is not an integer",
        2: "user_id is null",
        3: "user_id is not a number",
        4: "user_id is a float beyond 2^53 and no longer exact",
        5: "item_id is null",
        6: "is_click is not 0 or 1",
    }
    assert sum(one["rows"] for one in statistics_of(tmp_path / "out")["quarantine"]) == 6


def test_a_bad_row_is_set_aside_whatever_its_columns_hold(tmp_path):
    far, fine = 2**62, 1_600_000_000_000_000_001
    more = {
        "sold": pa.array([fine, fine], pa.timestamp("ns")),
        "far": pa.array([far, 1], pa.timestamp("ms")),
        "nowhere": pa.array([1, 1], pa.timestamp("s", tz="Mars/Base")),
        "clock": pa.array([1, 1], pa.time64("ns")),
        "took": pa.array([1, 1], pa.duration("ns")),
        "day": pa.array([2**30, 1], pa.int32()).view(pa.date32()),
        "list": pa.array([[fine], [fine]], pa.list_(pa.timestamp("ns"))),
        "struct": pa.array([{"x": far}, {"x": 1}], pa.struct([("x", pa.timestamp("ms"))])),
        "code": pa.array([fine, fine], pa.timestamp("ns")).dictionary_encode(),
        "price": pa.array([1, 2], pa.decimal128(9, 2)),
        "bytes": pa.array([b"\xff", b""]),
        "word": pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff", b"\xfe"]).buffers()),
    }
    events = {"user_id": [None, 1], "item_id": [2, 2], **more}
    items = {"item_id": [None, 2], "title": more["sold"], **more}
    dataset = run(write_source(tmp_path / "set", events, items), tmp_path / "out")
    assert dataset.metadata.num_events == 1
    assert dataset.titles(np.array([1])) == ["2020-09-13 12:26:40.000000001"]
    aside = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert [(row["source"], row["row"], row["reason"]) for row in aside] == [
        ("events:events.parquet", 0, "user_id is null"),
        ("items:items.parquet", 0, "item_id is null"),
    ]
    content = json.loads(aside[0]["content"])
    assert content.keys() == events.keys()
    assert content["list"] == ["2020-09-13 12:26:40.000000001"]
    assert content["struct"] == {"x": f"<value out of range: {far}>"}


def test_strings_that_are_not_utf8_are_quarantined(tmp_path):
    words = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xff"]).buffers())
    run(write_source(tmp_path / "set", {"user_id": [1, 1], "item_id": words}), tmp_path / "out")
    aside = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert [(row["row"], row["reason"]) for row in aside] == [(1, "item_id is not UTF-8")]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"user_id": [1], "movie": [2]}, "no item column.*user_id, movie.*columns.item"),
        ({"item_id": [1], "timestamp": [2]}, "no user column"),
        ({"user_id": [True], "item_id": [2]}, "user_id is of type bool"),
        ({"user_id": [[1]], "item_id": [2]}, "user_id is of type list"),
        ({"user_id": [1], "item_id": [2], "timestamp": [True]}, "timestamp is of type bool"),
        ({"user_id": [1], "item_id": [2], "rating": [[4]]}, "rating is of type list"),
        ({"user_id": [1], "item_id": [2], "behaviour": [[4]]}, "behaviour is of type list"),
        ({"user_id": [1, 1], "item_id": [2, 3], "timestamp": [None, 5]}, "1 of 2 events.*null.*no order"),
        ({"user_id": [1], "item_id": [2], "timestamp": pa.array([None], pa.int64())}, "null timestamp"),
        ({"user_id": [None], "item_id": [2]}, "none of the 1 rows is usable: user_id is null"),
        ({"user_id": [1.5], "item_id": [2]}, r"not an integer \(1 rows, e.g. .*1.5"),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(tmp_path, table, words):
    with pytest.raises(ValueError, match=words):
        run(write_source(tmp_path / "set", table), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


def test_empty_and_damaged_files_are_refused_in_words(tmp_path):
    source = write_source(tmp_path / "set", EVENTS)
    whole = (source / "events.parquet").read_bytes()
    for content, words in (
        (b"", "is empty"),
        (whole[: len(whole) // 2], "cannot be read"),
        (b"a,b", "cannot be read"),
    ):
        (source / "events.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=words):
            run(source, tmp_path / "out")
    empty = pa.table({"user_id": pa.array([], pa.int64()), "item_id": pa.array([], pa.int64())})
    with pytest.raises(ValueError, match="holds no rows"):
        run(write_source(tmp_path / "set", empty), tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        run(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="has no events"):
        run(tmp_path / "bare", tmp_path / "out")


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path, monkeypatch):
    source = write_source(tmp_path / "set", EVENTS)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare_module, "_write_users", full)
    with pytest.raises(OSError, match=r"no space left while writing .*out.*bytes free.*nothing half-written"):
        run(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


def test_a_failed_run_leaves_the_former_dataset(tmp_path, monkeypatch):
    source, out = write_source(tmp_path / "set", EVENTS), tmp_path / "out"
    run(source, out)
    before = files_of(out)

    def fail(*_):
        raise RuntimeError("boom")

    monkeypatch.setattr(prepare_module, "_write_users", fail)
    with pytest.raises(RuntimeError, match="boom"):
        run(source, out, duplicates="drop")
    assert files_of(out) == before


def test_items_bring_titles_categories_and_tokens(tmp_path):
    items = {
        "item_id": [20, 10, 99, 20, None],
        "title": ["Heat (1995)", None, "Never seen", "Again", "No id"],
        "genres": ["Action|Crime", "", "Drama", "X", "Y"],
    }
    dataset = run(
        write_source(tmp_path / "set", EVENTS, items), tmp_path / "out", text=TextConfig(max_tokens=8)
    )
    assert dataset.titles(np.array([1, 2])) == ["Heat (1995)", ""]
    table = pq.read_table(tmp_path / "out" / "items.parquet").to_pylist()
    assert table[0]["categories"] == ["Action", "Crime"]
    assert table[0]["text"] == "Heat (1995). Action, Crime"
    tokens = np.load(tmp_path / "out" / "item_tokens.npy")
    assert tokens.shape == (5, 8)
    assert tokens.dtype == np.int32
    words = (tmp_path / "out" / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert [words[i] for i in tokens[1]] == ["[CLS]", "heat", "(", "1995", ")", ".", "action", "[SEP]"]
    assert not tokens[0].any()
    assert not tokens[2].any()
    counts = statistics_of(tmp_path / "out")["items"]
    assert (counts["never_seen"], counts["repeated_in_items_table"], counts["without_entry_in_items_table"]) == (
        1, 1, 2,
    )  # fmt: skip
    quarantine = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert [(row["source"], row["row"], row["reason"]) for row in quarantine] == [
        ("items:items.parquet", 4, "item_id is null")
    ]


def test_ids_may_be_strings_of_any_script(tmp_path):
    events = {"user_id": ["Ünal", "Ünal", "安"], "item_id": ["b", "a|,\n", "a|,\n"], "timestamp": [1, 2, 3]}
    items = {"item_id": ["b", "a|,\n"], "title": ["Bé", "\u202eright to left"]}
    dataset = run(write_source(tmp_path / "set", events, items), tmp_path / "out")
    assert list(dataset.user_keys) == ["Ünal", "安"]
    assert list(dataset.item_keys) == ["a|,\n", "b"]
    assert dataset.titles(np.array([1])) == ["\u202eright to left"]


def test_ids_of_items_must_be_of_the_events_type(tmp_path):
    source = write_source(tmp_path / "set", EVENTS, {"item_id": ["10", "20"], "title": ["a", "b"]})
    with pytest.raises(ValueError, match="holds strings, but the events' ids are integers"):
        run(source, tmp_path / "out")
    dataset = run(source, tmp_path / "out", columns=ColumnMap(id_type="string"))
    assert dataset.titles(np.array([1])) == ["b"]


def test_large_unsigned_ids_are_kept_exactly(tmp_path):
    ids = pa.array([2**64 - 1, 2**63, 2**64 - 1], pa.uint64())
    dataset = run(
        write_source(tmp_path / "set", {"user_id": ids, "item_id": ids, "timestamp": [1, 2, 3]}),
        tmp_path / "out",
    )
    assert [int(key) for key in dataset.user_keys] == [2**63, 2**64 - 1]


def test_behaviours_come_from_flags_names_and_values(tmp_path):
    events = {
        "user_id": [1, 1, 1],
        "item_id": [1, 2, 3],
        "order": [0, 1, 2],
        "is_click": [1, 0, None],
        "long_view": [True, False, None],
        "behaviour": pa.array(["tip", "buy", None]).dictionary_encode(),
        "listen_count": [50, 100, None],
    }
    dataset = run(write_source(tmp_path / "set", events), tmp_path / "out")
    assert dataset.metadata.behaviours == ("listen_often", "click", "long_view", "buy", "tip")
    assert history(dataset, 0)[2] == [[0, 1, 1, 0, 1], [1, 0, 0, 1, 0], [-1, -1, -1, -1, -1]]
    columns = ColumnMap(flags=("-",), behaviour="-", value=ValueLabel(at_least=50, name="heard"))
    dataset = run(write_source(tmp_path / "set", events), tmp_path / "again", columns=columns)
    assert dataset.metadata.behaviours == ("heard",)
    assert history(dataset, 0)[2] == [[1], [1], [-1]]


def test_a_behaviour_named_twice_is_refused(tmp_path):
    events = {"user_id": [1], "item_id": [1], "behaviour": ["like"], "rating": [5]}
    with pytest.raises(ValueError, match="not distinct"):
        run(write_source(tmp_path / "set", events), tmp_path / "out")
    many = {"user_id": [1] * 200, "item_id": [1] * 200, "behaviour": [str(i) for i in range(200)]}
    with pytest.raises(ValueError, match="more than 120 different behaviours"):
        run(write_source(tmp_path / "set", many), tmp_path / "out")


def test_sessions_with_repeats_do_not_filter_what_is_seen(tmp_path):
    events = {"user_id": [1] * 6, "item_id": [1, 2, 1, 2, 1, 3], "order": list(range(6))}
    source = write_source(tmp_path / "set", events)
    assert not run(source, tmp_path / "auto").metadata.filter_seen
    assert run(source, tmp_path / "told", filter_seen=True).metadata.filter_seen
    assert (
        run(write_source(tmp_path / "b", EVENTS), tmp_path / "c", columns=ColumnMap(filter_seen=False))
        is not None
    )
    assert not PreparedDataset.open(tmp_path / "c").metadata.filter_seen


def test_users_table_tells_unknown_users(tmp_path):
    run(write_source(tmp_path / "set", EVENTS, users={"user_id": [3, 7, 8]}), tmp_path / "out")
    assert statistics_of(tmp_path / "out")["users"]["without_entry_in_users_table"] == 1


def test_without_time_and_order_the_file_decides_and_a_warning_says_so(tmp_path, caplog):
    events = {"user_id": [1, 1, 1], "item_id": [3, 1, 2]}
    dataset = run(write_source(tmp_path / "set", events), tmp_path / "out")
    assert history(dataset, 0)[0] == [3, 1, 2]
    assert "neither order nor timestamp" in caplog.text


def test_many_buckets_give_the_bytes_of_one(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    events = {
        "user_id": random.integers(0, 50, 2000),
        "item_id": random.integers(0, 300, 2000),
        "timestamp": random.integers(0, 1000, 2000),
    }
    source = write_source(tmp_path / "set", events)
    run(source, tmp_path / "one", split=GlobalTime())
    monkeypatch.setattr("jaxrec.data.spool.ROWS_PER_BUCKET", 300)
    monkeypatch.setattr("jaxrec.data.bucket_sort._EVENTS_AT_ONCE", 100)
    monkeypatch.setattr("jaxrec.data.sources._BATCH_ROWS", 170)
    run(source, tmp_path / "many", split=GlobalTime())
    assert files_of(tmp_path / "one") == files_of(tmp_path / "many")


def test_the_embedded_set_is_the_default(tmp_path):
    prepare(DataConfig(), tmp_path / "out")
    dataset = PreparedDataset.open(tmp_path / "out")
    metadata = dataset.metadata
    assert (metadata.name, metadata.num_users, metadata.num_items, metadata.num_events) == (
        "ml-latest-small", 610, 9724, 100_836,
    )  # fmt: skip
    assert metadata.filter_seen
    assert metadata.behaviours == ("like",)
    assert dataset.titles(np.array([1])) == ["Forrest Gump (1994)"]
    assert "commercial" in (embedded_path() / "LICENSE-README.txt").read_text(encoding="utf-8")


def test_a_part_folder_and_a_single_file_are_sources_too(tmp_path):
    whole = pa.table(EVENTS)
    write_source(tmp_path / "set", whole)
    (tmp_path / "parts" / "events").mkdir(parents=True)
    for number in range(4):
        pq.write_table(whole.slice(2 * number, 2), tmp_path / "parts" / "events" / f"{number}.parquet")
    expected = [history(run(tmp_path / "set", tmp_path / "a"), user) for user in range(3)]
    assert [history(run(tmp_path / "parts", tmp_path / "b"), user) for user in range(3)] == expected
    assert [
        history(run(tmp_path / "set" / "events.parquet", tmp_path / "c"), user) for user in range(3)
    ] == expected
    columns = ColumnMap(events="events/*.parquet")
    assert [
        history(run(tmp_path / "parts", tmp_path / "d", columns=columns), user) for user in range(3)
    ] == expected
    pq.write_table(whole.rename_columns(["u", "v", "w", "x"]), tmp_path / "parts" / "events" / "9.parquet")
    with pytest.raises(ValueError, match="must agree"):
        run(tmp_path / "parts", tmp_path / "e")


@pytest.mark.parametrize("limit", [100_000, 2_000_000])
def test_a_real_limit_on_file_sizes_is_a_full_disk(tmp_path, limit):
    """The kernel refuses the bytes: the small limit stops the first table, the large one the spool."""
    program = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "from jaxrec.prepare import main\n"
        f"sys.exit(main(['--out={tmp_path / 'out'}']))\n"
    )
    # -B: Python would leave half of a module's bytecode behind under the limit, for other tests to stumble over.
    done = subprocess.run([sys.executable, "-B", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "nothing half-written was left" in " ".join(done.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_milliseconds_keep_their_order_and_become_seconds(tmp_path, caplog):
    events = {
        "user_id": [1, 1, 1],
        "item_id": [1, 2, 3],
        "timestamp": [1_600_000_000_999, 1_600_000_000_001, 5],
    }
    source = write_source(tmp_path / "set", events)
    dataset = run(source, tmp_path / "out", columns=ColumnMap(timestamp_unit="ms"))
    assert history(dataset, 0)[:2] == ([3, 2, 1], [0, 1_600_000_000, 1_600_000_000])
    assert "timestamp_unit=ms" not in caplog.text
    run(source, tmp_path / "other")
    assert "timestamp_unit=ms" in caplog.text


@pytest.mark.parametrize(("unit", "per_second"), [("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
def test_times_as_floats_count_in_every_unit(tmp_path, unit, per_second):
    times = (np.array([1_600_000_002, 1_600_000_001]) * per_second).astype(float)
    events = {"user_id": [1, 1], "item_id": [1, 2], "timestamp": times}
    dataset = run(
        write_source(tmp_path / "set", events), tmp_path / "out", columns=ColumnMap(timestamp_unit=unit)
    )
    assert history(dataset, 0)[:2] == ([2, 1], [1_600_000_001, 1_600_000_002])


def test_times_before_1970_and_in_every_column_type_split_alike(tmp_path):
    seconds = np.arange(-50, 50)
    base = {"user_id": np.arange(100) % 7, "item_id": np.arange(100)}
    cuts = []
    for number, times in enumerate(
        [seconds, seconds.astype(float), pa.array(seconds * 1000).cast(pa.timestamp("ms"))]
    ):
        run(write_source(tmp_path / f"{number}", {**base, "timestamp": times}), tmp_path / f"out{number}",
            split=GlobalTime())  # fmt: skip
        cuts.append(statistics_of(tmp_path / f"out{number}")["split"]["cut_times"])
    assert cuts == [[30, 40]] * 3
