"""Three tasks jointly on ML-1M with ratings: next item, masked item, and whether the rating will be 4 or 5.

    python -m jaxrec.train --config=configs/ml1m_multitask.py --workdir=runs/ml1m_multitask --config.data.path=DIR

DIR is laid out as docs/data.md says and has a `rating` column; unknown ratings are left out of the loss.
"""

import dataclasses
import os

from configs import ml1m_sasrec
from jaxrec.config import TrainConfig
from jaxrec.data.config import DataConfig
from jaxrec.tasks.behaviour import Behaviour
from jaxrec.tasks.masked_item import MaskedItem
from jaxrec.tasks.next_item import NextItem


def get_config() -> TrainConfig:
    """The model of `ml1m_sasrec`, three heads wiser."""
    data = DataConfig(
        path=os.path.join(os.environ.get("JAXREC_DATA", "../shared/data"), "ml-1m"), history_length=200
    )
    return dataclasses.replace(
        ml1m_sasrec.get_config(),
        name="ml1m_multitask",
        data=data,
        tasks={
            "next_item": NextItem(),
            "masked_item": MaskedItem(weight=0.3),
            "behaviour": Behaviour(weight=0.3),
        },
    )
