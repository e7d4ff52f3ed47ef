"""A user is ranked among the items of the own domain: what another domain sells neither wins nor is shown."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.core.mesh import make_mesh
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.histories import Histories
from jaxrec.evaluation.baselines import evaluate_baselines
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.evaluation.evaluator import evaluate
from jaxrec.evaluation.full_ranking import FullRanking
from jaxrec.evaluation.user_ranking import UserRanker

NUM_ITEMS, NUM_USERS = 45, 24
ITEM_DOMAINS = np.array([0] + [1 + item % 2 for item in range(NUM_ITEMS)], np.int32)  # in turns


def make_shops():
    """Users of two shops; each has clicked items of its own shop alone."""
    rng = np.random.default_rng(0)
    shops = np.arange(NUM_USERS) % 3 % 2 + 1
    item_ids = [rng.permutation(np.flatnonzero(shop == ITEM_DOMAINS))[:6] for shop in shops]
    count = 6 * NUM_USERS
    return PreparedDataset.from_histories(
        Histories(
            np.arange(0, count + 1, 6),
            np.concatenate(item_ids).astype(np.int32),
            np.arange(count),
            np.zeros((count, 0), np.int8),
        ),
        num_items=NUM_ITEMS,
        domains=("a", "b"),
        user_keys=[f"{'.ab'[shop]}:{user}" for user, shop in enumerate(shops)],
        item_keys=[f"{'.ab'[shop]}:{item}" for item, shop in enumerate(ITEM_DOMAINS[1:])],
    )


def test_the_best_item_of_all_does_not_beat_a_user_of_another_domain(mesh):
    """By hand: item 4 of domain 2 scores highest for both users, items 1 to 3 are of domain 1."""
    vectors = np.zeros((8, 1), np.float32)
    vectors[1:5, 0] = [1, 3, 2, 9]
    shards = 8
    physical = np.zeros_like(vectors)
    physical[[row % shards * (len(vectors) // shards) + row // shards for row in range(8)]] = vectors
    ranking = FullRanking(mesh=mesh, num_items=4, top_k=3)
    catalogue = ranking.catalogue(jax.device_put(physical), jnp.zeros(8), np.array([0, 1, 1, 1, 2], np.int32))
    queries, nothing = np.ones((2, 1), np.float32), np.zeros(0, np.int32)
    targets = np.array([3, 4], np.int32)
    found = ranking.rank(
        catalogue, queries, targets, nothing, nothing, query_domains=np.array([1, 2], np.int32)
    )
    assert found.ranks.tolist() == [1, 0], "behind item 2 alone"
    assert found.top_item_ids.tolist() == [[2, 3, 1], [4, 0, 0]]
    everywhere = ranking.rank(catalogue, queries, targets, nothing, nothing)
    assert everywhere.ranks.tolist() == [2, 0]


def test_ranks_and_lists_are_those_of_the_own_catalogue(make_last_item_run):
    """What is left of a ranking of all items when those of the other domain are struck out."""
    run = make_last_item_run(dataset=make_shops())
    ranker = UserRanker(run, top_k=5)
    with jax.set_mesh(run.mesh):
        ranks, _ = ranker.rank(ranker.rows("test", rows_per_batch=8))
    dataset = run.dataset
    histories = dataset.histories(np.arange(NUM_USERS)).item_ids.reshape(NUM_USERS, 6)
    scores = run.vectors[histories[:, 4]] @ run.vectors.T + run.bias
    for user, target in enumerate(histories[:, 5]):
        own = (dataset.user_domains[user] == ITEM_DOMAINS) & ~np.isin(
            np.arange(NUM_ITEMS + 1), histories[user, :5]
        )
        order = np.argsort(np.where(own, -scores[user], np.inf))
        assert ranks.ranks[user] == order.tolist().index(target)
        listed = ranks.top_item_ids[user]
        assert (ITEM_DOMAINS[listed] == dataset.user_domains[user]).all()


def test_baselines_rank_the_same_candidates():
    results = evaluate_baselines(make_shops(), "test", num_recommended=4)
    domains = make_shops().user_domains[results.user_indices]
    for listed in results.recommended.values():
        assert ((ITEM_DOMAINS[listed] == domains[:, None]) | (listed == 0)).all()
    everywhere = evaluate_baselines(_as_one(), "test")
    for name, ranks in results.ranks.items():
        assert (ranks <= everywhere.ranks[name]).all(), name
    assert results.ranks["popularity"].max() < np.bincount(ITEM_DOMAINS[1:]).max()


def _as_one():
    """The same events, as one catalogue."""
    dataset = make_shops()
    return PreparedDataset(
        dataclasses.replace(dataset.metadata, domains=()),
        train_end=dataset.train_end,
        validation_end=dataset.validation_end,
        lengths=dataset.lengths,
        item_counts=dataset.item_counts,
        events=dataset.histories(np.arange(NUM_USERS)),
    )


@pytest.mark.parametrize("domains", [True, False])
def test_the_evaluation_tells_each_domain_beside_the_whole(make_last_item_run, domains):
    config = EvaluationConfig(
        ks=(1, 5, 10), rows_per_batch=8, bootstrap_samples=100, baselines=("popularity",)
    )
    run = make_last_item_run(dataset=make_shops() if domains else _as_one(), evaluation=config)
    with jax.set_mesh(run.mesh):
        values = evaluate(run, "test", config=config).values
    if not domains:
        assert "domain" not in values["slices"]
        return
    parts = {part["name"]: part for part in values["slices"]["domain"]}
    assert list(parts) == ["a", "b"]
    assert set(parts["a"]["metrics"]) == {"model", "popularity"}
    sizes = [part["num_users"] for part in parts.values()]
    assert sum(sizes) == values["num_users"] == NUM_USERS
    means = [part["metrics"]["model"]["ndcg@10"] for part in parts.values()]
    assert np.average(means, weights=sizes) == pytest.approx(values["metrics"]["ndcg@10"])


def test_a_mesh_changes_no_rank(make_last_item_run):
    found = []
    for shape in ((8, 1), (2, 4), (1, 1)):
        run = make_last_item_run(mesh_shape=shape, dataset=make_shops())
        ranker = UserRanker(run, top_k=5)
        with jax.set_mesh(make_mesh(shape, jax.devices()[: shape[0] * shape[1]])):
            found.append(ranker.rank(ranker.rows("test", rows_per_batch=8))[0])
    for other in found[1:]:
        np.testing.assert_array_equal(other.ranks, found[0].ranks)
        np.testing.assert_array_equal(other.top_item_ids, found[0].top_item_ids)
