import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxrec.data.dataset import UNKNOWN_TIME, Histories, PreparedDataset
from jaxrec.evaluation import baselines
from jaxrec.evaluation.baselines import ease, item_knn
from jaxrec.evaluation.baselines.base import interactions
from jaxrec.evaluation.baselines.content_knn import ContentKNN
from jaxrec.evaluation.baselines.evaluate import top_items
from jaxrec.metrics.ranking import mean_metrics, rank_targets

SMALL = dict(baselines.DEFAULT_BASELINES) | {"ials": baselines.IALS(num_factors=4, num_iterations=3)}


def histories_of(rows, times=None):
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    items = np.array([item for row in rows for item in row], np.int32)
    timestamps = np.full(len(items), UNKNOWN_TIME) if times is None else np.array(times, np.int64)
    return Histories(offsets, items, timestamps, np.zeros((len(items), 0), np.int8))


def random_histories(num_users, num_items, seed=0, longest=8):
    rng = np.random.default_rng(seed)
    return histories_of([rng.integers(1, num_items + 1, rng.integers(0, longest)) for _ in range(num_users)])


def dense(histories, num_items):
    matrix = np.zeros((len(histories), num_items + 1))
    matrix[np.repeat(np.arange(len(histories)), np.diff(histories.offsets)), histories.item_ids] = 1.0
    return matrix


@pytest.fixture(scope="module")
def dataset():
    """Users walk along a ring of items: the next item is certain, its popularity says nothing."""
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 30) + np.arange(length)) % 30 + 1 for length in rng.integers(1, 12, 120)]
    return PreparedDataset.from_histories(histories_of(rows), num_items=32)


def test_popularity_counts_training_events():
    fitted = baselines.Popularity().fit(histories_of([[1, 2, 2], [2, 3]]), 4)
    scores = fitted.scores(histories_of([[1], []]))
    np.testing.assert_array_equal(scores, [[-np.inf, 1, 3, 1, 0]] * 2)
    assert scores.dtype == np.float32


def test_recent_popularity_is_by_time_where_there_is_any_and_by_order_where_not():
    rows = [[1, 1, 2], [3, 3, 4]]
    timed = baselines.RecentPopularity(share=0.5).fit(histories_of(rows, [1, 2, 3, 4, 5, 6]), 4)
    np.testing.assert_array_equal(timed.item_scores, [0, 0, 1, 2, 1])  # the quantile's own time counts
    ordered = baselines.RecentPopularity(share=0.3).fit(histories_of(rows), 4)
    np.testing.assert_array_equal(ordered.item_scores, [0, 0, 1, 0, 1])
    times = [UNKNOWN_TIME, UNKNOWN_TIME, UNKNOWN_TIME, UNKNOWN_TIME, 5, 6]
    partly = baselines.RecentPopularity(share=1.0).fit(histories_of(rows, times), 4)
    np.testing.assert_array_equal(partly.item_scores, [0, 0, 0, 1, 1])


@pytest.mark.parametrize("settings", [{}, {"window": 2, "decay": 0.5, "shrinkage": 0.0}, {"decay": 1.0}])
def test_transition_equals_its_formula(settings):
    num_items, baseline = 9, baselines.Transition(**settings)
    train, queries = random_histories(40, num_items, longest=20), random_histories(10, num_items, 1, 20)
    counts = np.zeros((num_items + 1, num_items + 1))
    for row in np.split(train.item_ids, train.offsets[1:-1]):
        for t in range(len(row)):
            for gap in range(1, baseline.window + 1):
                if t + gap < len(row):
                    counts[row[t], row[t + gap]] += baseline.decay ** (gap - 1)
    rates = counts / np.maximum(counts.sum(axis=1, keepdims=True) + baseline.shrinkage, 1e-9)
    expected = np.zeros((len(queries), num_items + 1))
    for user, row in enumerate(np.split(queries.item_ids, queries.offsets[1:-1])):
        for age, item in enumerate(row[::-1][: baseline.window]):
            expected[user] += baseline.decay**age * rates[item]
    scores = baseline.fit(train, num_items).scores(queries)
    np.testing.assert_allclose(scores[:, 1:], expected[:, 1:], rtol=1e-5, atol=1e-7)
    assert (scores[:, 0] == -np.inf).all()


@pytest.mark.parametrize(("num_users", "num_items"), [(60, 25), (25, 60)])
@pytest.mark.parametrize("block", [4, 512])
def test_ease_equals_its_formula_by_items_and_by_users(monkeypatch, num_users, num_items, block):
    monkeypatch.setattr(ease, "BLOCK", block)
    monkeypatch.setattr(ease, "BLOCK_ELEMENTS", 100 * block)
    train, queries = random_histories(num_users, num_items), random_histories(15, num_items, 1)
    matrix = dense(train, num_items)[:, 1:]
    inverse = np.linalg.inv(matrix.T @ matrix + 2.0 * np.eye(num_items))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    fitted = baselines.EASE(regularization=2.0).fit(train, num_items)
    assert isinstance(fitted, ease.FittedDualEASE) == (num_users < num_items)
    scores = fitted.scores(queries)
    np.testing.assert_allclose(scores[:, 1:], dense(queries, num_items)[:, 1:] @ weights, atol=1e-5)
    assert (scores[:, 0] == -np.inf).all()


def test_ease_says_why_it_does_not_run():
    with pytest.raises(baselines.BaselineRefusedError, match=r"9 items and 8 users .* max_size=5"):
        baselines.EASE(max_size=5).fit(histories_of([[1]] * 8), 9)


@pytest.mark.parametrize("block_elements", [1, 1 << 20])
def test_item_knn_equals_its_formula(monkeypatch, block_elements):
    monkeypatch.setattr(item_knn, "BLOCK_ELEMENTS", block_elements)
    num_items, num_neighbours = 12, 3
    train, queries = random_histories(50, num_items), random_histories(10, num_items, 1)
    matrix = dense(train, num_items)
    common, sizes = matrix.T @ matrix, np.sqrt(matrix.sum(axis=0))
    similar = common / (sizes[:, None] * sizes + 10.0)
    np.fill_diagonal(similar, 0.0)
    for row in similar:
        row[row < np.sort(row)[-num_neighbours]] = 0.0
    scores = baselines.ItemKNN(num_neighbours=num_neighbours).fit(train, num_items).scores(queries)
    expected = dense(queries, num_items) @ similar.T
    np.testing.assert_allclose(scores[:, 1:], expected[:, 1:], rtol=1e-5, atol=1e-7)


@hypothesis.given(
    st.lists(st.lists(st.integers(0, 6), min_size=4, max_size=4), min_size=2, max_size=8),
    st.lists(st.lists(st.integers(1, 2), max_size=5), min_size=1, max_size=3),
)
def test_content_knn_equals_its_formula(texts, query_rows):
    num_items, queries = len(texts), histories_of([[min(i, len(texts)) for i in row] for row in query_rows])
    tokens = np.array([[0] * 4, *texts], np.int32)
    counts = np.array([[np.sum(row == token) for token in range(1, 7)] for row in tokens], float)
    frequency = np.maximum((counts > 0).sum(axis=0), 1)
    logs = np.log(np.where(counts > 0, counts, 1.0))
    weights = np.where(counts > 0, 1.0 + logs, 0.0) * np.log(num_items / frequency)
    weights /= np.maximum(np.linalg.norm(weights, axis=1, keepdims=True), 1e-12)
    expected = np.zeros((len(queries), num_items + 1))
    for query in range(len(queries)):
        history = queries.item_ids[queries.offsets[query] : queries.offsets[query + 1]]
        for age, item in enumerate(history[::-1]):
            expected[query] += 0.7**age * weights[item] @ weights.T
    found = ContentKNN(item_tokens=tokens, decay=0.7).fit(queries, num_items).scores(queries)
    np.testing.assert_allclose(found[:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-5)
    assert (found[:, 0] == -np.inf).all()


def test_ials_finds_the_block_that_a_query_is_from_and_repeats_itself():
    rng = np.random.default_rng(0)
    train = histories_of([rng.permutation(10)[:6] + 1 + 10 * (user % 2) for user in range(60)])
    queries = histories_of([[1, 2, 3], [11, 12, 13], []])
    baseline = baselines.IALS(num_factors=2, regularization=1.0)
    scores = baseline.fit(train, 20).scores(queries)
    assert scores[0, 4:11].min() > scores[0, 14:].max()
    assert scores[1, 14:].min() > scores[1, 4:11].max()
    assert np.isfinite(scores[2, 1:]).all()
    np.testing.assert_allclose(baseline.fit(train, 20).scores(queries), scores, rtol=1e-4, atol=1e-5)


def test_a_repeated_item_is_one_interaction():
    histories = histories_of([[2, 1, 2], []])
    matrix = interactions(histories, 3)
    np.testing.assert_array_equal(histories.item_ids, [2, 1, 2], "the histories are not ours to change")
    np.testing.assert_array_equal(histories.offsets, [0, 3, 3])
    np.testing.assert_array_equal(matrix.toarray(), [[0, 1, 1, 0], [0, 0, 0, 0]])


@hypothesis.settings(max_examples=10)
@hypothesis.given(
    st.lists(st.lists(st.integers(1, 6), max_size=6), min_size=1, max_size=6).filter(any),
    st.lists(st.lists(st.integers(1, 6), max_size=14), max_size=4),
)
def test_every_baseline_scores_every_item_for_any_histories(rows, query_rows):
    queries = histories_of(query_rows)
    for name, baseline in SMALL.items():
        scores = baseline.fit(histories_of(rows), 6).scores(queries)
        assert scores.shape == (len(queries), 7) and scores.dtype == np.float32, name
        assert np.isfinite(scores[:, 1:]).all() and (scores[:, 0] == -np.inf).all(), name


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluation_fits_on_train_and_queries_everything_before_the_target(dataset, split):
    results = baselines.evaluate_baselines(dataset, split, SMALL)
    ends = dataset.train_end if split == "validation" else dataset.validation_end
    stops = dataset.validation_end if split == "validation" else dataset.lengths
    users = np.flatnonzero((ends > 0) & (stops > ends))
    np.testing.assert_array_equal(results.user_indices, users)
    whole = dataset.histories(np.arange(len(dataset.lengths)))
    train = whole.take(np.arange(len(whole)), np.zeros(len(whole), int), dataset.train_end)
    queries = whole.take(users, np.zeros(len(users), int), ends[users])
    np.testing.assert_array_equal(results.targets, whole.item_ids[whole.offsets[users] + ends[users]])
    scores = baselines.Transition().fit(train, 32).scores(queries)
    seen = np.repeat(np.arange(len(users)), ends[users])
    ranks = rank_targets(scores, results.targets, seen, queries.item_ids)
    np.testing.assert_array_equal(results.ranks["transition"], ranks)
    assert set(results.ranks) == set(results.seconds) == set(SMALL)
    hits = {name: mean_metrics(of, (1,))["hr@1"] for name, of in results.ranks.items()}
    assert hits["transition"] > 0.9 > 0.3 > hits["popularity"], "the ring is certain for counts alone"


def test_chunks_and_chosen_users_change_no_rank(dataset):
    chosen = {name: SMALL[name] for name in ("popularity", "transition", "item_knn", "ease")}
    whole = baselines.evaluate_baselines(dataset, "test", chosen, num_recommended=5)
    parts = baselines.evaluate_baselines(dataset, "test", chosen, num_recommended=5, max_scores=100)
    some = baselines.evaluate_baselines(
        dataset, "test", chosen, user_indices=np.arange(50)[::-1], num_recommended=5
    )
    at = np.flatnonzero(whole.user_indices < 50)
    np.testing.assert_array_equal(some.user_indices, whole.user_indices[at])
    for name in chosen:
        np.testing.assert_array_equal(parts.ranks[name], whole.ranks[name])
        np.testing.assert_array_equal(parts.recommended[name], whole.recommended[name])
        np.testing.assert_array_equal(some.recommended[name], whole.recommended[name][at])


def test_recommended_items_are_consistent_with_the_ranks_and_never_seen(dataset):
    results = baselines.evaluate_baselines(dataset, "test", SMALL, num_recommended=5)
    for name, ranks in results.ranks.items():
        hit = np.flatnonzero(ranks < 5)
        new = [u for u in hit if not in_history(dataset, results, u)]
        np.testing.assert_array_equal(results.recommended[name][new, ranks[new]], results.targets[new])
        for user, items in zip(results.user_indices, results.recommended[name], strict=True):
            history = dataset.histories(np.array([user])).item_ids[: dataset.validation_end[user]]
            assert not set(items[items > 0]) & set(history)


def in_history(dataset, results, place):
    user = results.user_indices[place]
    history = dataset.histories(np.array([user])).item_ids[: dataset.validation_end[user]]
    return results.targets[place] in history


def test_filter_seen_follows_the_dataset_unless_told(dataset):
    rows = [[1, 1, 2, 1, 2]] * 3 + [[3, 3, 3]]
    repeating = PreparedDataset.from_histories(histories_of(rows), num_items=3)
    repeating_kept = PreparedDataset.from_histories(histories_of(rows), num_items=3, filter_seen=False)
    chosen = {"popularity": baselines.Popularity()}
    filtered = baselines.evaluate_baselines(repeating, "test", chosen, num_recommended=3)
    unfiltered = baselines.evaluate_baselines(repeating_kept, "test", chosen, num_recommended=3)
    forced = baselines.evaluate_baselines(repeating, "test", chosen, filter_seen=False)
    np.testing.assert_array_equal(filtered.ranks["popularity"], [0, 0, 0, 2])
    # Each target was seen before, and is left out of no list.
    np.testing.assert_array_equal(filtered.recommended["popularity"], [[2, 3, 0]] * 3 + [[1, 2, 3]])
    np.testing.assert_array_equal(unfiltered.ranks["popularity"], [1, 1, 1, 2])
    np.testing.assert_array_equal(unfiltered.recommended["popularity"], [[1, 2, 3]] * 4)
    np.testing.assert_array_equal(forced.ranks["popularity"], unfiltered.ranks["popularity"])


def test_fitting_with_validation_is_asked_for_and_never_sees_its_own_target(dataset):
    chosen = {"popularity": baselines.Popularity()}
    without = baselines.evaluate_baselines(dataset, "test", chosen)
    with_it = baselines.evaluate_baselines(dataset, "test", chosen, fit_with_validation=True)
    assert not np.array_equal(without.ranks["popularity"], with_it.ranks["popularity"])
    with pytest.raises(ValueError, match="fit_with_validation"):
        baselines.evaluate_baselines(dataset, "validation", chosen, fit_with_validation=True)


def test_a_refused_baseline_is_reported_with_its_reason(dataset):
    chosen = {"ease": baselines.EASE(max_size=3), "popularity": baselines.Popularity()}
    results = baselines.evaluate_baselines(dataset, "test", chosen)
    assert set(results.ranks) == {"popularity"}
    assert "max_size=3" in results.refused["ease"]


def test_bad_settings_are_named(dataset):
    with pytest.raises(ValueError, match="split='train'"):
        baselines.evaluate_baselines(dataset, "train")
    empty = PreparedDataset.from_histories(histories_of([[1]]), num_items=1)
    with pytest.raises(ValueError, match="0 users with a target"):
        baselines.evaluate_baselines(empty, "test")
    for make in (
        lambda: baselines.RecentPopularity(share=0.0),
        lambda: baselines.Transition(decay=1.5),
        lambda: baselines.ItemKNN(num_neighbours=0),
        lambda: baselines.EASE(regularization=0.0),
        lambda: baselines.IALS(num_factors=0),
        lambda: baselines.IALS(positive_weight=1.0),
    ):
        with pytest.raises(ValueError, match=r"=(0|0\.0|1\.0|1\.5)\b"):
            make()


def test_top_items_break_ties_by_lower_id_and_fill_up_with_padding():
    scores = np.array([[-np.inf, 1, 2, 2, 1], [-np.inf, -np.inf, 5, -np.inf, -np.inf]], np.float32)
    np.testing.assert_array_equal(top_items(scores.copy(), 3), [[2, 3, 1], [2, 0, 0]])
    np.testing.assert_array_equal(top_items(scores.copy(), 6)[0], [2, 3, 1, 4, 0, 0])
