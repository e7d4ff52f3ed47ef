"""Queries: read, cleaned, split by word and by pair, kept with the data."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.data.config import DataConfig, QueryConfig
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.prepare import prepare, prepared_fingerprint
from jaxrec.data.queries import KINDS, PARTS

NUM_ITEMS, NUM_WORDS = 12, 60


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three users who have seen every item, and queries of one and of two words."""
    path = tmp_path_factory.mktemp("searched")
    users = np.repeat([1, 2, 3], NUM_ITEMS)
    events = {
        "user_id": users,
        "item_id": np.tile(np.arange(1, NUM_ITEMS + 1), 3),
        "order": np.arange(len(users)),
    }
    pq.write_table(pa.table(events), path / "events.parquet")
    single = [(f"word{i}", item) for i in range(NUM_WORDS) for item in range(1, 1 + i % 6)]
    double = [(f"word{i} word{i + 1}", 7 + i % 5) for i in range(NUM_WORDS - 1)]
    odd = [("  Word1 ", 9), ("WORD1", 9), ("word2", 999), (" ", 1), (None, 1)]
    texts, items = zip(*single, *double, *odd, strict=True)
    pq.write_table(pa.table({"tag": pa.array(texts, pa.string()), "item_id": items}), path / "tags.parquet")
    return path


def config_of(path, **fields):
    return DataConfig(path=str(path), queries=QueryConfig(file="tags.parquet", text="tag", **fields))


def test_parts_hold_out_words_and_pairs(source, tmp_path):
    prepare(config_of(source, held_out_words=0.2, held_out_pairs=0.3), tmp_path / "out")
    dataset = PreparedDataset.open(tmp_path / "out")
    table = dataset.queries
    statistics = json.loads((tmp_path / "out" / "statistics.json").read_text())
    counts = statistics["queries"]
    assert counts["unknown_items"] == 1
    assert counts["repeated"] == 1
    assert counts["queries"] == len(table.texts)
    assert sum(counts[part] for part in PARTS) == len(table.item_ids)
    assert sum(one["rows"] for one in statistics["quarantine"] if one["table"] == "queries") == 2
    assert min(counts[part] for part in PARTS) > 10

    trained = table.pairs("train")
    words = {word for query in trained.query_ids for word in table.texts[query].split()}
    kinds = table.kinds()
    for query, text in enumerate(table.texts):
        wanted = 0 if query in trained.query_ids else 1 if words.issuperset(text.split()) else 2
        assert kinds[query] == wanted, (text, KINDS)
    assert (kinds == 2).sum() > 5, "some words are held out"
    pairs = Counter(zip(table.query_ids.tolist(), table.item_ids.tolist(), strict=True))
    assert max(pairs.values()) == 1, "no pair is in two parts"
    answers = trained.answers()
    assert answers.shape[1] == np.bincount(trained.query_ids).max()
    assert sorted(answers[answers > 0].tolist()) == sorted(trained.item_ids.tolist())


def test_the_fingerprint_knows_the_queries_where_there_are_any(source, tmp_path):
    found = []
    for name, config in (
        ("without", DataConfig(path=str(source))),
        ("with", config_of(source)),
        ("other", config_of(source, held_out_pairs=0.4)),
    ):
        prepare(config, tmp_path / name)
        found.append(prepared_fingerprint(tmp_path / name))
    assert len(set(found)) == 3
    assert PreparedDataset.open(tmp_path / "without").queries is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"file": "nothing.csv"}, "data.queries.file='nothing.csv': there is no "),
        ({"text": "query"}, "data.queries.text='query' is no column of .*which has tag, item_id"),
    ],
)
def test_a_table_that_is_not_there_is_named(source, tmp_path, fields, said):
    queries = QueryConfig(**{"file": "tags.parquet", "text": "tag"} | fields)
    with pytest.raises(ValueError, match=said):
        prepare(DataConfig(path=str(source), queries=queries), tmp_path / "out")


def test_a_share_is_below_one():
    with pytest.raises(ValueError, match="data.queries.held_out_words=1"):
        QueryConfig(file="tags.parquet", held_out_words=1)
