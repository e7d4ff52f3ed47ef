"""New items: a tenth of the items is taken out of training, and the test targets among them are ranked.

Five draws of the items for each set, a seed of the model with each. The targets are the test events (leave-one-out) of
the items that were taken out; recall@20 is over the users, among the new items alone, and in the whole catalogue
beside. A user is asked in every draw that takes its target, so tests and intervals resample users over all draws.

ML-1M (`configs/ml1m_cold.py`): recall@20 of at least .50, and above a ridge regression from the same words, genres and
year to co-occurrences; the nearest texts, chance, and one draw of a model that reads by a text encoder stand beside.
What the new items cost the known ones: the same model is asked for the known targets once more while the new items have
the rows that they started with, which nobody is shown. The whole interval of the relative difference in NDCG@10 has to
lie above -2 %.

Amazon Industrial & Scientific (`configs/amazon_industrial.py`): above the nearest texts.

    python benchmarks/quality/cold_items.py            # some 60 minutes on 2 quiet cores, as its configs are sized for
    python benchmarks/quality/cold_items.py --seeds=1
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cold_baselines
import jax
import numpy as np
import suite
from suite import METRIC, Seed, Variant, record

from jaxrec.config import run_directory
from jaxrec.data.item_features import item_features, word_features
from jaxrec.evaluation.significance import Comparison, by_user, paired_comparison
from jaxrec.evaluation.user_ranking import UserRanker
from jaxrec.metrics.ranking import hit_at_k, per_user_metrics
from jaxrec.runs import load_run

K = 20
RECALL = 0.50
MOST_LOST = 0.02  # of the known items' NDCG@10, relative
DRAW = ("data.cold_items.seed={seed}",)
RIDGE, NEAREST, CHANCE = "ridge", "content_knn", "random"
MODELS = {
    "ml1m": Variant(name="cold_ml1m", config="configs/ml1m_cold.py", overrides=DRAW, data="ml-1m"),
    "industrial": Variant(
        name="cold_industrial",
        config="configs/amazon_industrial.py",
        overrides=DRAW,
        data="amazon18-industrial",
    ),
}
BY_TEXT = Variant(name="cold_ml1m_text", config="configs/ml1m_cold.py:by_text", overrides=DRAW, data="ml-1m")
WITHOUT = "ranks_without_new_items"

Ranks = list[np.ndarray]  # of one system, one array a draw


@dataclasses.dataclass(frozen=True)
class Simple:
    """What the simple systems did.

    Attributes:
      users: whose targets they ranked, one array a draw.
      ranks: by system.
      settings: by system, of each draw.
    """

    users: Ranks
    ranks: dict[str, Ranks]
    settings: dict[str, list[dict[str, Any]]]


def simple_systems(variant: Variant, given: argparse.Namespace) -> Simple:
    """Fits and ranks, on the data of the runs."""
    found = Simple([], {RIDGE: [], NEAREST: [], CHANCE: []}, {RIDGE: [], NEAREST: []})
    for seed in range(given.seeds):
        dataset = suite.prepared(suite.tried(variant, given), seed, given)
        question = cold_baselines.final_question(dataset)
        held_out = cold_baselines.held_out_question(dataset, seed)
        for name, system, features in (
            (RIDGE, cold_baselines.ridge, item_features(dataset)),
            (NEAREST, cold_baselines.content_knn, word_features(dataset.item_texts)),
        ):
            ranks, settings = cold_baselines.chosen_ranks(system, features, held_out, question, K)
            found.ranks[name].append(ranks)
            found.settings[name].append(settings)
        found.ranks[CHANCE].append(cold_baselines.random_ranks(question, seed))
        found.users.append(dataset.user_keys[question.users])
    return found


def pooled_recall(ranks: Ranks) -> float:
    """Recall@20 over the targets of all draws."""
    return float(hit_at_k(np.concatenate(ranks), K).mean())


def pooled_comparison(a: Ranks, b: Ranks, users: Ranks) -> Comparison:
    """B against A in recall@20, user by user over all draws."""
    whose = np.concatenate(users)
    return paired_comparison(*(by_user(hit_at_k(np.concatenate(ranks), K), whose) for ranks in (a, b)))


def ranked_without(workdir: Path) -> dict[str, Any]:
    """The rank of every user's target where the new items keep the rows that they started with."""
    run = load_run(run_directory(workdir), fill_new_items=False)
    with jax.set_mesh(run.mesh):
        ranker = UserRanker(run)
        rows = ranker.rows("test", rows_per_batch=run.config.evaluation.rows_per_batch)
        return {WITHOUT: ranker.rank(rows)[0].ranks.tolist()}


def known_items(seeds: Sequence[Seed]) -> tuple[Comparison, list[float]]:
    """The models with the new items against the same without them, on targets that training has seen.

    Returns:
      The comparison in NDCG@10, and the interval of the difference over the mean without.
    """
    whose: Ranks = []
    values: tuple[Ranks, Ranks] = [], []  # without the new items, with them
    for seed in seeds:
        known = ~np.isin(seed.users, seed.cold_users)
        whose.append(seed.users[known])
        for part, ranks in zip(values, (np.array(seed.figures[WITHOUT]), seed.ranks), strict=True):
            part.append(per_user_metrics(ranks[known], (10,))[METRIC])
    a, b = (by_user(np.concatenate(part), np.concatenate(whose)) for part in values)
    comparison = paired_comparison(a, b)
    return comparison, [end / comparison.mean_a for end in (comparison.low, comparison.high)]


def report(
    name: str, seeds: Sequence[Seed], simple: Simple, rival: str
) -> tuple[dict[str, Any], list[record.Bar]]:
    """Recall of every system, the tests, and the bar against the rival."""
    for seed, users in zip(seeds, simple.users, strict=True):
        assert np.array_equal(seed.cold_users, users), f"{name}: model and simple systems ranked other users"
    systems = {"model": [seed.cold_ranks for seed in seeds]} | simple.ranks
    figures: dict[str, Any] = {
        f"recall@{K}": {system: pooled_recall(ranks) for system, ranks in systems.items()},
        "of_draws": {
            system: [float(hit_at_k(one, K).mean()) for one in ranks] for system, ranks in systems.items()
        },
        "in_the_catalogue": [seed.figures["cold_items"]["in_the_catalogue"][f"recall@{K}"] for seed in seeds],
        "new_items": [seed.figures["cold_items"]["num_items"] for seed in seeds],
        "targets": [len(users) for users in simple.users],
        "settings": simple.settings,
        "summary": suite.summary(seeds),
    }
    for system, recall in figures[f"recall@{K}"].items():
        print(f"{name}: recall@{K} among new items, {system}: {recall:.4f}")
    against = {
        system: pooled_comparison(ranks, systems["model"], simple.users)
        for system, ranks in simple.ranks.items()
    }
    figures["model_against"] = {system: dataclasses.asdict(one) for system, one in against.items()}
    return figures, [suite.paired_bar(f"{name}: recall@{K} above {rival}", against[rival])]


def main() -> int:
    """Trains what is missing, compares, checks."""
    parser = suite.argument_parser(
        __doc__, seeds=5, seeds_help="draws of the items, each with a seed of its own"
    )
    suite.add_trial_arguments(parser)
    given = parser.parse_args()
    figures: dict[str, Any] = {}
    bars: list[record.Bar] = []
    for name, rival in (("ml1m", RIDGE), ("industrial", NEAREST)):
        seeds = suite.run_variant(MODELS[name], given, measure=ranked_without)
        simple = simple_systems(MODELS[name], given)
        figures[name], of_set = report(name, seeds, simple, rival)
        bars += of_set
        if name == "ml1m":
            recall = figures[name][f"recall@{K}"]["model"]
            bars.append(record.Bar(name=f"{name}: recall@{K} among new items", value=recall, limit=RECALL))
            comparison, relative = known_items(seeds)
            figures["known_items"] = dataclasses.asdict(comparison) | {"relative_interval": relative}
            bars.append(
                record.Bar(
                    name=f"{name}: known items, {METRIC} beside the new ones, lower end of the relative difference",
                    value=relative[0],
                    limit=-MOST_LOST,
                    strict=True,
                )
            )
    given.seeds = 1
    by_text = suite.run_variant(BY_TEXT, given)
    figures["by_text"] = suite.summary(by_text) | {
        f"recall@{K}": pooled_recall([seed.cold_ranks for seed in by_text])
    }
    print(f"ml1m: recall@{K} among new items, by text, draw 0: {figures['by_text'][f'recall@{K}']:.4f}")
    return record.finish("quality_cold_items", figures, bars, results=given.results)


if __name__ == "__main__":
    sys.exit(main())
