"""The quarantine: any row can be written, and the sums are those of the file."""

import datetime
import json

import pyarrow.parquet as pq
import pytest

from jaxrec.data.quarantine import Quarantine


def test_any_content_is_written_and_counted(tmp_path):
    with Quarantine(tmp_path / "q.parquet", flush_rows=2) as quarantine:
        quarantine.add(
            "events:a", 0, "one", {"x": b"\xff", "y": float("nan"), "z": datetime.date(2020, 1, 1)}
        )
        quarantine.add("events:b", 1, "one", "1,2\udcff")
        quarantine.add("items:c", 2, "two", {"ü": None})
    rows = pq.read_table(tmp_path / "q.parquet").to_pylist()
    assert [(row["source"], row["row"], row["reason"]) for row in rows] == [
        ("events:a", 0, "one"),
        ("events:b", 1, "one"),
        ("items:c", 2, "two"),
    ]
    assert json.loads(rows[0]["content"])["x"] == "\\xff"
    assert rows[1]["content"] == "1,2\\udcff"
    assert [(one["table"], one["reason"], one["rows"]) for one in quarantine.summary()] == [
        ("events", "one", 2),
        ("items", "two", 1),
    ]


def test_an_empty_quarantine_has_its_columns(tmp_path):
    with Quarantine(tmp_path / "q.parquet"):
        pass
    assert pq.read_table(tmp_path / "q.parquet").column_names == ["source", "row", "reason", "content"]
    with pytest.raises(RuntimeError), Quarantine(tmp_path / "r.parquet"):
        raise RuntimeError
