"""Every event as a target, and new items by themselves: the ranks are those of the definition."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxrec.data.dataset import PreparedDataset
from jaxrec.evaluation.cold_items import first_cold_item, rank_cold_items
from jaxrec.evaluation.comparison import compare_runs
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.evaluation.evaluator import evaluate, save_evaluation
from jaxrec.metrics.ranking import mean_metrics, rank_targets

CONFIG = EvaluationConfig(ks=(1, 5, 10), rows_per_batch=8, bootstrap_samples=100, ranking_events="all")


@pytest.fixture
def by_time(make_small_dataset):
    """Users with several test events, some of items that training never sees."""

    def make(**options):
        dataset = make_small_dataset(**options)
        histories = dataset.histories(np.arange(dataset.metadata.num_users))
        train_end = dataset.lengths // 2
        train = np.concatenate(
            [
                histories.item_ids[start : start + end]
                for start, end in zip(histories.offsets, train_end, strict=False)
            ]
        )
        counts = np.bincount(train, minlength=dataset.metadata.num_items + 1)
        counts[36:] = 0  # as if these had been taken out of training
        order = 1 + np.argsort(-counts[1:], kind="stable")
        number = np.zeros(len(counts), np.int32)
        number[order] = np.arange(1, len(counts))
        found = PreparedDataset.from_histories(
            dataclasses.replace(histories, item_ids=number[histories.item_ids]),
            num_items=dataset.metadata.num_items,
            train_end=train_end,
            validation_end=dataset.lengths * 2 // 3,
            behaviours=dataset.metadata.behaviours,
            filter_seen=dataset.metadata.filter_seen,
        )
        found.item_counts = counts[np.concatenate([[0], order])]
        return found

    return make


def expected(run, first=1):
    """(user, target, rank) of every test event with a past, in order; ranked among the items from `first` on."""
    rows, dataset = [], run.dataset
    for user in range(dataset.metadata.num_users):
        items = dataset.histories(np.array([user])).item_ids
        for at in range(max(dataset.validation_end[user], 1), len(items)):
            scores = (run.vectors[items[at - 1]] @ run.vectors.T + run.bias).astype(np.float64)[None]
            scores[:, 1:first] = -np.inf
            if items[at] >= first:
                seen = items[:at][items[:at] >= first]
                filtered = dataset.metadata.filter_seen
                rank = rank_targets(
                    scores, items[at : at + 1], np.zeros_like(seen), seen, filter_seen=filtered
                )
                rows.append((user, items[at], rank[0]))
    return np.array(rows)


@pytest.mark.parametrize("filter_seen", [True, False])
def test_every_event_is_ranked_after_all_before_it(by_time, make_last_item_run, tmp_path, filter_seen):
    run = make_last_item_run(dataset=by_time(filter_seen=filter_seen))
    evaluation = evaluate(run, "test", config=CONFIG)
    ranks, wanted = evaluation.ranks, expected(run)
    np.testing.assert_array_equal(np.stack([ranks.user_indices, ranks.targets, ranks.ranks], 1), wanted)
    values = evaluation.values
    assert values["num_targets"] == len(wanted) > values["num_users"] == len(np.unique(wanted[:, 0]))
    assert "every event" in values["protocol"]
    for name, value in mean_metrics(wanted[:, 2], CONFIG.ks).items():
        assert values["metrics"][name] == pytest.approx(value)
        assert values["intervals"][name][0] <= value <= values["intervals"][name][1]
    for baseline, of_metric in values["paired"].items():
        for metric, one in of_metric.items():
            difference = values["metrics"][metric] - values["baselines"][baseline][metric]
            assert one["difference"] == pytest.approx(difference)
    for name in "ab":
        (tmp_path / name).mkdir()
        save_evaluation(tmp_path / name, evaluation, run)
    assert compare_runs(tmp_path / "a", tmp_path / "b", config=CONFIG)["ndcg@10"].difference == 0.0


def test_new_targets_are_ranked_among_new_items(by_time, make_last_item_run, tmp_path):
    run = make_last_item_run(dataset=by_time())
    first = first_cold_item(run.dataset)
    evaluation = evaluate(run, "test", config=dataclasses.replace(CONFIG, cold_items=True))
    ranks, wanted = evaluation.cold_ranks, expected(run, first)
    np.testing.assert_array_equal(np.stack([ranks.user_indices, ranks.targets, ranks.ranks], 1), wanted)
    save_evaluation(tmp_path, evaluation, run)
    table = pq.read_table(tmp_path / "cold_ranks.parquet")
    assert table["rank"].to_pylist() == wanted[:, 2].tolist()
    values = json.loads((tmp_path / "evaluation.json").read_text())["cold_items"]
    assert values["num_targets"] == len(wanted)
    assert values["num_items"] == run.dataset.metadata.num_items + 1 - first
    assert values["among_cold_items"]["hr@10"] >= values["in_the_catalogue"]["hr@10"]


def test_without_new_items_there_is_nothing_to_rank(by_time, make_last_item_run):
    run = make_last_item_run(dataset=by_time())
    ranks = evaluate(run, "test", config=CONFIG).ranks
    known = ranks.take(ranks.targets < first_cold_item(run.dataset))
    with pytest.raises(ValueError, match="no target of split 'test' is one of the"):
        rank_cold_items(run, "test", known, CONFIG, 8)
    run.dataset.item_counts[1:] = 1
    with pytest.raises(ValueError, match="0 items without a training event"):
        first_cold_item(run.dataset)


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"evaluation.ranking_events='some' must be 'first' or 'all'"):
        EvaluationConfig(ranking_events="some")
