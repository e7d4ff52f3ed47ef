"""A fifth of the training events falsified: does a loss that mistrusts targets lose less than one that believes them?

`configs/noisy.py` on ML-1M: each training event has a chance of .2 to get another item, drawn evenly from the
catalogue; validation and test are untouched. The setups are the plain softmax and those of `FullSoftmax(trust=...)`
that are named here; the robust one is that of the highest validation NDCG@10 under noise, in the mean of the seeds. It
is then trained without noise as well, and so is the plain one.

The bars: of the test NDCG@10 that the plain loss loses by the noise, the robust one loses at most half, and under noise
it is above the plain one by a paired test. What the robust one loses is counted from the better of the two clean
results, so that a loss which is bad without noise has nothing to gain. All setups that were tried are in the figures
and printed, whichever way it went.

    python benchmarks/quality/noise.py            # some 60 minutes on 2 quiet cores, as its config is sized for
    python benchmarks/quality/noise.py --seeds=1
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import suite
from suite import METRIC, Seed, Variant, record

MOST_LOST = 0.5  # of what the plain setup loses
DATA = "ml-1m-sasrec"
PLAIN = "plain"
TRUST = "tasks.next_item.candidates.trust"
SETUPS: Mapping[str, tuple[str, ...]] = {
    PLAIN: (),
    "smoothing_0.1": (f"{TRUST}.smoothing=0.1",),
    "power_0.2": (f"{TRUST}.power=0.2",),
    "power_0.4": (f"{TRUST}.power=0.4",),
}


def run_setup(name: str, noisy: bool, given: argparse.Namespace) -> list[Seed]:
    """Every seed of a setup, with noise or without; the noise is drawn by the seed, too."""
    overrides = (*SETUPS[name], *(("data.noisy_events.seed={seed}",) if noisy else ()))
    kind = "noisy" if noisy else "clean"
    config = "configs/noisy.py" if noisy else "configs/noisy.py:clean"
    return suite.run_variant(
        Variant(name=f"noise_{kind}-{name}", config=config, overrides=overrides, data=DATA), given
    )


def mean(seeds: Sequence[Seed]) -> float:
    """Of the test metric."""
    return statistics.mean(seed.metrics[METRIC] for seed in seeds)


def validation(seeds: Sequence[Seed]) -> float:
    """Of the validation metric of the states that were evaluated."""
    return statistics.mean(seed.figures["validation"] for seed in seeds)


def lost_share(clean: Mapping[str, float], noisy: Mapping[str, float], robust: str) -> float:
    """What the robust setup loses, over what the plain one does; NaN where the noise costs that one nothing."""
    lost = clean[PLAIN] - noisy[PLAIN]
    return (max(clean.values()) - noisy[robust]) / lost if lost > 0 else float("nan")


def main() -> int:
    """Trains what is missing, chooses, compares, checks."""
    parser = suite.argument_parser(__doc__, seeds=2, seeds_help="of each setup")
    suite.add_trial_arguments(parser)
    given = parser.parse_args()
    noisy = {name: run_setup(name, True, given) for name in SETUPS}
    robust = max((name for name in SETUPS if name != PLAIN), key=lambda name: validation(noisy[name]))
    clean = {name: run_setup(name, False, given) for name in (PLAIN, robust)}
    of_noisy, of_clean = ({name: mean(seeds) for name, seeds in part.items()} for part in (noisy, clean))
    share = lost_share(of_clean, of_noisy, robust)
    comparison = suite.compare_variants(noisy[PLAIN], noisy[robust])
    for name, value in of_noisy.items():
        without = f", without noise {of_clean[name]:.4f}" if name in of_clean else ""
        print(f"{name}: {METRIC} under noise {value:.4f} (validation {validation(noisy[name]):.4f}){without}")
    figures: dict[str, Any] = {
        "robust": robust,
        "noisy": of_noisy,
        "noisy_validation": {name: validation(seeds) for name, seeds in noisy.items()},
        "clean": of_clean,
        "lost": {name: of_clean[name] - of_noisy[name] for name in of_clean},
        "lost_share": share,
        "paired_under_noise": dataclasses.asdict(comparison),
        "runs": {name: suite.summary(seeds) for name, seeds in noisy.items()}
        | {f"{name}, clean": suite.summary(seeds) for name, seeds in clean.items()},
    }
    bars = [
        record.Bar(
            name=f"{robust}: loss by noise over that of plain", value=share, limit=MOST_LOST, at_most=True
        ),
        suite.paired_bar(f"{robust} above plain under noise", comparison),
    ]
    return record.finish("quality_noise", figures, bars, results=given.results)


if __name__ == "__main__":
    sys.exit(main())
