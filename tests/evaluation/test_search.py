"""Search by words against hand-made formulas, and the metrics of a run that answers by a table."""

import dataclasses
import math

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.data.queries import QueryTable
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.evaluation.search import search_metrics
from jaxrec.evaluation.word_index import BM25, TfIdf

TEXTS = ["Toy Story. Animation, Comedy", "Heat. Crime", "", "Crime Story. Crime, Drama"]


def test_bm25_is_its_formula():
    scores = BM25(saturation=1.2, length=0.75).fit(TEXTS).scores(["crime story nobody", "heat"])
    mean_length = (4 + 2 + 0 + 4) / 4

    def weight(count, length, there):
        idf = math.log1p((4 - there + 0.5) / (there + 0.5))
        return idf * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * length / mean_length))

    wanted = [weight(1, 4, 2), weight(1, 2, 2), 0.0, weight(2, 4, 2) + weight(1, 4, 2)]
    np.testing.assert_allclose(scores[0, 1:], wanted, rtol=1e-5)
    np.testing.assert_allclose(scores[1, 1:], [0, weight(1, 2, 1), 0, 0], rtol=1e-5)
    assert np.isneginf(scores[:, 0]).all()


def test_tf_idf_is_its_formula():
    scores = TfIdf().fit(TEXTS).scores(["heat crime"])
    idf = {there: math.log(5 / (1 + there)) + 1 for there in (1, 2)}
    heat = (idf[1] * idf[1] + idf[2] * idf[2]) / math.hypot(idf[1], idf[2])
    last = 2 * idf[2] * idf[2] / math.sqrt((2 * idf[2]) ** 2 + idf[2] ** 2 + idf[1] ** 2)
    np.testing.assert_allclose(scores[0, 1:], [0, heat, 0, last], rtol=1e-5)


@dataclasses.dataclass
class SearchedRun:
    """Answers query `q` by the vector of item `answers[q]`."""

    base: object
    answers: np.ndarray

    def __getattr__(self, name):
        return getattr(self.base, name)

    def text_queries(self, token_ids):
        vectors = self.base.vectors[self.answers[token_ids[:, 0] - 1]]
        return jax.numpy.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


@pytest.fixture
def run(tmp_path, make_last_item_run):
    base = make_last_item_run()
    num_items = base.dataset.metadata.num_items
    texts = [f"film {item}" for item in range(1, num_items + 1)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "items.parquet")
    base.dataset.directory = tmp_path
    base.dataset.queries = QueryTable(
        texts=["film 3", "film 4", "gem"],
        token_ids=np.array([[1], [2], [3]], np.int32),
        query_ids=np.array([0, 0, 0, 1, 2, 2], np.int32),
        item_ids=np.array([3, 5, 6, 4, 7, 8], np.int32),
        parts=np.array([2, 0, 2, 2, 0, 2], np.int32),
    )
    return SearchedRun(base, np.array([3, 9, 8]))


def test_the_metrics_of_a_run(run):
    config = EvaluationConfig(ks=(1, 10), metric="ndcg@10", bootstrap_samples=100)
    with jax.set_mesh(run.mesh):
        found = search_metrics(run, "test", config)
        assert search_metrics(run, "validation", config) == {}
    assert found["all"]["num_queries"] == 3
    assert found["all"]["num_pairs"] == 4
    assert {name: part["num_pairs"] for name, part in found.items()} == {"all": 4, "known": 3, "new_words": 1}
    first = {name: part["systems"]["model"]["metrics"]["hr@1"] for name, part in found.items()}
    # Of query 0 one of two answers is first: the other is left out only while the first is asked. Query 1 is answered
    # by another item, and query 2 with its own.
    assert first["new_words"] == 0.0
    assert first["known"] >= 0.75
    words = found["all"]["systems"]["bm25"]["metrics"]["hr@1"]
    assert words == pytest.approx((0.5 + 1 + 0) / 3)
    taught = found["known"]["systems"]["bm25_with_queries"]["metrics"]
    assert set(taught) == set(found["known"]["systems"]["popularity"]["metrics"])
    low, high = found["all"]["systems"]["model"]["intervals"]["ndcg@10"]
    assert 0 <= low <= found["all"]["systems"]["model"]["metrics"]["ndcg@10"] <= high <= 1
