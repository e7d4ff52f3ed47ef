"""New items: a tenth of the items is taken out of training, and the test targets among them are ranked.

Five draws of the items for each set, a seed of the model with each. The targets are the test events (leave-one-out) of
the items that were taken out; recall@20 is over the users, among the new items alone, and in the whole catalogue
beside. A user is asked in every draw that takes its target, so tests and intervals resample users over all draws.

ML-1M (`configs/ml1m_cold.py`): recall@20 of at least .50, and above a ridge regression from words, genres and year to
co-occurrences; the nearest texts, chance, and the same model without text stand beside. What reading costs the items
that are known is told by that last model: it is trained on the same events and asked for the same targets, so that
nothing but the text differs; a model that is trained on the removed events too would differ by those as well. The whole
interval of the relative difference in NDCG@10 has to lie above -2 %.

Amazon Industrial & Scientific (`configs/amazon_industrial.py`): above the nearest texts.

    python benchmarks/quality/cold_items.py            # some 80 minutes on 2 quiet cores, as its configs are sized for
    python benchmarks/quality/cold_items.py --seeds=1
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import cold_baselines
import numpy as np
import suite
from suite import METRIC, Seed, Variant, record

from jaxrec.evaluation.significance import Comparison, by_user, paired_comparison
from jaxrec.metrics.ranking import hit_at_k, per_user_metrics

K = 20
RECALL = 0.50
MOST_LOST = 0.02  # of the known items' NDCG@10, relative
DRAW = ("data.cold_items.seed={seed}",)
RIDGE, NEAREST, CHANCE = "ridge", "content_knn", "random"
READING = {
    "ml1m": Variant(name="cold_ml1m", config="configs/ml1m_cold.py", overrides=DRAW, data="ml-1m"),
    "industrial": Variant(
        name="cold_industrial",
        config="configs/amazon_industrial.py",
        overrides=DRAW,
        data="amazon18-industrial",
    ),
}
IDS_ONLY = Variant(name="cold_ml1m_ids", config="configs/ml1m_cold.py:ids_only", overrides=DRAW, data="ml-1m")

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
            (RIDGE, cold_baselines.ridge, cold_baselines.all_features(dataset)),
            (NEAREST, cold_baselines.content_knn, cold_baselines.word_features(dataset)),
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


def known_items(reading: Sequence[Seed], ids_only: Sequence[Seed]) -> tuple[Comparison, list[float]]:
    """The model that reads against the one that does not, on targets that training has seen.

    Returns:
      The comparison in NDCG@10, and the interval of the difference over the mean of the model without text.
    """
    whose: Ranks = []
    values: tuple[Ranks, Ranks] = [], []  # without text, with it
    for seeds in zip(reading, ids_only, strict=True):
        for seed in seeds:
            assert np.array_equal(seed.users, seeds[0].users), "the two models were asked about other users"
        known = ~np.isin(seeds[0].users, seeds[0].cold_users)
        whose.append(seeds[0].users[known])
        for of_model, seed in zip(values, seeds[::-1], strict=True):
            of_model.append(per_user_metrics(seed.ranks[known], (10,))[METRIC])
    a, b = (by_user(np.concatenate(part), np.concatenate(whose)) for part in values)
    comparison = paired_comparison(a, b)
    return comparison, [end / comparison.mean_a for end in (comparison.low, comparison.high)]


def report(
    name: str, reading: Sequence[Seed], simple: Simple, rival: str
) -> tuple[dict[str, Any], list[record.Bar]]:
    """Recall of every system, the tests, and the bar against the rival."""
    for seed, users in zip(reading, simple.users, strict=True):
        assert np.array_equal(seed.cold_users, users), f"{name}: model and simple systems ranked other users"
    systems = {"model": [seed.cold_ranks for seed in reading]} | simple.ranks
    figures: dict[str, Any] = {
        f"recall@{K}": {system: pooled_recall(ranks) for system, ranks in systems.items()},
        "of_draws": {
            system: [float(hit_at_k(one, K).mean()) for one in ranks] for system, ranks in systems.items()
        },
        "in_the_catalogue": [
            seed.figures["cold_items"]["in_the_catalogue"][f"recall@{K}"] for seed in reading
        ],
        "new_items": [seed.figures["cold_items"]["num_items"] for seed in reading],
        "targets": [len(users) for users in simple.users],
        "settings": simple.settings,
        "summary": suite.summary(reading),
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
        reading = suite.run_variant(READING[name], given)
        simple = simple_systems(READING[name], given)
        figures[name], of_set = report(name, reading, simple, rival)
        bars += of_set
        if name == "ml1m":
            recall = figures[name][f"recall@{K}"]["model"]
            bars.append(record.Bar(name=f"{name}: recall@{K} among new items", value=recall, limit=RECALL))
            ids_only = suite.run_variant(IDS_ONLY, given)
            comparison, relative = known_items(reading, ids_only)
            figures["known_items"] = dataclasses.asdict(comparison) | {"relative_interval": relative}
            figures["ids_only"] = suite.summary(ids_only) | {
                f"recall@{K}": pooled_recall([seed.cold_ranks for seed in ids_only])
            }
            bars.append(
                record.Bar(
                    name=f"{name}: known items, {METRIC} against ids only, lower end of the relative difference",
                    value=relative[0],
                    limit=-MOST_LOST,
                    strict=True,
                )
            )
    return record.finish("quality_cold_items", figures, bars, results=given.results)


if __name__ == "__main__":
    sys.exit(main())
