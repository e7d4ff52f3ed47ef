"""Candidates of other methods, and the index: what a bundle holds gives the methods' own scores."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.data.dataset import Histories, PreparedDataset
from jaxrec.evaluation.baselines.ease import EASE
from jaxrec.evaluation.baselines.ials import IALS
from jaxrec.evaluation.baselines.item_knn import ItemKNN
from jaxrec.export.candidates import METHODS, Factors, Neighbours, read_candidates, write_candidates
from jaxrec.export.item_index import ItemIndex

NUM_ITEMS, NUM_USERS = 30, 40


def histories(lists):
    lengths = [len(row) for row in lists]
    flat = np.array([item for row in lists for item in row], np.int32)
    return Histories(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        flat,
        np.arange(len(flat)),
        np.zeros((len(flat), 0), np.int8),
    )


@pytest.fixture(scope="module")
def train():
    rng = np.random.default_rng(0)
    return histories([rng.integers(1, NUM_ITEMS + 1, rng.integers(2, 12)) for _ in range(NUM_USERS)])


@pytest.fixture(scope="module")
def fitted(train):
    methods = {"item_knn": ItemKNN(), "ease": EASE(), "ials": IALS(num_factors=4)}
    known = {
        "item_knn": Neighbours.of(methods["item_knn"].fit(train, NUM_ITEMS), NUM_ITEMS),
        "ease": Neighbours.of(methods["ease"].fit(train, NUM_ITEMS), NUM_ITEMS),
        "ials": Factors.fit(train, NUM_ITEMS, methods["ials"]),
    }
    return {name: (method.fit(train, NUM_ITEMS), known[name]) for name, method in methods.items()}


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=20, deadline=None)
@given(history=st.lists(st.integers(1, NUM_ITEMS), min_size=1, max_size=8))
def test_scores_are_those_of_the_method(fitted, name, history):
    method, known = fitted[name]
    wanted = method.scores(histories([history]))[0]
    ids, scores = known.scores(np.array(history))
    assert np.all(np.diff(ids) > 0)
    found = np.zeros(NUM_ITEMS + 1, np.float32)
    found[ids] = scores
    np.testing.assert_allclose(found[1:], wanted[1:], rtol=1e-3, atol=1e-4)


def test_neighbours_keep_the_largest_weights(fitted):
    method, _ = fitted["ease"]
    whole = np.stack([method.scores(histories([[item]]))[0] for item in range(1, NUM_ITEMS + 1)])
    cut = Neighbours.of(method, NUM_ITEMS)
    for item in range(1, NUM_ITEMS + 1):
        ids, scores = cut.scores(np.array([item]))
        np.testing.assert_allclose(scores, whole[item - 1][ids], rtol=1e-4, atol=1e-6)


def test_they_are_written_and_read(train, tmp_path):
    dataset = PreparedDataset.from_histories(train, num_items=NUM_ITEMS)
    write_candidates(dataset, ["item_knn", "ials"], tmp_path)
    read = read_candidates(tmp_path)
    assert list(read) == ["item_knn", "ials"]
    only = dataset.prefixes(np.arange(NUM_USERS), dataset.train_end)
    for name in read:
        wanted, found = (
            METHODS[name](only, NUM_ITEMS).scores(np.array([1, 2])),
            read[name].scores(np.array([1, 2])),
        )
        np.testing.assert_array_equal(found[0], wanted[0])
        np.testing.assert_allclose(found[1], wanted[1], rtol=1e-4, atol=1e-5)


def test_nothing_is_written_where_nothing_is_asked_for(train, tmp_path):
    dataset = PreparedDataset.from_histories(train, num_items=NUM_ITEMS)
    write_candidates(dataset, [], tmp_path)
    assert read_candidates(tmp_path) == {} and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="candidates of 'lda': there are item_knn, ease, ials"):
        write_candidates(dataset, ["lda"], tmp_path)


def test_the_index_finds_the_best_with_the_bias(tmp_path):
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(20, 16))
    vectors = (centres[rng.integers(0, 20, 5_001)] + 0.3 * rng.normal(size=(5_001, 16))).astype(np.float32)
    bias = rng.normal(size=5_001).astype(np.float32)
    queries = (centres[rng.integers(0, 20, 50)] + 0.3 * rng.normal(size=(50, 16))).astype(np.float32)
    index, recall = ItemIndex.build(vectors, bias, queries, recall=0.95)
    assert recall >= 0.95
    assert index.num_probes < 4 * np.sqrt(5_000), "an index that looks everywhere is none"
    index.write(tmp_path)
    again = ItemIndex.read(tmp_path, {"index": {"num_probes": index.num_probes}})
    found = []
    for query in queries:
        best = 1 + np.argsort(-(vectors[1:] @ query + bias[1:]))[:100]
        np.testing.assert_array_equal(again.search(query, 100), index.search(query, 100))
        found.append(np.isin(best, again.search(query, 100)).mean())
    assert np.mean(found) == pytest.approx(recall)
    assert ItemIndex.read(tmp_path / "nowhere", {}) is None
