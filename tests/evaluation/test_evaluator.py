import dataclasses
import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from jaxrec.evaluation.comparison import compare_runs
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.evaluation.console import (
    print_behaviours,
    print_comparison,
    print_evaluation,
    print_example,
    print_groups,
    print_kinds,
)
from jaxrec.evaluation.evaluator import evaluate, save_evaluation
from jaxrec.metrics.ranking import mean_metrics
from jaxrec.tasks.behaviour import Behaviour
from jaxrec.tasks.next_item import NextItem

CONFIG = EvaluationConfig(ks=(1, 5, 10), rows_per_batch=8, bootstrap_samples=100)
ISSUE_KEYS = {
    "dataset", "protocol", "split", "filter_seen", "num_users", "num_items", "metrics", "intervals", "baselines",
    "model", "command",
}  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, make_last_item_run, make_small_dataset):
    run = make_last_item_run(with_behaviours=True, dataset=make_small_dataset())
    run.config.tasks = {"next_item": NextItem(), "behaviour": Behaviour(behaviours=("like",))}
    evaluation = evaluate(run, "test", config=CONFIG, command="python -m jaxrec.evaluate --workdir=w")
    workdir = tmp_path_factory.mktemp("run")
    save_evaluation(workdir, evaluation, run)
    return run, evaluation, workdir


def printed(printer, *arguments):
    console = Console(width=160, record=True, file=io.StringIO())
    printer(console, *arguments)
    return console.export_text()


def test_the_json_has_the_agreed_shape(evaluated):
    _, evaluation, workdir = evaluated
    values = json.loads((workdir / "evaluation.json").read_text())
    assert values == json.loads(json.dumps(evaluation.values))
    assert set(values) >= ISSUE_KEYS
    assert set(values["baselines"]) == set(CONFIG.baselines)
    assert values["metrics"] == mean_metrics(evaluation.ranks.ranks, CONFIG.ks)
    for name, (low, high) in values["intervals"].items():
        assert low <= values["metrics"][name] <= high
    for of_baseline in values["baselines"].values():
        assert set(of_baseline) == set(values["metrics"])
    assert (values["split"], values["filter_seen"], values["num_items"]) == ("test", True, 45)
    assert values["num_users"] + sum(values["users_left_out"].values()) == 60


def test_paired_differences_are_those_of_the_means(evaluated):
    values = evaluated[1].values
    for baseline, parts in values["paired"].items():
        for metric, one in parts.items():
            expected = values["metrics"][metric] - values["baselines"][baseline][metric]
            assert one["difference"] == pytest.approx(expected, abs=1e-12)
            assert one["interval"][0] <= one["difference"] <= one["interval"][1]


def test_slices_part_the_users(evaluated):
    values = evaluated[1].values
    for parts in values["slices"].values():
        assert sum(part["num_users"] for part in parts) == values["num_users"]
        mean = (
            sum(part["num_users"] * part["metrics"]["model"]["mrr"] for part in parts) / values["num_users"]
        )
        assert mean == pytest.approx(values["metrics"]["mrr"])


def test_lists_are_described_for_every_system(evaluated):
    values = evaluated[1].values
    assert set(values["beyond_accuracy"]) == {"model", *CONFIG.baselines}
    for metrics in values["beyond_accuracy"].values():
        assert 0 < metrics["coverage@10"] <= 1
        assert 0 <= metrics["vector_diversity@10"] <= 2
    run, evaluation, _ = evaluated
    top = evaluation.ranks.top_item_ids
    unit = run.vectors / np.linalg.norm(run.vectors, axis=1, keepdims=True)
    pairs = [1 - np.mean([unit[a] @ unit[b] for a in row for b in row if a != b]) for row in top]
    assert values["beyond_accuracy"]["model"]["vector_diversity@10"] == pytest.approx(
        np.mean(pairs), abs=1e-5
    )


def test_lists_are_no_longer_than_the_catalogue_for_the_model_and_the_baselines_alike(
    make_last_item_run, make_small_dataset
):
    config = dataclasses.replace(CONFIG, list_length=100, baselines=("popularity",), example_users=0)
    run = make_last_item_run(dataset=make_small_dataset(lengths=[5] * 8))
    lists = evaluate(run, "test", config=config).values["beyond_accuracy"]
    assert "coverage@45" in lists["model"]
    assert set(lists["model"]) == set(lists["popularity"])


def test_only_learned_behaviours_are_measured(evaluated):
    behaviours = evaluated[1].values["behaviours"]
    assert set(behaviours) == {"like"}
    assert 0 <= behaviours["like"]["auc"] <= 1
    assert behaviours["like"]["calibration"]["scale"] >= 0
    assert sum(behaviours["like"]["calibration"]["count"]) == behaviours["like"]["num_labels"]


def test_examples_have_titles_or_ids(evaluated):
    run, evaluation, _ = evaluated
    assert len(evaluation.examples) == CONFIG.example_users
    for user in evaluation.examples:
        assert len(user.recommendations) == 10
        assert all(
            name.startswith(("Film ", "item "))
            for name in [*user.history, *user.recommendations, user.target]
        )
        assert (user.target in user.recommendations) == (user.rank < 10)
    assert "Film 1 & Söhne" in run.dataset.titles(np.array([1]))


def test_the_report_and_the_ranks_are_saved(evaluated):
    run, evaluation, workdir = evaluated
    assert "last_item on small" in (workdir / "report.html").read_text()
    table = pq.read_table(workdir / "ranks.parquet")
    assert table.column_names == ["user_id", "item_id", "rank"]
    assert table["rank"].to_pylist() == evaluation.ranks.ranks.tolist()
    assert table["item_id"].to_pylist() == run.dataset.item_keys[evaluation.ranks.targets - 1].tolist()
    assert not [path for path in workdir.iterdir() if path.name.endswith(".tmp")]


def test_the_tables_for_the_terminal_say_what_matters(evaluated):
    _, evaluation, _ = evaluated
    text = printed(print_evaluation, evaluation.values)
    assert "item-kNN" in text
    assert f"{evaluation.values['metrics']['ndcg@10']:.4f}" in text
    assert "the best baseline" in text
    text = printed(print_example, evaluation.examples[0])
    assert all(title in text for title in evaluation.examples[0].recommendations)


def test_names_that_look_like_markup_are_printed_as_they_are():
    system = {"metrics": {"ndcg@10": 0.5}}
    text = printed(print_kinds, {"[red]": {"num_users": 3, "systems": {"model": system}}}, "ndcg@10")
    assert "[red] (3 users)" in text
    groups = {"num_groups": 1, "group_size": 2, "list_length": 5, "systems": {"model, [/x]": system}}
    assert "model, [/x]" in printed(print_groups, groups)


def test_a_behaviour_without_known_labels_is_printed_with_dashes():
    names = ("auc", "log_loss", "expected_calibration_error", "auc_interval", "log_loss_interval", "auc_gain")
    text = printed(print_behaviours, {"like": {"item_rate": dict.fromkeys(names)}})
    assert text.split().count("-") == 3 and "item rate" in text


def test_two_runs_are_compared_in_pairs(evaluated, make_last_item_run, tmp_path):
    run, evaluation, workdir = evaluated
    other = make_last_item_run(dataset=run.dataset)
    other.vectors = other.vectors[::-1].copy()
    second = evaluate(other, "test", config=dataclasses.replace(CONFIG, baselines=("popularity",)))
    save_evaluation(tmp_path, second, other)
    comparisons = compare_runs(workdir, tmp_path, config=CONFIG)
    assert "recall@10" not in comparisons
    for name, one in comparisons.items():
        expected = second.values["metrics"][name] - evaluation.values["metrics"][name]
        assert one.difference == pytest.approx(expected, abs=1e-12)
        assert one.adjusted_p_value >= one.p_value
    text = printed(print_comparison, "a", "b", comparisons, 0.95)
    assert "B = b against A = a" in text
    assert "ndcg@10" in text
    same = compare_runs(workdir, workdir, config=CONFIG)
    assert all(one.adjusted_p_value == 1.0 and one.difference == 0.0 for one in same.values())


def test_runs_that_cannot_be_paired_are_refused(evaluated, make_last_item_run, tmp_path):
    run, _, workdir = evaluated
    with pytest.raises(ValueError, match="holds no ranks"):
        compare_runs(workdir, tmp_path, config=CONFIG)
    (tmp_path / "ranks.parquet").write_bytes(b"PAR1 but broken")
    with pytest.raises(ValueError, match="is damaged"):
        compare_runs(workdir, tmp_path, config=CONFIG)
    pq.write_table(
        pq.read_table(workdir / "ranks.parquet").replace_schema_metadata({}), tmp_path / "ranks.parquet"
    )
    with pytest.raises(ValueError, match="not written by"):
        compare_runs(workdir, tmp_path, config=CONFIG)
    other = make_last_item_run(dataset=run.dataset)
    validation = evaluate(other, "validation", config=dataclasses.replace(CONFIG, baselines=()))
    assert validation.values["baselines"] == {}
    save_evaluation(tmp_path, validation, other)
    with pytest.raises(ValueError, match="split=test and .* with validation"):
        compare_runs(workdir, tmp_path, config=CONFIG)


def test_nobody_to_evaluate(make_last_item_run, make_small_dataset):
    run = make_last_item_run(dataset=make_small_dataset(lengths=[1, 2, 2]))
    with pytest.raises(ValueError, match="no user with a target in split 'test'"):
        evaluate(run, "test", config=CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ks": ()}, "ks="),
        ({"ks": (10, 5)}, "growing"),
        ({"ks": (0,)}, "at least 1"),
        ({"metric": "ndcg"}, "written as"),
        ({"metric": "ndcg@7"}, "not one of hr@1"),
        ({"baselines": ("eaze",)}, "known are popularity"),
        ({"confidence": 95}, "0.5 .. 1"),
        ({"bootstrap_samples": 3}, "at least 100"),
        ({"rows_per_batch": 0}, "rows_per_batch=0"),
        ({"max_users": -1}, "max_users=-1"),
        ({"behaviour_events": "some"}, "behaviour_events='some'"),
    ],
)
def test_settings_that_make_no_sense_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**changes)
