"""Items of two kinds: each is ranked among its own, and counting along edges counts what it says."""

import jax
import numpy as np
import pytest

from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.histories import Histories
from jaxrec.evaluation.baselines import evaluate_baselines
from jaxrec.evaluation.baselines.social import AdamicAdar, CommonNeighbours, FriendsItems, ProfileCosine
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.evaluation.evaluator import evaluate
from jaxrec.evaluation.group_lists import groups_of_friends
from jaxrec.evaluation.kinds import HeldOut, kind_metrics, model_lists, people_of
from jaxrec.evaluation.user_ranking import UserRanker

NUM_PEOPLE, NUM_THINGS = 15, 30
NUM_ITEMS = NUM_PEOPLE + NUM_THINGS
IS_PERSON = np.arange(NUM_ITEMS + 1) % 3 == 1  # in turns


def friends_and_things(seed=0):
    """Users who know some of each other and take things; the last things and friends are held out."""
    random = np.random.default_rng(seed)
    people, things = np.flatnonzero(IS_PERSON), np.flatnonzero(~IS_PERSON)[1:]
    edges = np.triu(random.random((NUM_PEOPLE, NUM_PEOPLE)) < 0.4, 1)
    parts = np.triu(random.integers(0, 4, edges.shape), 1)
    edges, parts = edges | edges.T, parts + parts.T  # 0, 1 = train, 2 = validation, 3 = test
    histories, cuts = [], []
    for user in range(NUM_PEOPLE):
        taken = random.permutation(things)[:9]
        own = [people[edges[user] & (np.isin(parts[user], part))] for part in ((0, 1), (2,), (3,))]
        train, validation, test = (
            [people[user], *taken[:5], *own[0]],
            [*taken[5:7], *own[1]],
            [*taken[7:], *own[2]],
        )
        histories.append([*train, *validation, *test])
        cuts.append((len(train), len(train) + len(validation)))
    lengths = np.array(list(map(len, histories)))
    count = lengths.sum()
    return PreparedDataset.from_histories(
        Histories(
            np.append(0, np.cumsum(lengths)),
            np.concatenate(histories).astype(np.int32),
            np.arange(count),
            np.zeros((count, 0), np.int8),
        ),
        train_end=np.array(cuts)[:, 0],
        validation_end=np.array(cuts)[:, 1],
        num_items=NUM_ITEMS,
        kinds=("items", "people"),
        user_keys=[f"u{user}" for user in range(NUM_PEOPLE)],
        item_keys=[
            f"people:u{np.flatnonzero(people == item)[0]}" if IS_PERSON[item] else f"items:{item}"
            for item in range(1, NUM_ITEMS + 1)
        ],
    )


def graph(dataset, ends):
    """Edges and what is taken, dense, by user."""
    edges = np.zeros((NUM_PEOPLE, NUM_PEOPLE))
    taken = np.zeros((NUM_PEOPLE, NUM_ITEMS + 1))
    people = np.flatnonzero(IS_PERSON)
    for user in range(NUM_PEOPLE):
        for item in dataset.histories(np.array([user])).item_ids[: ends[user]]:
            taken[user, item] = 1
            if IS_PERSON[item] and people[user] != item:
                edges[user, np.flatnonzero(people == item)[0]] = 1
    return edges, taken


def test_who_is_which_item():
    dataset = friends_and_things()
    assert people_of(dataset).tolist() == np.flatnonzero(IS_PERSON).tolist()
    assert (dataset.item_kinds == np.where(IS_PERSON, 2, 1) * (np.arange(NUM_ITEMS + 1) > 0)).all()
    with pytest.raises(ValueError, match="need item_keys"):
        PreparedDataset.from_histories(
            Histories(np.array([0, 1]), np.array([1], np.int32), np.zeros(1, int), np.zeros((1, 0), np.int8)),
            kinds=("items",),
        )


def test_counting_along_edges_is_counting():
    dataset = friends_and_things()
    people, persons = people_of(dataset), np.flatnonzero(IS_PERSON)
    everybody = np.arange(NUM_PEOPLE)
    train = dataset.prefixes(everybody, dataset.train_end)
    queries = dataset.prefixes(everybody, dataset.validation_end)
    edges, taken = graph(dataset, dataset.train_end)
    asked, asked_taken = graph(dataset, dataset.validation_end)
    own = np.eye(NUM_PEOPLE)  # the user is in the own history

    def scores(baseline):
        return baseline(people=people).fit(train, NUM_ITEMS).scores(queries)

    np.testing.assert_allclose(scores(CommonNeighbours)[:, persons], (asked + own) @ edges, rtol=1e-6)
    weights = 1 / np.log(np.maximum(edges.sum(axis=1), 2))
    np.testing.assert_allclose(
        scores(AdamicAdar)[:, persons], (asked + own) @ (weights[:, None] * edges), rtol=1e-6
    )
    things = ~IS_PERSON
    things[0] = False
    np.testing.assert_allclose(scores(FriendsItems)[:, things], ((asked + own) @ taken)[:, things], rtol=1e-6)
    profiles = taken[:, things]
    cosines = asked_taken[:, things] @ profiles.T / np.sqrt(profiles.sum(axis=1))
    np.testing.assert_allclose(scores(ProfileCosine)[:, persons], cosines, rtol=1e-6)


def test_lists_hold_new_items_of_the_kind_alone_on_every_mesh(make_last_item_run, mesh):
    dataset = friends_and_things()
    run = make_last_item_run(tuple(mesh.devices.shape), dataset=dataset)
    for kind in (1, 2):
        asked = HeldOut.of_kind(dataset, "test", kind)
        with jax.set_mesh(run.mesh):
            lists = model_lists(run, "test", kind, asked, 10, 8)
        for user, shown in zip(asked.user_indices, lists, strict=True):
            history = dataset.histories(np.array([user])).item_ids[: dataset.validation_end[user]]
            scores = run.vectors @ run.vectors[history[-1]] + run.bias
            scores[(dataset.item_kinds != kind)] = -np.inf
            scores[history] = -np.inf
            best = np.argsort(-scores, kind="stable")[:10]
            best = np.where(np.isfinite(scores[best]), best, 0)
            assert shown.tolist() == best.tolist()
            assert np.flatnonzero(IS_PERSON)[user] not in shown, "nobody is recommended to oneself"


def test_targets_are_the_held_out_items_of_the_kind():
    dataset = friends_and_things()
    for split, start, stop in (
        ("validation", dataset.train_end, dataset.validation_end),
        ("test", dataset.validation_end, dataset.lengths),
    ):
        for kind in (0, 1, 2):
            asked = HeldOut.of_kind(dataset, split, kind)
            found = {
                user: asked.targets[asked.offsets[row] : asked.offsets[row + 1]].tolist()
                for row, user in enumerate(asked.user_indices.tolist())
            }
            expected = {}
            for user in range(NUM_PEOPLE):
                part = dataset.histories(np.array([user])).item_ids[start[user] : stop[user]]
                part = part[(dataset.item_kinds[part] == kind) | (kind == 0)]
                if len(part):
                    expected[user] = part.tolist()
            assert found == expected
    with pytest.raises(ValueError, match="split='all' is unknown"):
        HeldOut.of_kind(dataset, "all", 1)


def test_a_target_competes_with_its_kind_for_model_and_baselines(make_last_item_run):
    dataset = friends_and_things()
    run = make_last_item_run(dataset=dataset)
    ranker = UserRanker(run, top_k=5)
    with jax.set_mesh(run.mesh):
        ranks, _ = ranker.rank(ranker.rows("test", rows_per_batch=8))
    kinds = dataset.item_kinds
    for target, shown in zip(ranks.targets, ranks.top_item_ids, strict=True):
        assert (kinds[shown[shown > 0]] == kinds[target]).all()
    results = evaluate_baselines(dataset, "test", num_recommended=5)
    for lists in results.recommended.values():
        assert ((kinds[lists] == kinds[results.targets][:, None]) | (lists == 0)).all()


def test_the_evaluation_speaks_of_both_kinds(make_last_item_run):
    config = EvaluationConfig(
        ks=(1, 5, 10), rows_per_batch=8, bootstrap_samples=100, baselines=("popularity", "item_knn")
    )
    run = make_last_item_run(dataset=friends_and_things(), evaluation=config)
    with jax.set_mesh(run.mesh):
        kinds = evaluate(run, "test", config=config).values["kinds"]
    assert set(kinds["items"]["systems"]) == {"model", "popularity", "item_knn", "friends_items"}
    assert set(kinds["people"]["systems"]) == {
        "model", "popularity", "item_knn", "common_neighbours", "adamic_adar", "profile_cosine",
    }  # fmt: skip
    assert (kinds["items"]["num_candidates"], kinds["people"]["num_candidates"]) == (NUM_THINGS, NUM_PEOPLE)
    for part in kinds.values():
        model = part["systems"]["model"]["metrics"]
        for name, paired in part["paired"].items():
            other = part["systems"][name]["metrics"]
            for metric, found in paired.items():
                assert found["difference"] == pytest.approx(model[metric] - other[metric])


def test_nothing_is_said_of_kinds_where_there_are_none(make_last_item_run):
    run = make_last_item_run()
    with jax.set_mesh(run.mesh):
        assert kind_metrics(run, "test", run.config.evaluation, 8) == {}


def test_groups_are_friends_by_training_edges():
    dataset = friends_and_things()
    edges, _ = graph(dataset, dataset.train_end)
    groups = groups_of_friends(dataset, np.arange(NUM_PEOPLE), size=3, seed=0)
    assert len(groups) >= 2
    assert len(set(groups.ravel().tolist())) == groups.size
    for first, *others in groups:
        assert edges[first, others].all()
