"""Pre-train, then fine-tune, on MovieLens-latest-small (embedded): three stages, each from the one before.

python -m jaxrec.train --config=configs/pretrain_finetune.py --workdir=runs/pretrain_finetune

(1) self-supervised: hidden items, and views of a history told from those of others; (2) mixed: hidden items beside
the next ones and which films are liked; (3) fine-tuning: the next item alone, at lower rates, lower blocks slower.
"""

import dataclasses

from configs import quickstart
from jaxrec.config import Stage, TrainConfig
from jaxrec.embedding.row_optimizer import Adam
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.tasks.behaviour import Behaviour
from jaxrec.tasks.masked_item import MaskedItem
from jaxrec.tasks.next_item import NextItem
from jaxrec.tasks.sequence_contrast import SequenceContrast


def get_config() -> TrainConfig:
    """The model of the quickstart without its memory, which takes next items alone."""
    base = quickstart.get_config()
    return dataclasses.replace(
        base,
        name="pretrain_finetune",
        model=dataclasses.replace(base.model, memory=None),
        tasks={"next_item": NextItem()},
        num_train_steps=600,
        evaluation=EvaluationConfig(every_steps=300),
        stages={
            "pretrain": Stage(tasks={"masked_item": MaskedItem(), "contrast": SequenceContrast(weight=0.1)}),
            "mixed": Stage(
                tasks={
                    "next_item": NextItem(),
                    "masked_item": MaskedItem(),
                    "behaviour": Behaviour(weight=0.1),
                }
            ),
            "finetune": Stage(
                optimizer=dataclasses.replace(base.optimizer, learning_rate=1e-3, layer_decay=0.7),
                row_optimizer=Adam(learning_rate=1e-3),
            ),
        },
    )
