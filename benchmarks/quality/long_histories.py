"""What histories of 1,000 events give over 200, and what their compression costs and saves, on ML-1M.

    python benchmarks/quality/long_histories.py

`configs/ml1m_sasrec.py` at width 64 and 600 steps of about 12,800 events, three times: histories of 200 events, of
1,000 seen one by one, and of 1,000 of which the old ones are seen in groups. NDCG@10 over all users and over those with
more than 200 events before the target; events a second of training. The bars: every variant has been measured, and the
compressed one trains faster than the one that sees 1,000 events singly.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import suite
import training_runs
from suite import METRIC, Seed, Variant, record

from jaxrec.evaluation.significance import Comparison, paired_comparison
from jaxrec.metrics.ranking import per_user_metrics

LONG = 200  # events before the target
WIDTH = (
    "model.encoder.embed_dim=64",
    "model.encoder.mlp_dim=128",
    "model.item_dim=64",
    "num_train_steps=600",
    "evaluation.every_steps=200",
    "checkpoint_every_steps=200",
)
THOUSAND = ("data.history_length=1000", "model.encoder.max_positions=1000", "global_batch_size=13")
VARIANTS: dict[str, tuple[str, ...]] = {
    "200 events": (),
    "1000 events": (*THOUSAND, "model.encoder.attention=chunked"),
    "1000 events, old ones in groups": (
        *THOUSAND,
        "model.encoder.compression=HistoryCompression",
        "model.encoder.compression.recent=128",
        "model.encoder.compression.group=16",
    ),
}


def speed(workdir: Path) -> dict[str, Any]:
    """Events a second, the median over the reports of a run."""
    reports = [
        line["events_per_second"] for line in training_runs.metrics(workdir) if "events_per_second" in line
    ]
    return {"events_per_second": statistics.median(reports)}


def among(seeds: Sequence[Seed], users: np.ndarray) -> np.ndarray:
    """Each of these users' metric, averaged over the seeds."""
    means = np.mean([per_user_metrics(seed.ranks, (10,))[METRIC] for seed in seeds], axis=0)
    return means[np.isin(seeds[0].users, users)]


def shown(comparison: Comparison) -> dict[str, Any]:
    """A comparison as it is kept."""
    return dataclasses.asdict(comparison)


def main() -> int:
    """Trains what is missing, compares."""
    parser = suite.argument_parser(__doc__)
    suite.add_trial_arguments(parser)
    given = parser.parse_args()
    variants = {
        name: Variant(
            name="long-" + "_".join(name.replace(",", "").split()),
            config="configs/ml1m_sasrec.py",
            overrides=(*WIDTH, *changes),
            data="ml-1m-sasrec",
        )
        for name, changes in VARIANTS.items()
    }
    seeds = {name: suite.run_variant(variant, given, measure=speed) for name, variant in variants.items()}
    dataset = suite.prepared(suite.tried(variants["200 events"], given), 0, given)
    long = np.asarray(dataset.user_keys)[np.asarray(dataset.validation_end) > LONG]
    base, figures = seeds["200 events"], {}
    for name, of_variant in seeds.items():
        rate = statistics.median(seed.figures["events_per_second"] for seed in of_variant)
        figures[name] = suite.summary(of_variant) | {
            "events_per_second": rate,
            f"{METRIC}, more than {LONG} events": float(np.mean(among(of_variant, long))),
            "against 200 events": shown(suite.compare_variants(base, of_variant)),
            f"against 200 events, users with more than {LONG}": shown(
                paired_comparison(among(base, long), among(of_variant, long))
            ),
        }
        print(
            f"{name}: {METRIC} {figures[name][METRIC]['mean']:.4f}, of the {len(long):,} users with more than {LONG} "
            f"events {figures[name][f'{METRIC}, more than {LONG} events']:.4f}, {rate:,.0f} events/s"
        )
    rates = [figures[name]["events_per_second"] for name in list(VARIANTS)[1:]]
    bars = [
        record.Bar(name="variants with figures", value=len(figures), limit=len(VARIANTS)),
        record.Bar(
            name="compressed against 1,000 singly, events/s", value=rates[1] / rates[0], limit=1, strict=True
        ),
    ]
    return record.finish("quality_long_histories", figures, bars, results=given.results)


if __name__ == "__main__":
    sys.exit(main())
