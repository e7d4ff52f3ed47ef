"""Which options of the model earn their place? One at a time against the same base, on ML-1M.

    python benchmarks/quality/ablation.py

The base is `configs/ml1m_sasrec.py` at width 64 with histories of 100 events and 1,000 steps. Each variant changes what
its name says and nothing else. Differences of the test NDCG@10 are paired over users, each user's metric averaged over
the seeds; p-values with Holm's correction over all variants. The gain on the validation targets stands beside them: a
default is chosen by that one. The only bar is that every variant has been measured.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import suite
from suite import METRIC, Seed, Variant, record

from jaxrec.evaluation.significance import holm

BASE = (
    "model.encoder.embed_dim=64",
    "model.encoder.mlp_dim=128",
    "model.encoder.max_positions=100",
    "model.item_dim=64",
    "data.history_length=100",
    "num_train_steps=1000",
    "evaluation.every_steps=250",
    "checkpoint_every_steps=250",
)
SAMPLED = "tasks.next_item.candidates=SampledSoftmax"
VARIANTS: dict[str, tuple[str, ...]] = {
    "base": (),
    "pre-norm": ("model.encoder.norm_position=pre",),
    "gated MLP of the same size": (
        "model.encoder.mlp=gated",
        "model.encoder.activation=silu",
        "model.encoder.mlp_dim=86",
    ),
    "rotary positions": ("model.encoder.positions=rotary",),
    "relative positions": ("model.encoder.positions=relative",),
    "no positions": ("model.encoder.positions=none",),
    "HSTU blocks": (
        "model.encoder.block=hstu",
        "model.encoder.activation=silu",
        "model.encoder.mlp_dim=64",
        "model.encoder.norm_position=pre",
        "model.encoder.positions=relative",
    ),
    "four blocks": ("model.encoder.num_layers=4",),
    "map W": ("model.projection=True",),
    "item biases": ("model.item_bias=True",),
    "output table": ("model.output_table=True",),
    "cosine, temperature .1": ("model.cosine=Cosine", "model.cosine.temperature=0.1"),
    "memory of transitions": ("model.memory=TransitionMemory", "model.memory.num_successors=128"),
    "256 sampled negatives": (SAMPLED, "tasks.next_item.candidates.sampler.num_samples=256"),
    "1,024 sampled negatives": (SAMPLED, "tasks.next_item.candidates.sampler.num_samples=1024"),
    "mixture of logits, 256 sampled negatives": (
        SAMPLED,
        "tasks.next_item.candidates.sampler.num_samples=256",
        "model.mixture=MixtureOfLogits",
    ),
    "label smoothing .1": ("tasks.next_item.candidates.trust.smoothing=0.1",),
}


def row(seeds: Sequence[Seed], base: Sequence[Seed]) -> dict[str, Any]:
    """What a variant gives, and what it gives more than the base."""
    comparison = suite.compare_variants(base, seeds)
    validation = [statistics.mean(seed.figures["validation"] for seed in some) for some in (base, seeds)]
    return suite.summary(seeds) | {
        "difference": comparison.difference,
        "interval": [comparison.low, comparison.high],
        "p_value": comparison.p_value,
        "validation": validation[1],
        "validation_gain": validation[1] - validation[0],
    }


def main() -> int:
    """Trains what is missing, compares."""
    parser = suite.argument_parser(__doc__)
    suite.add_trial_arguments(parser)
    given = parser.parse_args()
    seeds = {
        name: suite.run_variant(
            Variant(
                name="ablation-" + "_".join(name.replace(",", "").replace(".", "").lower().split()),
                config="configs/ml1m_sasrec.py",
                overrides=(*BASE, *changes),
                data="ml-1m-sasrec",
            ),
            given,
        )
        for name, changes in VARIANTS.items()
    }
    figures = {name: row(of_variant, seeds["base"]) for name, of_variant in seeds.items()}
    others = [name for name in figures if name != "base"]
    p_values = holm(np.array([figures[name]["p_value"] for name in others])).tolist()
    adjusted = dict(zip(others, p_values, strict=True))
    for name in sorted(others, key=lambda name: -figures[name]["validation_gain"]):
        found = figures[name]
        found["adjusted_p_value"] = adjusted[name]
        low, high = found["interval"]
        print(
            f"{name}: validation {found['validation_gain']:+.4f}, test {found['difference']:+.4f} "
            f"[{low:+.4f}, {high:+.4f}], p = {adjusted[name]:.4f}, {statistics.mean(found['train_minutes']):.1f} min"
        )
    bar = record.Bar(name=f"variants with a {METRIC}", value=len(figures), limit=len(VARIANTS))
    return record.finish("quality_ablation", figures, [bar], results=given.results)


if __name__ == "__main__":
    sys.exit(main())
