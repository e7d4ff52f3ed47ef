"""The quality that configs promise: trains each, evaluates it over the whole catalogue, checks its bars.

python benchmarks/quality/promises.py                        # everything: hours on 2 cores
python benchmarks/quality/promises.py ml1m_sasrec --seeds=1  # one config, one seed
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import suite
from suite import METRIC, Seed, Variant, record


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What a config has to reach on the test split, on every seed.

    Attributes:
        at_least: bars on metrics.
        train_minutes: bound on the training time.
        above: baselines that NDCG@10 has to exceed.
        transition: where the transition baseline's NDCG@10 has to lie, as (middle, tolerance): it proves the
            evaluation independently of the model.
    """

    variant: Variant
    seeds: int = 1
    at_least: tuple[tuple[str, float], ...] = ()
    train_minutes: float
    above: tuple[str, ...] = ()
    transition: tuple[float, float] | None = None


def _on_ml1m(name: str) -> Variant:
    return Variant(name=name, config=f"configs/{name}.py", data="ml-1m-sasrec")


PROMISES = (
    Promise(
        variant=Variant(name="quickstart", config="configs/quickstart.py"),
        train_minutes=5,
        above=("popularity", "item_knn", "ease"),
    ),
    Promise(
        variant=_on_ml1m("ml1m_sasrec"),
        seeds=3,
        at_least=((METRIC, 0.175), ("hr@10", 0.30)),
        train_minutes=40,
        transition=(0.1597, 0.002),
    ),
    Promise(
        variant=_on_ml1m("ml1m_bert4rec"),
        at_least=((METRIC, 0.15),),
        train_minutes=40,
        transition=(0.1597, 0.002),
    ),
)


def check(promise: Promise, seeds: Sequence[Seed]) -> list[record.Bar]:
    """The bars of a promise: each holds for the worst of its seeds."""
    name, bars = promise.variant.name, []
    for metric, limit in promise.at_least:
        worst = min(seed.metrics[metric] for seed in seeds)
        bars.append(record.Bar(name=f"{name}: {metric}, worst seed", value=worst, limit=limit))
    for baseline in promise.above:
        lead = min(seed.metrics[METRIC] - seed.figures["baselines"][baseline][METRIC] for seed in seeds)
        bars.append(record.Bar(name=f"{name}: {METRIC} above {baseline}", value=lead, limit=0, strict=True))
    if promise.transition:
        middle, tolerance = promise.transition
        off = max(abs(seed.figures["baselines"]["transition"][METRIC] - middle) for seed in seeds)
        what = f"{name}: transition baseline off {middle}"
        bars.append(record.Bar(name=what, value=off, limit=tolerance, at_most=True))
    return [*bars, suite.minutes_bar(name, seeds, promise.train_minutes)]


def main() -> int:
    """Trains what is missing and checks everything; a part has a result file of its own."""
    names = [promise.variant.name for promise in PROMISES]
    parser = suite.argument_parser(__doc__, seeds=0, seeds_help="at most so many of each config; 0 = all")
    parser.add_argument("promises", nargs="*", metavar="CONFIG", help=f"of {', '.join(names)}; none = all")
    given = parser.parse_args()
    if unknown := set(given.promises) - set(names):
        parser.error(f"{', '.join(sorted(unknown))}: no such promise; choose from {', '.join(names)}.")
    figures: dict[str, Any] = {}
    bars: list[record.Bar] = []
    for promise in PROMISES:
        if given.promises and promise.variant.name not in given.promises:
            continue
        count = min(promise.seeds, given.seeds or promise.seeds)
        seeds = suite.run_seeds(promise.variant, count, given.data, given.base)
        figures[promise.variant.name] = suite.summary(seeds)
        bars += check(promise, seeds)
    return record.finish("_".join(["quality_promises", *given.promises]), figures, bars)


if __name__ == "__main__":
    sys.exit(main())
