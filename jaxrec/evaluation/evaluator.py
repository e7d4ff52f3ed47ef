"""The whole evaluation of a run: the model and the baselines on the same targets, with intervals, tests and slices.

docs/evaluation.md says what each part of `evaluation.json` means.

U = users (targets, where a user has more than one), T = length of the lists.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from jaxrec.core.files import write_whole
from jaxrec.data.evaluation_batches import EvaluationRows
from jaxrec.evaluation.baselines import DEFAULT_BASELINES, BaselineResults, evaluate_baselines
from jaxrec.evaluation.behaviour_baselines import compare_behaviours
from jaxrec.evaluation.behaviours import (
    asked_labels,
    behaviour_metrics,
    funnel_counts,
    learned_behaviours,
    write_predictions,
)
from jaxrec.evaluation.cold_items import cold_values, rank_cold_items
from jaxrec.evaluation.comparison import COLD_RANKS_FILE, write_ranks
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.evaluation.group_lists import group_metrics
from jaxrec.evaluation.kinds import kind_metrics
from jaxrec.evaluation.list_quality import list_quality
from jaxrec.evaluation.ratings import learns_values, value_metrics
from jaxrec.evaluation.report import ExampleUser, best_baseline, write_report
from jaxrec.evaluation.search import is_searched, search_metrics
from jaxrec.evaluation.significance import by_user, compare, with_intervals
from jaxrec.evaluation.slate_lists import slate_metrics
from jaxrec.evaluation.slices import activity_slices, domain_slices, popularity_slices, slice_means
from jaxrec.evaluation.user_ranking import (
    BehaviourPredictions,
    Run,
    UserRanker,
    UserRanks,
    evaluation_rows,
    predict_behaviours,
    predict_values,
)
from jaxrec.metrics.ranking import per_user_metrics

logger = logging.getLogger(__name__)

EVALUATION_FILE, REPORT_FILE = "evaluation.json", "report.html"
MODEL = "model"

PerUser = Mapping[str, Mapping[str, Float64[np.ndarray, " u"]]]  # system -> metric -> one value a user


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured.

    Attributes:
      values: what `evaluation.json` holds.
      ranks: of each user, and the lists.
      cold_ranks: of new targets among new items; None where they were not asked for.
      predictions: of behaviours; None where no task learns them.
      examples: users to look at.
    """

    values: dict[str, Any]
    ranks: UserRanks
    cold_ranks: UserRanks | None
    predictions: BehaviourPredictions | None
    examples: list[ExampleUser]


def evaluate(
    run: Run, split: str, *, config: EvaluationConfig, rows_per_batch: int | None = None, command: str = ""
) -> Evaluation:
    """Measures a run on every user of `split` ("test" or "validation").

    Raises:
      ValueError: nobody has a target in the split, or the model's output is not finite.
    """
    metadata = run.dataset.metadata
    rows_per_batch = rows_per_batch or config.rows_per_batch
    ranker = UserRanker(run, top_k=config.list_length)
    every_event = config.ranking_events == "all"
    rows = ranker.rows(split, rows_per_batch=rows_per_batch, every_event=every_event)
    if not rows.num_users:
        raise ValueError(
            f"dataset {metadata.name!r} has no user with a target in split {split!r} and a history before it; "
            "prepare it with another split or more events."
        )
    ranks, timing = ranker.rank(rows)
    logger.info(
        "ranked %d users in %.2f s (%.0f users/s)", len(ranks), timing.seconds, timing.users_per_second
    )
    baselines = _baselines(run, split, config, ranks)
    per_user = {MODEL: per_user_metrics(ranks.ranks, config.ks)}
    per_user |= {
        name: per_user_metrics(of_baseline, config.ks) for name, of_baseline in baselines.ranks.items()
    }
    users = {
        system: {name: by_user(column, ranks.user_indices) for name, column in metrics.items()}
        for system, metrics in per_user.items()
    }
    values = _ranking_values(run, split, config, users) | {
        "num_targets": len(ranks),
        "model": _describe(run),
        "command": command,
        "baselines_refused": baselines.refused,
        "paired": _paired(users, config),
    }
    cold_ranks = None
    if config.cold_items:
        cold_ranks = rank_cold_items(run, split, ranks, config, rows_per_batch)
        values["cold_items"] = cold_values(run, ranks, cold_ranks, config)
    values["slices"] = _slices(run, split, ranks, per_user, best_baseline(values, config.metric))
    lists = {MODEL: ranks.top_item_ids} | baselines.recommended
    values["beyond_accuracy"] = list_quality(run, lists, ranks.user_indices, split)
    predictions, of_behaviours = _behaviours(run, split, config, rows_per_batch)
    values |= of_behaviours | {"values": _values(run, split, config, rows_per_batch)}
    values["search"] = search_metrics(run, split, config) if is_searched(run.config.tasks) else {}
    values["slates"] = _slates(run, rows, config)
    values["kinds"] = kind_metrics(run, split, config, rows_per_batch)
    values["groups"] = group_metrics(run, split, config, rows_per_batch)
    values["timing"] = dataclasses.asdict(timing) | {
        "users_per_second": timing.users_per_second,
        "baseline_seconds": baselines.seconds,
    }
    values["users_left_out"] = {
        "without_target": rows.num_without_target,
        "without_history": rows.num_without_history,
    }
    examples = example_users(run, split, ranks, config)
    return Evaluation(
        values=values, ranks=ranks, cold_ranks=cold_ranks, predictions=predictions, examples=examples
    )


def protocol(split_rule: str, ranking_events: str = "first") -> str:
    """What the numbers mean, in one line."""
    rule = {"leave_one_out": "leave-one-out", "global_time": "global time"}.get(split_rule, split_rule)
    targets = "every event of the split a target, " if ranking_events == "all" else ""
    return (
        f"{rule}, {targets}full ranking of the catalogue, history of all earlier events, target time unseen"
    )


def save_evaluation(workdir: Path, evaluation: Evaluation, run: Run) -> None:
    """Writes `evaluation.json`, `report.html`, and of what was measured `ranks.parquet`, `cold_ranks.parquet` and
    `behaviours.parquet`, each at once."""
    split = evaluation.values["split"]
    write_ranks(workdir, run.dataset, split, evaluation.ranks)
    if evaluation.cold_ranks is not None:
        write_ranks(workdir, run.dataset, split, evaluation.cold_ranks, COLD_RANKS_FILE)
    if evaluation.predictions is not None:
        write_predictions(workdir, run.dataset, evaluation.predictions, list(evaluation.values["behaviours"]))
    write_whole(workdir / EVALUATION_FILE, json.dumps(evaluation.values, indent=2, allow_nan=False) + "\n")
    write_report(
        workdir / REPORT_FILE,
        evaluation.values,
        history=run.history,
        examples=evaluation.examples,
        config=dataclasses.asdict(run.config) if dataclasses.is_dataclass(run.config) else {},  # type: ignore[arg-type]
    )


def example_users(run: Run, split: str, ranks: UserRanks, config: EvaluationConfig) -> list[ExampleUser]:
    """A few users, drawn by the seed, with titles; an item without a title shows its id."""
    firsts = np.unique(ranks.user_indices, return_index=True)[1]  # of a user's targets
    count = min(config.example_users, len(firsts))
    chosen = firsts[np.sort(np.random.default_rng(config.seed).choice(len(firsts), count, replace=False))]
    dataset = run.dataset
    examples = []
    for place in chosen:
        user = ranks.user_indices[place]
        ends = dataset.validation_end if split == "test" else dataset.train_end
        history = dataset.histories(np.array([user])).item_ids[: max(ends[user], 1)]
        examples.append(
            ExampleUser(
                user_id=str(dataset.user_keys[user]),
                history=item_names(run, history),
                recommendations=item_names(run, ranks.top_item_ids[place]),
                target=item_names(run, ranks.targets[place : place + 1])[0],
                rank=int(ranks.ranks[place]),
            )
        )
    return examples


def item_names(run: Run, item_ids: np.ndarray) -> list[str]:
    """Titles, or the items' own ids where there is no title; padding is left out."""
    item_ids = item_ids[item_ids > 0]
    keys = run.dataset.item_keys[item_ids - 1]
    return [title or f"item {key}" for title, key in zip(run.dataset.titles(item_ids), keys, strict=True)]


def _ranking_values(run: Run, split: str, config: EvaluationConfig, per_user: PerUser) -> dict[str, Any]:
    """The core of `evaluation.json`: what was asked, and the metrics with their intervals and baselines."""
    metadata = run.dataset.metadata
    means = {
        system: {name: float(column.mean()) for name, column in metrics.items()}
        for system, metrics in per_user.items()
    }
    return {
        "dataset": metadata.name,
        "protocol": protocol(metadata.split, config.ranking_events),
        "split": split,
        "filter_seen": metadata.filter_seen,
        "num_users": len(per_user[MODEL][config.metric]),
        "num_items": metadata.num_items,
        "metrics": means.pop(MODEL),
        "intervals": with_intervals(per_user[MODEL], **config.draws)["intervals"],
        "baselines": means,
        "headline_metric": config.metric,
        "confidence": config.confidence,
    }


def _baselines(run: Run, split: str, config: EvaluationConfig, ranks: UserRanks) -> BaselineResults:
    """The baselines on the model's users, in the same order."""
    start = time.perf_counter()
    results = evaluate_baselines(
        run.dataset,
        split,
        {name: DEFAULT_BASELINES[name] for name in config.baselines},
        user_indices=ranks.user_indices,
        every_event=config.ranking_events == "all",
        num_recommended=ranks.top_item_ids.shape[1],
    )
    assert np.array_equal(results.user_indices, ranks.user_indices), "model and baselines rank other users"
    assert np.array_equal(results.targets, ranks.targets), "model and baselines rank other targets"
    for name, reason in results.refused.items():
        logger.warning("baseline %s did not run: %s", name, reason)
    logger.info("baselines took %.1f s", time.perf_counter() - start)
    return results


def _paired(per_user: PerUser, config: EvaluationConfig) -> dict[str, dict[str, Any]]:
    """The model against each baseline, user by user; Holm's correction over the metrics of each comparison."""
    chosen = [
        name for name in dict.fromkeys([config.metric, "hr@10", "ndcg@10", "mrr"]) if name in per_user[MODEL]
    ]
    paired: dict[str, dict[str, Any]] = {}
    for baseline in per_user:
        if baseline == MODEL:
            continue
        comparisons = compare(
            {name: per_user[baseline][name] for name in chosen},
            {name: per_user[MODEL][name] for name in chosen},
            **config.draws,
        )
        paired[baseline] = {
            name: {
                "difference": one.difference,
                "interval": [one.low, one.high],
                "p_value": one.p_value,
                "adjusted_p_value": one.adjusted_p_value,
            }
            for name, one in comparisons.items()
        }
    return paired


def _slices(
    run: Run,
    split: str,
    ranks: UserRanks,
    per_user: PerUser,
    rival: str | None,
) -> dict[str, list[dict[str, Any]]]:
    """The model, the best baseline and popularity for domains, and for parts of the users and of the items."""
    ends = run.dataset.validation_end if split == "test" else run.dataset.train_end
    slices = activity_slices(ends[ranks.user_indices]) + popularity_slices(
        ranks.targets, run.dataset.item_counts
    )
    domains = run.dataset.user_domains[ranks.user_indices]
    slices = domain_slices(domains, run.dataset.metadata.domains) + slices
    systems = [name for name in dict.fromkeys([MODEL, rival or MODEL, "popularity"]) if name in per_user]
    means = {name: slice_means(per_user[name], slices) for name in systems}
    families: dict[str, list[dict[str, Any]]] = {}
    for index, part in enumerate(slices):
        metrics = {
            system: {key: value for key, value in means[system][index].items() if key in per_user[MODEL]}
            for system in systems
        }
        record = {"name": part.name, "num_users": int(part.users.sum()), "metrics": metrics}
        families.setdefault(part.family.replace(" ", "_"), []).append(record)
    return families


def _behaviours(
    run: Run, split: str, config: EvaluationConfig, rows_per_batch: int
) -> tuple[BehaviourPredictions | None, dict[str, Any]]:
    """The predicted behaviours, and their metrics as calibrated on the validation targets; none where none learns."""
    names, tasks = run.dataset.metadata.behaviours, run.config.tasks
    learned = learned_behaviours(tasks, names)

    def predict(split: str) -> BehaviourPredictions | None:
        every_event = config.behaviour_events == "all"
        rows = evaluation_rows(
            run, split, rows_per_batch=rows_per_batch, every_event=every_event, with_seen=False
        )
        return predict_behaviours(run, rows)

    def asked(predictions: BehaviourPredictions) -> BehaviourPredictions:
        return dataclasses.replace(predictions, labels=asked_labels(tasks, names, predictions.labels))

    predicted = predict(split) if learned else None
    if predicted is None:
        return None, {"behaviours": {}, "funnels": {}}
    reference = predicted if split == "validation" else predict("validation")
    measured = behaviour_metrics(names, asked(predicted), reference and asked(reference), learned)
    values = {"behaviours": measured, "funnels": funnel_counts(tasks, names, predicted, measured)}
    if config.behaviour_baselines and reference is not None:
        values["behaviour_comparison"] = compare_behaviours(
            run.dataset,
            asked(predicted),
            asked(reference),
            measured,
            config.behaviour_baselines,
            num_samples=config.bootstrap_samples,
            seed=config.seed,
        )
    return predicted, values


def _slates(run: Run, rows: EvaluationRows, config: EvaluationConfig) -> dict[str, dict[str, Any]]:
    """What the sets of the config are like; ranked once more, since they are chosen from longer lists."""
    if not config.slates:
        return {}
    pools, _ = UserRanker(run, top_k=max(slate.pool for slate in config.slates.values())).rank(rows)
    return slate_metrics(run, pools, config.slates, **config.draws)


def _values(run: Run, split: str, config: EvaluationConfig, rows_per_batch: int) -> dict[str, Any]:
    """The errors of predicted values; {} where no task learns them."""
    if not learns_values(run.config.tasks):
        return {}
    every_event = config.behaviour_events == "all"
    rows = evaluation_rows(run, split, rows_per_batch=rows_per_batch, every_event=every_event)
    predicted = predict_values(run, rows)
    return value_metrics(run.dataset, predicted, split) if predicted is not None else {}


def _describe(run: Run) -> dict[str, Any]:
    config = run.config
    description: dict[str, Any] = {"name": getattr(config, "name", ""), "step": run.step}
    tasks: Sequence[str] = list(getattr(config, "tasks", {}))
    return description | {"tasks": ", ".join(tasks), "mesh": "x".join(map(str, run.mesh.devices.shape))}
