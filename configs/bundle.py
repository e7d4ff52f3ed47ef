"""Slates on MovieLens-latest-small (embedded): ten films that are chosen together, for relevance and for diversity.

    python -m jaxrec.train --config=configs/bundle.py --workdir=runs/bundle
    python -m jaxrec.recommend --workdir=runs/bundle --slate=volume_1 --out=slates.parquet

The model is the quickstart's with a third of its steps: what is looked at here is how the sets are chosen. Five
minutes beside other work on two cores. What diversity costs: docs/scenarios/bundle.md.
"""

import dataclasses

from configs import quickstart
from jaxrec.config import TrainConfig
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.evaluation.slates import Coverage, Diversity, LogDeterminant, Slate

WEIGHTS = (0.03, 0.1, 0.3, 1.0)


def get_config() -> TrainConfig:
    """Sets of ten from the best hundred, at several weights of each diversity, and under a limit a genre."""
    slates = {"two_a_genre": Slate(weight=0.0, max_per_category=2)}
    diversities: dict[str, Diversity] = {"volume": LogDeterminant(), "genres": Coverage()}
    for name, diversity in diversities.items():
        slates |= {f"{name}_{weight:g}": Slate(diversity=diversity, weight=weight) for weight in WEIGHTS}
    base = quickstart.get_config()
    return dataclasses.replace(
        base,
        name="bundle",
        num_train_steps=400,
        evaluation=EvaluationConfig(baselines=("popularity", "transition"), slates=slates),
    )
