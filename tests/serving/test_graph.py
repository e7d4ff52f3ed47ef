import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest

from jaxrec.serving import graph
from jaxrec.serving.graph import GraphRules
from jaxrec.serving.store import AddedItem
from jaxrec.serving.view import View


@pytest.fixture
def keys(version):
    """Own ids of the first items."""
    return [version.bundle.catalogue.vocabulary.key_of(item) for item in range(1, 5)]


def edges(keys, relation="sequel_of"):
    first, second, third, other = keys
    rows = [
        (second, relation, first),
        (third, relation, second),
        (other, relation, "lost film"),
        ("n", relation, second),
        ("unknown", relation, first),
        (first, "made_by", other),
        (None, relation, first),
    ]
    return pa.table(
        {
            name: pa.array([row[at] if row[at] is None else str(row[at]) for row in rows])
            for at, name in enumerate(("head", "relation", "tail"))
        }
    )


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_a_sequel_waits_for_its_first_part(ending, keys, version, tmp_path):
    path = tmp_path / f"graph.{ending}"
    (pq.write_table if ending == "parquet" else csv.write_csv)(edges(keys), path)
    view = View.of(version, {"n": AddedItem(item_id="n", title="the fourth")}, [], 1)
    rules = GraphRules.read(path, "sequel_of").of(view)
    new = view.num_items
    assert rules.blocked(np.array([], np.int64)).tolist() == [2, 3, 4, new]
    assert rules.blocked(np.array([1])).tolist() == [3, 4, new]
    assert rules.blocked(np.array([2, 1])).tolist() == [4]


def test_a_relation_may_be_read_backwards(keys, version, tmp_path):
    table = edges(keys, "followed_by").rename_columns(["tail", "relation", "head"])
    pq.write_table(table, tmp_path / "graph.parquet")
    rules = GraphRules.read(tmp_path / "graph.parquet", "~followed_by")
    view = View.of(version, {}, [], 1)
    assert rules.of(view) is rules.of(view), "resolved once"
    assert rules.of(view).blocked(np.array([1])).tolist() == [3, 4]


def test_a_csv_says_ids_as_they_are_written(tmp_path):
    path = tmp_path / "graph.csv"
    path.write_text("head,relation,tail\n0012,sequel_of,0011\nNA,sequel_of,1e3\n,sequel_of,1\n")
    assert GraphRules.read(path, "sequel_of")._edges == [("0012", "0011"), ("NA", "1e3")]
    path.write_text("head,relation,tail\n3,1,2\n")
    assert GraphRules.read(path, "1")._edges == [("3", "2")]


def test_what_is_no_graph_is_refused_in_words(keys, tmp_path, monkeypatch):
    path = tmp_path / "graph.parquet"
    pq.write_table(edges(keys), path)
    with pytest.raises(ValueError, match="no edge 'prequel_of'; it has made_by, sequel_of"):
        GraphRules.read(path, "prequel_of")
    monkeypatch.setattr(graph, "MOST_EDGES", 3)
    with pytest.raises(ValueError, match="has 7 edges, and at most 3 are read"):
        GraphRules.read(path, "sequel_of")
    pq.write_table(edges(keys).drop_columns(["tail"]), path)
    with pytest.raises(ValueError, match="no column 'tail'; it must have head, relation, tail"):
        GraphRules.read(path, "sequel_of")
    pq.write_table(pa.table({"head": [["a"]], "relation": ["sequel_of"], "tail": ["b"]}), path)
    with pytest.raises(ValueError, match="a column that is neither text nor numbers"):
        GraphRules.read(path, "sequel_of")
    with pytest.raises(ValueError, match="cannot be read"):
        GraphRules.read(tmp_path / "nowhere.csv", "sequel_of")
