"""Sources: CSV cells stay what they are written as, damaged lines are told, files are found where they may lie."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.data import sources
from jaxrec.data.columns import ColumnMap
from jaxrec.data.config import DataConfig
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.prepare import prepare
from jaxrec.data.sources import TableFiles, open_directory


def run(
    directory: Path, text: str | bytes, name: str = "events.csv", **columns
) -> tuple[PreparedDataset, dict, list]:
    directory.mkdir(exist_ok=True)
    (directory / name).write_bytes(text.encode() if isinstance(text, str) else text)
    prepare(DataConfig(path=str(directory), columns=ColumnMap(**columns)), directory / "out")
    statistics = json.loads((directory / "out" / "statistics.json").read_text(encoding="utf-8"))
    quarantine = pq.read_table(directory / "out" / "quarantine.parquet").to_pylist()
    return PreparedDataset.open(directory / "out"), statistics, quarantine


def test_csv_numbers_become_integers_and_bad_ones_are_set_aside(tmp_path):
    text = (
        "user_id,item_id,timestamp,rating\n"
        "1,10,100,5\n"
        "2.0,1e1,100.0,3.5\n"
        "1,11,90,4\n"
        "1.5,10,1,5\n"
        "1,99999999999999999999999,1,5\n"
        ",10,1,5\n"
        "NULL,10,1,5\n"
        "1,12,95,five\n"
        "1,13,NULL,\n"
    )
    with pytest.raises(ValueError, match=r"1 of 4 events have a null timestamp"):
        run(tmp_path / "set", text)
    dataset, statistics, quarantine = run(tmp_path / "set", text.replace("NULL,\n", "97,\n"))
    assert np.asarray(dataset.user_keys).tolist() == [1, 2]
    assert np.asarray(dataset.item_keys).dtype == np.int64
    assert statistics["rows"]["read"] == 9
    assert statistics["rows"]["kept"] == 4
    assert [(row["row"], row["reason"]) for row in quarantine] == [
        (3, "user_id is not an integer"),
        (4, "item_id is an integer beyond 64 bits (id_type=string keeps it)"),
        (5, "user_id is null"),
        (6, "user_id is null"),
        (7, "rating is not a number"),
    ]
    assert json.loads(quarantine[1]["content"])["item_id"] == "99999999999999999999999"
    one = dataset.histories(np.array([0]))
    assert one.timestamps.tolist() == [90, 97, 100]
    assert one.labels.ravel().tolist() == [1, -1, 1]


def test_csv_ids_with_a_letter_or_a_leading_zero_are_strings(tmp_path):
    dataset, _, _ = run(tmp_path / "a", "user_id,item_id,timestamp\n1,B01,1\n2,22,2\n")
    assert list(dataset.item_keys) == ["22", "B01"]
    dataset, _, _ = run(tmp_path / "b", "user_id,item_id,timestamp\n1,007,1\n2,7,2\n")
    assert list(dataset.item_keys) == ["007", "7"]
    huge = "9" * 40
    dataset, _, _ = run(tmp_path / "c", f"user_id,item_id,timestamp\n1,{huge},1\n2,7,2\n", id_type="string")
    assert list(dataset.item_keys) == ["7", huge]


def test_csv_lines_that_are_no_rows_are_set_aside_with_their_number(tmp_path):
    text = "user_id,item_id,timestamp\n1,10,100\n1,11\n1,12,102\nx,y,z,w\n1,13,1e400\n"
    dataset, statistics, quarantine = run(tmp_path / "set", text)
    assert dataset.metadata.num_events == 2
    assert statistics["rows"]["read"] == 5
    assert [(row["row"], row["content"]) for row in quarantine[:2]] == [(1, "1,11"), (3, "x,y,z,w")]
    assert quarantine[2]["row"] == 4


def test_csv_bytes_that_are_no_text_are_set_aside(tmp_path):
    text = b"user_id,item_id,order\nM\xfcller,a,0\nanna,b,1\nanna,\xff\xfe,2\n"
    dataset, _, quarantine = run(tmp_path / "set", text)
    assert list(dataset.user_keys) == ["anna"]
    assert [(row["row"], row["reason"]) for row in quarantine] == [
        (0, "user_id is not UTF-8"),
        (2, "item_id is not UTF-8"),
    ]


def test_csv_variants_tabs_gzip_quotes_dates_and_usual_names(tmp_path):
    text = (
        "userId\tmovieId\ttimestamp\n"
        '1\t"5"\t2020-01-01\n'
        "1\t6\t2019-12-31T23:59:59+00:00\n"
        "1\t7\t2020-01-01 00:00:01\n"
    )
    dataset, _, _ = run(tmp_path / "tabs", text, "events.tsv")
    assert dataset.histories(np.array([0])).timestamps.tolist() == [1577836799, 1577836800, 1577836801]
    dataset, _, quarantine = run(
        tmp_path / "gzip", gzip.compress(text.replace("\t", ",").encode()), "events.csv.gz"
    )
    assert dataset.metadata.num_events == 3
    assert quarantine == []
    dataset, _, quarantine = run(tmp_path / "bad", text + "1\t8\tyesterday\n", "events.tsv")
    assert [row["reason"] for row in quarantine] == ["timestamp is not a time"]
    with_bom = b"\xef\xbb\xbf" + b"user_id,item_id,order\r\n1,2,3\r\n"
    dataset, _, _ = run(tmp_path / "bom", with_bom)
    assert dataset.metadata.num_events == 1


def test_csv_items_and_other_file_names(tmp_path):
    (tmp_path / "set").mkdir()
    movies = 'movieId,title,genres\n1,"Good, Bad",Drama|War\n2,Ünïcödé,\nbroken\n'
    (tmp_path / "set" / "movies.csv").write_text(movies, encoding="utf-8")
    text = "userId,movieId,rating,timestamp\n1,1,4.0,10\n1,2,3.0,20\n1,3,5.0,30\n"
    dataset, statistics, quarantine = run(
        tmp_path / "set", text, "ratings.csv", events="ratings.csv", items="movies.csv"
    )
    titles = dict(zip(np.asarray(dataset.item_keys).tolist(), dataset.titles(np.arange(1, 4)), strict=True))
    assert titles == {1: "Good, Bad", 2: "Ünïcödé", 3: ""}
    assert statistics["items"]["without_entry_in_items_table"] == 1
    assert [row["content"] for row in quarantine] == ["broken"]
    with pytest.raises(ValueError, match=r"columns.items='films.csv' matches no file"):
        run(tmp_path / "set", text, "ratings.csv", events="ratings.csv", items="films.csv")


def test_an_empty_or_headerless_csv_is_refused(tmp_path):
    for text, words in (
        ("", "is empty"),
        ("user_id,item_id\n", "holds no rows"),
        ("a,a\n1,2\n", "more than one"),
    ):
        with pytest.raises(ValueError, match=words):
            run(tmp_path / "set", text)
    with pytest.raises(ValueError, match="no user column"):
        run(tmp_path / "set", "1,2\n3,4\n")


def test_line_numbers_hold_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_CSV_BLOCK_BYTES", 64)
    lines = ["1,2,3" if row % 7 else "odd" for row in range(200)]
    path = tmp_path / "events.csv"
    path.write_text("user_id,item_id,order\n" + "\n".join(lines) + "\n")
    rows, unreadable = [], []
    for part in TableFiles((path,)).batches(["user_id"]):
        rows += part.rows.tolist()
        unreadable += [row for row, _ in part.unreadable]
        assert part.batch.schema.names == ["user_id"]
    assert unreadable == [row for row in range(200) if row % 7 == 0]
    assert rows == [row for row in range(200) if row % 7]


def test_mixed_kinds_and_unfit_impressions_are_refused(tmp_path):
    (tmp_path / "events").mkdir()
    pq.write_table(pa.table({"user_id": [1], "item_id": [2]}), tmp_path / "events" / "a.parquet")
    (tmp_path / "events" / "b.csv").write_text("user_id,item_id\n1,2\n")
    with pytest.raises(ValueError, match="mixes CSV and Parquet"):
        open_directory(tmp_path, "x", ColumnMap())
    (tmp_path / "other").mkdir()
    pq.write_table(pa.table({"click": [1]}), tmp_path / "other" / "impressions.parquet")
    with pytest.raises(ValueError, match="holds impressions"):
        open_directory(tmp_path / "other", "x", ColumnMap())


def test_a_category_is_what_its_values_are(tmp_path):
    table = pa.table(
        {"user_id": pa.array([5, 6, 5]).dictionary_encode(), "item_id": pa.array(["a", "b", "b"])}
    )
    pq.write_table(table, tmp_path / "events.parquet")
    files = TableFiles((tmp_path / "events.parquet",))
    assert files.schema.field("user_id").type == pa.int64()
    assert next(files.batches()).batch.column("user_id").to_pylist() == [5, 6, 5]
    assert files.estimated_rows() == 3


def test_a_few_odd_ids_among_numbers_are_told(tmp_path, caplog):
    rows = "".join(f"1,{item},{item}\n" for item in range(300))
    dataset, _, _ = run(tmp_path / "a", f"user_id,item_id,order\n{rows}1,odd,999\n")
    assert dataset.metadata.num_items == 301
    assert "1 of the 301 cells of item_id are no plain numbers" in caplog.text
    dataset, _, quarantine = run(tmp_path / "b", f"user_id,item_id,order\n{rows}1,odd,999\n", id_type="int64")
    assert dataset.metadata.num_items == 300
    assert [row["reason"] for row in quarantine] == ["item_id is not an integer"]
