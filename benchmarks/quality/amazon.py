"""Amazon Beauty and Sports (5-core): the memory of transitions in the model against counting alone, and without it.

    python benchmarks/quality/amazon.py

Two protocols: trained on all but the last two events of a user, and with the validation item added back. The bars are
the transition counts of the same protocol and, on the first, SASRec with a sampled softmax (HR@10 / NDCG@10).
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import suite
from suite import METRIC, Variant, record

HITS = "hr@10"
MAIN, BACK, ABLATION = "get_config", "with_validation_item", "without_memory"
# data set -> protocol -> (HR@10, NDCG@10) that the mean of the seeds has to exceed
BARS = {
    "beauty": {MAIN: ((0.0862, 0.0536), (0.0921, 0.0531)), BACK: ((0.1007, 0.0627),)},
    "sports": {MAIN: ((0.0547, 0.0330), (0.0569, 0.0314)), BACK: ((0.0616, 0.0375),)},
}


def main() -> int:
    """Trains what is missing, compares, checks."""
    parser = suite.argument_parser(__doc__)
    suite.add_trial_arguments(parser)
    given = parser.parse_args()
    figures: dict[str, Any] = {}
    bars: list[record.Bar] = []
    for name, protocols in BARS.items():
        seeds = {}
        for kind in (MAIN, ABLATION, BACK):
            variant = Variant(
                name=f"amazon_{name}-{kind}",
                config=f"configs/amazon_{name}.py:{kind}",
                data=f"amazon14-{name}",
            )
            seeds[kind] = suite.run_variant(variant, given)
            figures[variant.name] = suite.summary(seeds[kind])
        for kind, limits in protocols.items():
            for hits, ndcg in limits:
                bars.append(suite.mean_bar(f"{name}, {kind}", seeds[kind], hits, HITS))
                bars.append(suite.mean_bar(f"{name}, {kind}", seeds[kind], ndcg, METRIC))
        comparison = suite.compare_variants(seeds[ABLATION], seeds[MAIN])
        bars.append(suite.paired_bar(f"{name}: with the memory against without", comparison))
        figures[f"{name}: with the memory against without"] = dataclasses.asdict(comparison)
    return record.finish("quality_amazon", figures, bars, results=given.results)


if __name__ == "__main__":
    sys.exit(main())
