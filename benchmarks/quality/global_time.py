"""Splits by time: what was known at the moment of each prediction, and nothing that came later.

ML-1M (`configs/ml1m_time.py`): the last tenth of the events, by time, is the test part; each of its events is a
target, given all events of its user before it. The sessions of rsc15 (`configs/rsc15.py`): each click of the test part
after the first of its session is a target, given the clicks before it; what was clicked may be clicked again.

The bars ask that the model's NDCG@10 lies above popularity and above item-kNN, each by a paired test that resamples
users (sessions), for the worst seed. Popularity is taken twice: in the last tenth of the training part, frozen as the
model is, and in the window before each single target, which knows the events of the test part as they happen. The
length of that window is chosen on the validation targets. All other baselines stand beside, the strongest by name.

    python benchmarks/quality/global_time.py           # some 70 minutes on 2 quiet cores, as its configs are sized for
    python benchmarks/quality/global_time.py rsc15
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import suite
from suite import METRIC, Seed, Variant, record

from jaxrec.data.dataset import PreparedDataset
from jaxrec.evaluation.baselines.window_popularity import WindowPopularity, WindowRanks
from jaxrec.evaluation.significance import by_user, paired_comparison
from jaxrec.metrics.ranking import ndcg_at_k

HOUR = 3600
# From half a minute, about a session's pace, to a season.
WINDOWS = (30, 60, 120, 300, 900, *(hours * HOUR for hours in (1, 6, 24, 7 * 24, 30 * 24, 90 * 24)))
RIVALS = ("recent_popularity", "item_knn")


@dataclasses.dataclass(frozen=True)
class Part:
    """A data set, and how many seeds of it there is time for."""

    variant: Variant
    seeds: int


PARTS = {
    "ml1m": Part(Variant(name="time_ml1m", config="configs/ml1m_time.py", data="ml-1m"), 1),
    "rsc15": Part(Variant(name="time_rsc15", config="configs/rsc15.py", data="rsc15-100k"), 3),
}


def window_popularity(dataset: PreparedDataset) -> tuple[WindowRanks, dict[str, Any]]:
    """Ranks of the test targets with the window that is best on the validation targets, and what was tried."""
    tried = {
        seconds: float(
            ndcg_at_k(
                WindowPopularity(seconds=seconds).ranks(dataset, "validation", every_event=True).ranks, 10
            ).mean()
        )
        for seconds in WINDOWS
    }
    best = max(tried, key=lambda seconds: tried[seconds])
    found = WindowPopularity(seconds=best).ranks(dataset, "test", every_event=True)
    hours = {f"{seconds / HOUR:g} h": value for seconds, value in tried.items()}
    return found, {
        "hours": best / HOUR,
        "test": float(ndcg_at_k(found.ranks, 10).mean()),
        "validation": hours,
    }


def report(
    name: str, seeds: Sequence[Seed], popular: WindowRanks, dataset: PreparedDataset
) -> tuple[dict[str, Any], list[record.Bar]]:
    """The tests, seed by seed, and the bars for the worst seed."""
    users = dataset.user_keys[popular.user_indices]
    of_popular = by_user(ndcg_at_k(popular.ranks, 10), users)
    against: dict[str, list[dict[str, Any]]] = {rival: [] for rival in (*RIVALS, "window_popularity")}
    for seed in seeds:
        assert np.array_equal(seed.users, users), f"{name}: model and popularity ranked other targets"
        for rival in RIVALS:
            against[rival].append(seed.figures["paired"][rival][METRIC])
        one = paired_comparison(of_popular, by_user(ndcg_at_k(seed.ranks, 10), users))
        against["window_popularity"].append(
            {"difference": one.difference, "interval": [one.low, one.high], "p_value": one.p_value}
        )
    baselines = suite.summary(seeds)["baselines"]
    strongest = max(baselines, key=lambda rival: baselines[rival])
    figures = {
        "against": against,
        "strongest_baseline": {
            "name": strongest,
            METRIC: baselines[strongest],
            "paired": [seed.figures["paired"][strongest][METRIC] for seed in seeds],
        },
        "targets": len(users),
        "users": len(of_popular),
    }
    for rival, value in sorted(baselines.items(), key=lambda one: -one[1]):
        print(f"{name}: {rival}: {value:.4f}")
    bars = []
    for rival, tests in against.items():
        worst = min(tests, key=lambda test: test["interval"][0])
        low, high = worst["interval"]
        print(f"  {name} above {rival}: {worst['difference']:+.4f} [{low:+.4f}, {high:+.4f}], worst seed")
        bars.append(
            record.Bar(name=f"{name}: {METRIC} above {rival}, lower end", value=low, limit=0, strict=True)
        )
    return figures, bars


def main() -> int:
    """Trains what is missing, compares, checks; a part has a result file of its own."""
    parser = suite.argument_parser(__doc__, seeds=0, seeds_help="at most so many of each set; 0 = all")
    suite.add_trial_arguments(parser)
    parser.add_argument("parts", nargs="*", metavar="SET", help=f"of {', '.join(PARTS)}; none = all")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: no such set; choose from {', '.join(PARTS)}.")
    figures: dict[str, Any] = {}
    bars: list[record.Bar] = []
    limit = given.seeds
    for name, part in PARTS.items():
        if given.parts and name not in given.parts:
            continue
        given.seeds = min(part.seeds, limit or part.seeds)
        seeds = suite.run_variant(part.variant, given)
        dataset = suite.prepared(suite.tried(part.variant, given), 0, given)
        popular, window = window_popularity(dataset)
        print(f"{name}: window_popularity ({window['hours']:g} h): {window['test']:.4f}")
        figures[name], of_part = report(name, seeds, popular, dataset)
        figures[name] |= {"summary": suite.summary(seeds), "window_popularity": window}
        bars += of_part
    return record.finish(
        "_".join(["quality_global_time", *given.parts]), figures, bars, results=given.results
    )


if __name__ == "__main__":
    sys.exit(main())
