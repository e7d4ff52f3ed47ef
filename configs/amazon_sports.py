"""Next item on Amazon Sports (5-core, S3-Rec numbering): `amazon_beauty` on another shop.

    python -m jaxrec.train --config=configs/amazon_sports.py --workdir=runs/sports

The variants are those of `amazon_beauty`.
"""

import dataclasses
from pathlib import Path

from configs import amazon_beauty
from jaxrec.config import TrainConfig


def get_config() -> TrainConfig:
    """The same model; a third more events want a third more steps."""
    return _on_sports(amazon_beauty.get_config())


def without_memory() -> TrainConfig:
    """The ablation."""
    return _on_sports(amazon_beauty.without_memory())


def with_validation_item() -> TrainConfig:
    """Trained once more on all but the test item."""
    return _on_sports(amazon_beauty.with_validation_item())


def _on_sports(config: TrainConfig) -> TrainConfig:
    path = str(Path(config.data.path).with_name("amazon14-sports"))
    return dataclasses.replace(
        config,
        name="amazon_sports",
        data=dataclasses.replace(config.data, path=path),
        num_train_steps=config.num_train_steps * 3 // 2,
    )
