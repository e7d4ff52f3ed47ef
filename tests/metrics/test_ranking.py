import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxrec.metrics import ranking


def brute_force_rank(scores, target, seen):
    """The definition, item by item."""
    rank = 0
    for item in range(1, len(scores)):
        if item == target or item in seen:
            continue
        if scores[item] > scores[target] or (scores[item] == scores[target] and item < target):
            rank += 1
    return rank


@st.composite
def ranking_problems(draw):
    num_items = draw(st.integers(1, 12))
    num_users = draw(st.integers(1, 5))
    few_values = st.sampled_from([-np.inf, -1.0, 0.0, 0.0, 0.5, 2.0])  # ties are the rule
    rows = st.lists(few_values, min_size=num_items + 1, max_size=num_items + 1)
    scores = np.array(draw(st.lists(rows, min_size=num_users, max_size=num_users)), np.float32)
    items = st.integers(1, num_items)
    targets = np.array(draw(st.lists(items, min_size=num_users, max_size=num_users)), np.int32)
    pairs = draw(st.lists(st.tuples(st.integers(0, num_users - 1), st.integers(0, num_items)), max_size=20))
    return scores, targets, np.array(pairs, np.int32).reshape(-1, 2)


@hypothesis.given(ranking_problems(), st.booleans())
def test_ranks_equal_the_definition_with_ties_repeats_and_seen_targets(problem, filter_seen):
    scores, targets, pairs = problem
    before = scores.copy()
    ranks = ranking.rank_targets(scores, targets, pairs[:, 0], pairs[:, 1], filter_seen=filter_seen)
    seen = [set(pairs[pairs[:, 0] == user, 1]) if filter_seen else set() for user in range(len(targets))]
    assert ranks.tolist() == [brute_force_rank(*row) for row in zip(scores, targets, seen, strict=True)]
    np.testing.assert_array_equal(scores, before)


@hypothesis.given(ranking_problems())
def test_a_users_rank_does_not_depend_on_the_rest_of_the_chunk(problem):
    scores, targets, pairs = problem
    together = ranking.rank_targets(scores, targets, pairs[:, 0], pairs[:, 1])
    for user in range(len(targets)):
        own = pairs[pairs[:, 0] == user, 1]
        alone = ranking.rank_targets(
            scores[user : user + 1], targets[user : user + 1], np.zeros(len(own), int), own
        )
        assert alone[0] == together[user]


def test_bad_targets_and_scores_are_named():
    scores, none = np.zeros((1, 4), np.float32), np.zeros(0, int)
    with pytest.raises(ValueError, match=r"target 0 .* 1 \.\. 3"):
        ranking.rank_targets(scores, np.array([0]), none, none)
    with pytest.raises(ValueError, match="target 4"):
        ranking.rank_targets(scores, np.array([4]), none, none)
    with pytest.raises(ValueError, match="NaN"):
        ranking.rank_targets(np.full((1, 4), np.nan), np.array([1]), none, none)


def test_metrics_of_known_ranks():
    ranks = np.array([0, 1, 9, 10, 500])
    np.testing.assert_array_equal(ranking.hit_at_k(ranks, 10), [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(ranking.recall_at_k(ranks, 10), ranking.hit_at_k(ranks, 10))
    np.testing.assert_allclose(ranking.ndcg_at_k(ranks, 10), [1, 1 / np.log2(3), 1 / np.log2(11), 0, 0])
    np.testing.assert_allclose(ranking.reciprocal_rank(ranks, 10), [1, 0.5, 0.1, 0, 0])
    np.testing.assert_allclose(ranking.reciprocal_rank(ranks), [1, 0.5, 0.1, 1 / 11, 1 / 501])


@hypothesis.given(st.lists(st.integers(0, 100), min_size=1, max_size=20))
def test_metrics_are_ordered_and_grow_with_k(ranks):
    means = ranking.mean_metrics(np.array(ranks), (1, 5, 10))
    for k in (1, 5, 10):
        assert means[f"mrr@{k}"] <= means[f"ndcg@{k}"] + 1e-12
        assert means[f"ndcg@{k}"] <= means[f"hr@{k}"] == means[f"recall@{k}"]
    assert means["ndcg@1"] == means["hr@1"] == means["mrr@1"]
    assert means["hr@1"] <= means["hr@5"] <= means["hr@10"]
    assert means["mrr@10"] <= means["mrr"]


def test_bad_ranks_are_named():
    with pytest.raises(ValueError, match="k=0"):
        ranking.hit_at_k(np.array([1]), 0)
    with pytest.raises(ValueError, match="rank -1"):
        ranking.ndcg_at_k(np.array([-1]), 5)
    with pytest.raises(ValueError, match="0 users"):
        ranking.mean_metrics(np.array([], int), (5,))
