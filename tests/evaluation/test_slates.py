"""Slates: greedy choice against exhaustive search, its bounds, its limits, and the sets of a run."""

import itertools
import math

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.evaluation.recommendations import write_recommendations
from jaxrec.evaluation.slate_lists import slate_metrics
from jaxrec.evaluation.slates import Coverage, LogDeterminant, Pool, Slate, choose, relevance_of, worth
from jaxrec.evaluation.user_ranking import UserRanker
from jaxrec.recommend import find_slate

USERS, CANDIDATES, SIZE = 25, 9, 4


def random_pool(seed, one_category=False):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(USERS, CANDIDATES, 3))
    categories = rng.random((USERS, CANDIDATES, 5)) < 0.3
    if one_category:
        categories = np.eye(3, dtype=bool)[rng.integers(0, 3, (USERS, CANDIDATES))]
    return Pool(
        relevance=rng.random((USERS, CANDIDATES)),
        there=np.ones((USERS, CANDIDATES), bool),
        vectors=vectors / np.linalg.norm(vectors, axis=2, keepdims=True),
        categories=categories,
    )


def naive_worth(slate, pool, user, places):
    relevance = sum(pool.relevance[user, place] for place in places)
    if isinstance(slate.diversity, Coverage):
        return relevance + slate.weight * int(pool.categories[user, list(places)].any(axis=0).sum())
    vectors = pool.vectors[user, list(places)]
    return relevance + slate.weight * np.linalg.slogdet(np.eye(len(places)) + vectors @ vectors.T)[1]


def allowed(slate, pool, user, places):
    counts = pool.categories[user, list(places)].sum(axis=0)
    return not slate.max_per_category or counts.max() <= slate.max_per_category


@pytest.mark.parametrize("weight", [0.0, 0.2, 3.0])
@pytest.mark.parametrize("diversity", [LogDeterminant(), Coverage()])
def test_greedy_is_within_its_bound_of_the_best_set(diversity, weight):
    slate = Slate(size=SIZE, pool=CANDIDATES, diversity=diversity, weight=weight)
    pool = random_pool(0)
    places = choose(slate, pool)
    found = worth(slate, pool, places)
    for user in range(USERS):
        assert found[user] == pytest.approx(naive_worth(slate, pool, user, places[user]))
        best = max(
            naive_worth(slate, pool, user, chosen)
            for chosen in itertools.combinations(range(CANDIDATES), SIZE)
        )
        assert (1 - 1 / math.e) * best <= found[user] <= best + 1e-9
        if not weight:
            assert found[user] == pytest.approx(best)


def test_a_limit_holds_and_greedy_is_at_least_half_of_the_best_set():
    slate = Slate(size=3, pool=CANDIDATES, diversity=LogDeterminant(), weight=0.5, max_per_category=1)
    pool = random_pool(1, one_category=True)
    places = choose(slate, pool)
    found = worth(slate, pool, places)
    for user in range(USERS):
        own = places[user][places[user] >= 0]
        assert allowed(slate, pool, user, own)
        best = max(
            naive_worth(slate, pool, user, chosen)
            for size in (1, 2, 3)
            for chosen in itertools.combinations(range(CANDIDATES), size)
            if allowed(slate, pool, user, chosen)
        )
        assert 0.5 * best <= found[user] <= best + 1e-9


def test_few_candidates_give_small_sets():
    pool = random_pool(2)
    pool.there[0] = False
    pool.there[1, 2:] = False
    places = choose(Slate(size=SIZE, pool=CANDIDATES), pool)
    assert (places[0] == -1).all()
    assert sorted(places[1]) == [-1, -1, 0, 1]
    assert all(len(set(row)) == SIZE for row in places[2:].tolist())


def test_relevance_is_the_chance_against_the_best():
    scores = np.array([[1.0, 0.0, -np.inf], [-np.inf] * 3])
    found = relevance_of(scores, scores[:, :1])
    np.testing.assert_allclose(found, [[1.0, math.exp(-1), 0.0], [0.0, 0.0, 0.0]])


def test_weight_trades_relevance_for_diversity_in_the_sets_of_a_run(make_last_item_run, tmp_path):
    run = make_last_item_run()
    slates = {f"w{weight:g}": Slate(size=5, pool=20, weight=weight) for weight in (0.0, 0.3, 100.0)}
    with jax.set_mesh(run.mesh):
        ranker = UserRanker(run, top_k=20)
        pools, _ = ranker.rank(ranker.rows("test", rows_per_batch=8))
        found = slate_metrics(run, pools, slates, num_samples=100, confidence=0.95, seed=0)
    assert {name: value for name, value in found["w0"].items() if name != "interval"} == pytest.approx(
        {name: value for name, value in found["best"].items() if name != "interval"}
    )
    relevance = [found[name]["expected_relevance"] for name in slates]
    diversity = [found[name]["vector_diversity"] for name in slates]
    assert relevance == sorted(relevance, reverse=True)
    assert diversity == sorted(diversity)
    assert diversity[2] > diversity[0]

    with jax.set_mesh(run.mesh):
        write_recommendations(
            run, tmp_path / "slates.parquet", split="test", k=10, rows_per_batch=8, slate=slates["w0.3"]
        )
    table = pq.read_table(tmp_path / "slates.parquet")
    assert max(table["rank"].to_pylist()) == 5


def test_bad_settings_name_themselves(make_last_item_run):
    with pytest.raises(ValueError, match=r"slate.size=10 must lie in 1 .. pool=5"):
        Slate(pool=5)
    with pytest.raises(ValueError, match="slate.weight=-1"):
        Slate(weight=-1)
    with pytest.raises(ValueError, match="--slate=other: the run's evaluation.slates are none"):
        find_slate({}, "other")
    assert find_slate({"mine": Slate()}, "mine") == Slate()
    run = make_last_item_run(evaluation=EvaluationConfig(ks=(10,)))
    with jax.set_mesh(run.mesh), pytest.raises(ValueError, match="'small' has no categories"):
        slate_metrics(
            run,
            UserRanker(run, top_k=20).rank(UserRanker(run).rows("test", rows_per_batch=8))[0],
            {"covered": Slate(pool=20, diversity=Coverage())},
            num_samples=100,
            confidence=0.95,
            seed=0,
        )
