"""Next item in three Amazon shops at once (Beauty, Sports, Industrial): one encoder, one table, an adapter for each.

    python -m jaxrec.train --config=configs/amazon_domains.py --workdir=runs/domains

`without_adapters` shares the whole encoder. `beauty`, `sports` and `industrial` are one shop alone, for about as many
steps as the mixing gives it; python benchmarks/quality/domains.py trains and compares them.
"""

import dataclasses
import os

from configs import amazon_beauty
from jaxrec.config import TrainConfig
from jaxrec.data.domains import Domains

SHOPS = {"beauty": "amazon14-beauty", "sports": "amazon14-sports", "industrial": "amazon18-industrial"}
# Some 2,400, 3,500 and 250 packed rows, at temperature 2: the square roots share the steps.
STEPS = {"beauty": 2050, "sports": 2485, "industrial": 665}


def get_config() -> TrainConfig:
    """The model of `amazon_beauty` with an adapter for each shop; small shops come oftener than their size says."""
    base = amazon_beauty.get_config()
    steps = sum(STEPS.values())
    return dataclasses.replace(
        base,
        name="amazon_domains",
        data=dataclasses.replace(
            base.data,
            path="",
            source=Domains(paths={shop: _place(shop) for shop in SHOPS}),
            domain_temperature=2.0,
        ),
        model=dataclasses.replace(base.model, domain_adapters=16),
        num_train_steps=steps,
        checkpoint_every_steps=steps // 8,
        evaluation=dataclasses.replace(base.evaluation, every_steps=steps // 8),
    )


def without_adapters() -> TrainConfig:
    """The ablation: what is of a shop stands in the rows of its items alone."""
    base = get_config()
    return dataclasses.replace(base, model=dataclasses.replace(base.model, domain_adapters=0))


def beauty() -> TrainConfig:
    """Beauty alone."""
    return _alone("beauty")


def sports() -> TrainConfig:
    """Sports alone."""
    return _alone("sports")


def industrial() -> TrainConfig:
    """Industrial alone."""
    return _alone("industrial")


def _alone(shop: str) -> TrainConfig:
    base, steps = amazon_beauty.get_config(), STEPS[shop]
    return dataclasses.replace(
        base,
        name=f"amazon_domains_{shop}",
        data=dataclasses.replace(base.data, path=_place(shop)),
        num_train_steps=steps,
        checkpoint_every_steps=steps // 8,
        evaluation=dataclasses.replace(base.evaluation, every_steps=steps // 8),
    )


def _place(shop: str) -> str:
    return os.path.join(os.environ.get("JAXREC_DATA", "../shared/data"), SHOPS[shop])
