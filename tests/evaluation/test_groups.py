"""Groups: what each strategy chooses, against definitions by exhaustive search; pools and lists of a run."""

import itertools

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrec import recommend
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.evaluation.group_lists import Pools, group_list, group_metrics, groups_of_friends, model_pools
from jaxrec.evaluation.group_recommendations import find_aggregation, find_groups, write_group_recommendations
from jaxrec.evaluation.groups import Average, Fair, Group, LeastMisery, MostPleasure, Multiplicative

RELEVANCE = np.array([[0.6, 0.3, 0.05, 0.05], [0.01, 0.24, 0.7, 0.05]])


@pytest.mark.parametrize(
    ("aggregation", "best"),
    [
        (Average(), [2, 0, 1, 3]),  # .375, .305, .27, .05
        (LeastMisery(), [1, 2, 3, 0]),  # .24, .05, .05, .01
        (MostPleasure(), [2, 0, 1, 3]),
        (Multiplicative(), [1, 2, 0, 3]),  # .268, .187, .077, .05
        (Fair(), [1, 2, 0, 3]),  # what both like, then who has had less
    ],
)
def test_the_strategies_by_hand(aggregation, best):
    assert aggregation.choose(RELEVANCE, 4).tolist() == best
    assert aggregation.choose(RELEVANCE, 2).tolist() == best[:2]


RELEVANCES = hnp.arrays(
    np.float64, st.tuples(st.integers(2, 4), st.integers(1, 6)), elements=st.floats(1e-3, 1.0)
)


@given(relevance=RELEVANCES, size=st.integers(1, 7))
def test_members_are_equal_and_no_item_comes_twice(relevance, size):
    for aggregation in (Average(), LeastMisery(), MostPleasure(), Multiplicative(), Fair()):
        chosen = aggregation.choose(relevance, size)
        assert len(set(chosen.tolist())) == len(chosen) == min(size, relevance.shape[1])
        np.testing.assert_allclose(aggregation.worth(relevance), aggregation.worth(relevance[::-1]))


@given(relevance=RELEVANCES)
def test_a_fair_list_is_worth_at_least_63_percent_of_the_best(relevance):
    fair = Fair(patience=0.05)

    def worth(places):
        return np.log1p(relevance[:, list(places)].sum(axis=1) / fair.patience).sum()

    size = min(3, relevance.shape[1])
    best = max(worth(places) for places in itertools.combinations(range(relevance.shape[1]), size))
    assert worth(fair.choose(relevance, size)) >= (1 - 1 / np.e) * best - 1e-9


def test_fair_gives_the_second_place_to_whom_the_first_gave_nothing():
    relevance = np.array([[0.5, 0.4, 0.01], [0.01, 0.01, 0.2]])
    assert Average().choose(relevance, 2).tolist() == [0, 1]
    assert Fair().choose(relevance, 2)[1] != Fair().choose(relevance, 2)[0]
    assert set(Fair().choose(relevance, 2).tolist()) == {0, 2}


@given(st.data())
def test_pools_keep_known_relevances_and_bound_the_unknown(data):
    users = np.arange(3) * 2
    item_ids = np.array([data.draw(st.permutations(range(1, 7)))[:4] for _ in users])
    scores = -np.sort(-data.draw(hnp.arrays(np.float64, (3, 4), elements=st.floats(-5, 5))), axis=1)
    pools = Pools.of_scores(users, item_ids, scores)
    np.testing.assert_allclose(pools.relevance.sum(axis=1), 1.0)
    left_out = np.array([1, 2])
    candidates, relevance = pools.of_group(np.array([0, 4]), left_out)
    assert candidates.tolist() == sorted(set(item_ids[[0, 2]].ravel().tolist()) - {1, 2})
    for member, row in enumerate((0, 2)):
        for place, item in enumerate(candidates):
            known = np.flatnonzero(item_ids[row] == item)
            expected = pools.relevance[row, known[0]] if len(known) else pools.relevance[row, -1]
            assert relevance[member, place] == pytest.approx(expected)


def test_settings_out_of_range():
    with pytest.raises(ValueError, match=r"patience=0.0 must be above 0"):
        Fair(patience=0.0)
    with pytest.raises(ValueError, match=r"pool=0 must be at least 1"):
        Group(pool=0)
    with pytest.raises(ValueError, match=r"group_size=1 must be at least 2"):
        EvaluationConfig(group_size=1)


def scores_of(run, user):
    history = run.dataset.histories(np.array([user])).item_ids
    scores = run.vectors @ run.vectors[history[-1]] + run.bias
    scores[[0, *history]] = -np.inf
    return scores


def test_a_groups_list_is_that_of_all_scores(make_last_item_run, make_small_dataset, mesh):
    """Pools as long as the catalogue: each mesh gives what NumPy gives over all items."""
    run = make_last_item_run(tuple(mesh.devices.shape), dataset=make_small_dataset(lengths=[5] * 20))
    members = np.array([3, 7, 11])
    with jax.set_mesh(run.mesh):
        pools = model_pools(run, members, "all", length=45, kind=0, rows=8)
    had = run.dataset.histories(members).item_ids
    for aggregation, of_members in ((Average(), np.mean), (LeastMisery(), np.min), (MostPleasure(), np.max)):
        chances = []
        for user in members:
            weights = np.exp(scores_of(run, user))
            weights /= weights.sum()
            weights[weights == 0] = weights[
                weights > 0
            ].min()  # what a member has had counts as the last of the pool
            chances.append(weights)
        worth = of_members(np.array(chances), axis=0)
        worth[[0, *had]] = -np.inf
        items, scores = group_list(Group(aggregation=aggregation, pool=45), pools, members, had, 6)
        assert items.tolist() == np.argsort(-worth, kind="stable")[:6].tolist()
        np.testing.assert_allclose(scores, worth[items], rtol=1e-4)


def test_groups_without_edges_are_drawn_once_each(make_small_dataset):
    groups = groups_of_friends(make_small_dataset(), np.arange(0, 60, 2), size=4, seed=0)
    assert groups.shape == (7, 4)
    assert len(set(groups.ravel().tolist())) == 28
    assert set(groups.ravel().tolist()) <= set(range(0, 60, 2))


def test_the_evaluation_of_groups_by_hand(make_last_item_run, make_small_dataset):
    """Two users who make one group: their targets in the group's list are counted as they are."""
    dataset = make_small_dataset(seed=1, lengths=[10] * 2, repeats=False)
    config = EvaluationConfig(
        ks=(1, 5),
        metric="ndcg@5",
        list_length=30,
        bootstrap_samples=100,
        baselines=("popularity",),
        group_size=2,
        groups={"average": Group(), "least": Group(aggregation=LeastMisery())},
    )
    run = make_last_item_run(dataset=dataset, evaluation=config)
    with jax.set_mesh(run.mesh):
        found = group_metrics(run, "test", config, 8)
    histories = dataset.histories(np.arange(2)).item_ids.reshape(2, 10)
    targets, had = histories[:, 9], histories[:, :9].ravel()
    assert not np.isin(targets, had).any(), "the seed makes targets that are new to both"
    assert (found["num_groups"], found["formed_by"]) == (1, "chance")
    assert set(found["systems"]) == {"model, average", "model, least", "popularity, average"}
    with jax.set_mesh(run.mesh):
        pools = model_pools(run, np.arange(2), "test", length=500, kind=0, rows=8)
    shown, _ = group_list(Group(), pools, np.arange(2), had, 30)
    hits = np.isin(targets, shown)
    metrics = found["systems"]["model, average"]["metrics"]
    assert metrics == {
        "any_hit": float(hits.any()),
        "mean_hit": hits.mean(),
        "all_hit": float(hits.all()),
        "mean_recall": hits.mean(),
        "min_recall": float(hits.all()),
    }
    assert found["paired"]["model, least"]["any_hit"]["difference"] == pytest.approx(
        found["systems"]["model, least"]["metrics"]["any_hit"] - metrics["any_hit"]
    )


def test_written_lists_name_their_group(tmp_path, make_last_item_run, make_small_dataset):
    run = make_last_item_run(dataset=make_small_dataset(lengths=[5] * 20 + [0]))
    groups = find_groups(run.dataset, ["3, 7", "1,2,19"])
    assert {name: members.tolist() for name, members in groups.items()} == {
        "3, 7": [3, 7],
        "1,2,19": [1, 2, 19],
    }
    with jax.set_mesh(run.mesh):
        count = write_group_recommendations(
            run, tmp_path / "g.parquet", groups, group=Group(pool=10), split="all", k=4, rows_per_batch=8
        )
        rows = pq.read_table(tmp_path / "g.parquet").to_pylist()
        assert list(rows[0]) == ["group", "item_id", "rank", "score"]
        assert count == len(rows) == 8
        for name, members in groups.items():
            own = [row for row in rows if row["group"] == name]
            assert [row["rank"] for row in own] == [1, 2, 3, 4]
            had = run.dataset.histories(members).item_ids
            assert not {row["item_id"] for row in own} & set(had.tolist())
        with pytest.raises(
            ValueError, match="user '20' has no event to start from in split 'all'; leave the user out\\."
        ):
            write_group_recommendations(
                run,
                tmp_path / "h.parquet",
                find_groups(run.dataset, ["1,20"]),
                group=Group(),
                split="all",
                k=4,
                rows_per_batch=8,
            )


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("1", "--group=1: a group has two members at least"),
        ("1,1", "--group=1,1: a group has two members at least"),
        ("1,x", "--group=1,x: user ids are of type int64"),
        ("1,9999", "--group=1,9999: 1 of 2 users are not in dataset"),
    ],
)
def test_groups_that_cannot_be(make_small_dataset, group, message):
    with pytest.raises(ValueError, match=message):
        find_groups(make_small_dataset(), [group])


def test_names_of_aggregations_and_kinds():
    groups = {"fair": Group(aggregation=Fair()), "average": Group()}
    assert find_aggregation(groups, None) is groups["fair"]
    assert find_aggregation({}, None) == Group()
    assert find_aggregation(groups, "average") is groups["average"]
    with pytest.raises(ValueError, match="evaluation.groups are fair, average; name one of them"):
        find_aggregation(groups, "least")
    assert [recommend.find_kind(("items", "people"), name) for name in (None, "people")] == [1, 2]
    assert recommend.find_kind((), None) == 0
    with pytest.raises(ValueError, match="--kind=films: the dataset's kinds of items are none"):
        recommend.find_kind((), "films")
