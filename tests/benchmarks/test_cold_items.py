"""What the program for new items makes of ranks, and its simple systems, which are held against their formulas."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.data.columns import ColumnMap
from jaxrec.data.config import ColdItems, DataConfig
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.item_features import item_features, word_features
from jaxrec.data.prepare import prepare

USERS, ITEMS = 60, 40


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two tastes: users choose items of one kind, and texts and categories tell the kinds."""
    path, random = tmp_path_factory.mktemp("kinds"), np.random.default_rng(0)
    users = np.repeat(np.arange(USERS), 12)
    items = 2 * random.integers(0, ITEMS // 2, len(users)) + users % 2
    events = {"user_id": users, "item_id": items, "timestamp": np.arange(len(users))}
    words = ("space ship robot", "love wedding letter")
    table = {
        "item_id": np.arange(ITEMS),
        "title": [f"Film {i} (19{50 + i})" for i in range(ITEMS)],
        "year": [1950 + i for i in range(ITEMS)],
        "genres": [("Comedy|Action", "Drama")[i % 2] for i in range(ITEMS)],
        "text": [words[i % 2] for i in range(ITEMS)],
    }
    pq.write_table(pa.table(events), path / "events.parquet")
    pq.write_table(pa.table(table), path / "items.parquet")
    columns = ColumnMap(features=("year",))
    prepare(DataConfig(path=str(path), columns=columns, cold_items=ColdItems(share=0.3)), path / "prepared")
    return PreparedDataset.open(path / "prepared")


def test_questions_know_no_new_item(module, dataset):
    baselines = module("cold_baselines")
    final, held_out = baselines.final_question(dataset), baselines.held_out_question(dataset, 0)
    assert len(final.new) == 12 and not dataset.item_counts[final.new].any()
    assert set(held_out.new) < set(final.known), "the settings are chosen on the items of the test"
    for question in (final, held_out):
        assert not set(question.new) & set(question.known)
        for histories in (question.train, question.queries):
            assert set(np.unique(histories.item_ids)) <= set(question.known)
        assert set(question.targets) <= set(question.new)
        assert len(question.queries) == len(question.users) == len(question.targets) > 0
    for place, user in enumerate(final.users):
        whole = dataset.histories(np.array([user])).item_ids
        assert final.targets[place] == whole[-1]
        at = slice(*final.queries.offsets[place : place + 2])
        np.testing.assert_array_equal(final.queries.item_ids[at], whole[:-1])


def test_ranks_sum_the_decayed_history(module, dataset):
    baselines = module("cold_baselines")
    question = baselines.final_question(dataset)
    similarity = (
        np.random.default_rng(1).normal(size=(len(question.new), len(question.known))).astype(np.float32)
    )
    found = baselines.ranks_of(question, similarity, 0.7)
    for place, target in enumerate(question.targets):
        items = question.queries.item_ids[slice(*question.queries.offsets[place : place + 2])]
        scores = np.zeros(len(question.new))
        for age, item in enumerate(items[::-1]):
            scores += 0.7**age * similarity[:, np.flatnonzero(question.known == item)[0]]
        at = int(np.flatnonzero(question.new == target)[0])
        assert found[place] == np.sum(scores > scores[at])


@pytest.mark.parametrize("window", [0, 5])
def test_ridge_is_that_of_its_primal_form(module, dataset, window):
    baselines = module("cold_baselines")
    question, features = baselines.final_question(dataset), item_features(dataset)
    dense = features.toarray()
    np.testing.assert_allclose(np.linalg.norm(dense[1:], axis=1) ** 2, 3, rtol=1e-6)  # words, genres, year
    settings, found = next(
        (settings, similarity)
        for settings, similarity in baselines.ridge(question, features)
        if settings == {"ridge": 1.0, "power": 0.5, "window": window}
    )
    taken, after = np.zeros((USERS, size := len(dataset.item_counts))), np.zeros((size, size))
    for user in range(USERS):
        items = question.train.item_ids[slice(*question.train.offsets[user : user + 2])]
        taken[user, items] = 1
        for place, item in enumerate(items):
            for gap, former in enumerate(items[max(place - window, 0) : place][::-1]):
                after[item, former] += baselines.WINDOW_DECAY**gap
    taken = taken[:, question.known]
    counts = taken.sum(0) + baselines.SHRINKAGE
    together = after[np.ix_(question.known, question.known)] if window else taken.T @ taken
    np.fill_diagonal(together, 0)
    wanted = together / np.sqrt(np.outer(counts, counts))
    known = dense[question.known]
    weights = np.linalg.solve(known.T @ known + settings["ridge"] * np.eye(known.shape[1]), known.T @ wanted)
    np.testing.assert_allclose(found, dense[question.new] @ weights, rtol=1e-3, atol=1e-4)


def test_texts_that_tell_the_kinds_are_used(module, dataset):
    baselines = module("cold_baselines")
    final, held_out = baselines.final_question(dataset), baselines.held_out_question(dataset, 0)
    kinds = dataset.item_keys[final.new - 1] % 2
    wrong_first = {kind: int(np.sum(kinds == kind)) for kind in (0, 1)}  # places of the right kind
    for system, features in (
        (baselines.ridge, item_features(dataset)),
        (baselines.content_knn, word_features(dataset.item_texts)),
    ):
        ranks, settings = baselines.chosen_ranks(system, features, held_out, final, 3)
        for user, rank in zip(final.users, ranks, strict=True):
            assert rank < wrong_first[int(dataset.user_keys[user]) % 2]
        assert {"decay", "held_out_recall"} < settings.keys()
    draws = baselines.random_ranks(final, 0)
    assert len(draws) == len(final.targets) and draws.max() < len(final.new)


def seed_of(suite, rng, better=0, lost=0):
    """Forty users, of whom the first ten have a new target; `lost` are places of the others that new items take."""
    users = np.arange(100, 140)
    ranks = rng.integers(5, 60, 40)
    without = ranks.tolist()
    ranks[10:] += lost
    ranks[:10] = 0  # the new targets, which must not count
    cold = np.maximum(rng.integers(10, 40, 10) - better, 0)
    figures = {
        "metrics": {"hr@10": 0.1, "ndcg@10": 0.1}, "train_minutes": 1.0,
        "sittings": [{"processor_seconds": 9.0}], "baselines": {}, "command": "", "commit": "",
        "ranks_without_new_items": without,
        "cold_items": {"num_items": 40, "in_the_catalogue": {"recall@20": 0.0}},
    }  # fmt: skip
    return suite.Seed(figures, ranks, users, users[:10], cold)


def test_the_program_pools_the_draws(module, monkeypatch, tmp_path, capsys):
    suite, program = module("suite"), module("cold_items")
    rng = np.random.default_rng(0)
    reading = [seed_of(suite, rng, better=25) for _ in range(3)]
    simple = program.Simple(
        [seed.cold_users for seed in reading],
        {
            name: [rng.integers(20, 40, 10) for _ in reading]
            for name in (program.RIDGE, program.NEAREST, program.CHANCE)
        },
        {},
    )
    monkeypatch.setattr(suite, "run_variant", lambda variant, given, measure=None: reading[: given.seeds])
    monkeypatch.setattr(program, "simple_systems", lambda *arguments: simple)
    monkeypatch.setattr("sys.argv", ["cold_items.py", "--seeds=3", f"--results={tmp_path}"])
    assert program.main() == 0
    assert capsys.readouterr().out.splitlines()[-1] == "quality_cold_items: PASS"
    figures = json.loads((tmp_path / "quality_cold_items.json").read_text())["figures"]
    assert figures["ml1m"]["recall@20"] == {"model": 1.0, "ridge": 0.0, "content_knn": 0.0, "random": 0.0}
    assert figures["known_items"]["difference"] == 0.0
    assert figures["ml1m"]["model_against"]["ridge"]["num_users"] == 10, (
        "draws of a user are no further users"
    )


def test_known_items_alone_decide_what_the_new_ones_cost(module):
    suite, program = module("suite"), module("cold_items")
    same = [seed_of(suite, np.random.default_rng(draw)) for draw in range(2)]
    worse = [seed_of(suite, np.random.default_rng(draw), lost=30) for draw in range(2)]
    comparison, relative = program.known_items(same)
    assert comparison.difference == 0.0 and relative == [0.0, 0.0]
    comparison, relative = program.known_items(worse)
    assert comparison.num_users == 30 and comparison.difference < 0
    assert relative[0] == pytest.approx(comparison.low / comparison.mean_a) and relative[0] < -0.02


def test_other_users_are_not_compared(module):
    suite, program = module("suite"), module("cold_items")
    seeds = [seed_of(suite, np.random.default_rng(0))]
    simple = program.Simple([seeds[0].cold_users + 1], {}, {})
    with pytest.raises(AssertionError, match="ml1m: model and simple systems ranked other users"):
        program.report("ml1m", seeds, simple, program.RIDGE)
