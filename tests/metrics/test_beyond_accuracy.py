import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxrec.metrics import beyond_accuracy

COUNTS = np.array([0, 7, 3, 1, 0])  # four items; the last one is cold
LISTS = np.array([[1, 2], [1, 3], [1, 0], [0, 0]])


def test_known_values():
    assert beyond_accuracy.catalogue_coverage(LISTS, 4) == 0.75
    np.testing.assert_array_equal(beyond_accuracy.average_popularity(LISTS, COUNTS), [5, 4, 7, np.nan])
    surprise = -np.log2(np.array([8, 4, 2, 1]) / 15)
    np.testing.assert_allclose(
        beyond_accuracy.novelty(LISTS, COUNTS),
        [surprise[[0, 1]].mean(), surprise[[0, 2]].mean(), surprise[0], np.nan],
    )
    # Exposures 0, 1, 1, 3: the mean absolute difference over all pairs, halved, over the mean.
    exposures = np.array([3, 1, 1, 0])
    pairwise = np.abs(exposures[:, None] - exposures).mean() / (2 * exposures.mean())
    assert beyond_accuracy.gini(LISTS, 4) == pytest.approx(pairwise)
    assert beyond_accuracy.popularity_lift(LISTS, np.array([2.0, 2.0, 4.0, 9.0]), COUNTS) == pytest.approx(
        1.0
    )


def test_gini_of_equal_and_of_single_exposure():
    assert beyond_accuracy.gini(np.array([[1, 2], [3, 4]]), 4) == 0.0
    assert beyond_accuracy.gini(np.array([[2], [2]]), 4) == 0.75  # 1 - 1 / num_items, its maximum


@st.composite
def lists_with_categories(draw):
    num_items = draw(st.integers(1, 6))
    names = st.sets(st.sampled_from("abcd"))
    categories = draw(st.lists(names, min_size=num_items, max_size=num_items))
    k = draw(st.integers(1, 4))
    row = st.lists(st.integers(0, num_items), min_size=k, max_size=k)
    return np.array(draw(st.lists(row, min_size=1, max_size=4))), categories


@hypothesis.given(lists_with_categories())
def test_category_diversity_equals_the_definition(problem):
    lists, categories = problem
    matrix = beyond_accuracy.category_matrix([sorted(row) for row in categories])
    values = beyond_accuracy.category_diversity(lists, matrix)
    for row, value in zip(lists, values, strict=True):
        sets = [categories[item - 1] for item in row if item and categories[item - 1]]
        distances = [
            1 - len(a & b) / len(a | b) for i, a in enumerate(sets) for j, b in enumerate(sets) if i < j
        ]
        assert np.isnan(value) if not distances else value == pytest.approx(np.mean(distances), abs=1e-6)


def test_vector_diversity_is_one_minus_the_cosine():
    vectors = np.array([[9, 9], [2, 0], [0, 3], [-1, 0], [5, 0]], np.float32)
    lists = np.array([[1, 2, 0], [1, 4, 0], [1, 3, 0], [1, 2, 4], [1, 0, 0]])
    expected = [1.0, 0.0, 2.0, 2 / 3, np.nan]
    np.testing.assert_allclose(beyond_accuracy.vector_diversity(lists, vectors), expected, atol=1e-6)


def test_chunks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    lists, vectors = rng.integers(0, 20, (30, 5)), rng.normal(size=(20, 4)).astype(np.float32)
    matrix = rng.random((20, 3)) < 0.5
    whole = (
        beyond_accuracy.vector_diversity(lists, vectors),
        beyond_accuracy.category_diversity(lists, matrix),
    )
    monkeypatch.setattr(beyond_accuracy, "CHUNK", 1)
    parts = (
        beyond_accuracy.vector_diversity(lists, vectors),
        beyond_accuracy.category_diversity(lists, matrix),
    )
    np.testing.assert_allclose(whole, parts, atol=1e-6)


def test_all_metrics_by_name_and_none_where_nothing_is_recommended():
    matrix = beyond_accuracy.category_matrix([("a",), ("a", "b"), (), ("b",)])
    given = dict(item_categories=matrix, item_vectors=np.eye(5, 3), history_means=np.ones(4))
    full = beyond_accuracy.list_metrics(LISTS, COUNTS, **given)
    assert set(full) == {
        f"{name}@2"
        for name in (
            "coverage", "gini", "novelty", "popularity", "category_diversity", "vector_diversity", "popularity_lift"
        )
    }  # fmt: skip
    assert all(isinstance(value, float) for value in full.values())
    assert full["category_diversity@2"] == pytest.approx(0.5)
    empty = beyond_accuracy.list_metrics(np.zeros((4, 2), int), COUNTS, **given)
    assert empty.pop("coverage@2") == 0.0
    assert set(empty.values()) == {None}


def test_an_item_outside_the_catalogue_is_named():
    with pytest.raises(ValueError, match=r"item 9 .* 1 \.\. 4"):
        beyond_accuracy.catalogue_coverage(np.array([[9]]), 4)
