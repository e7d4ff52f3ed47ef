"""Next item on Amazon Beauty (5-core, S3-Rec numbering) with a memory of transitions.

    python -m jaxrec.train --config=configs/amazon_beauty.py --workdir=runs/beauty

`without_memory` leaves the memory out; `with_validation_item` trains on the validation item too.
"""

import dataclasses
import os

from jaxrec.config import TrainConfig
from jaxrec.data.config import DataConfig, LeaveOneOut
from jaxrec.embedding.row_optimizer import Adam
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.models.memory import TransitionMemory
from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.next_item import NextItem
from jaxrec.training.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    """Short histories, 12 thousand items: strong dropout, and the memory for what counting knows."""
    return TrainConfig(
        name="amazon_beauty",
        data=DataConfig(
            path=os.path.join(os.environ.get("JAXREC_DATA", "../shared/data"), "amazon14-beauty"),
            history_length=64,
        ),
        model=TwoTowerConfig(
            encoder=EncoderConfig(
                embed_dim=64,
                num_layers=2,
                num_heads=2,
                mlp_dim=256,
                max_positions=64,
                norm_position="post",
                dropout_rate=0.5,
                attention_dropout_rate=0.5,
                mlp_dropout_rate=0.5,
                embedding_dropout_rate=0.5,
            ),
            item_dim=64,
            projection=False,
            item_bias=False,
            memory=TransitionMemory(num_successors=256),
        ),
        tasks={"next_item": NextItem()},
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_steps=100, schedule="cosine", final_factor=0.05, ema_decay=0.99
        ),
        row_optimizer=Adam(learning_rate=1e-3),
        num_train_steps=2000,
        global_batch_size=32,
        checkpoint_every_steps=500,
        evaluation=EvaluationConfig(every_steps=250),
    )


def without_memory() -> TrainConfig:
    """The ablation."""
    base = get_config()
    return dataclasses.replace(base, model=dataclasses.replace(base.model, memory=None))


def with_validation_item() -> TrainConfig:
    """Trained once more on all but the test item, for as long as validation said."""
    base = get_config()
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, split=LeaveOneOut(validation=False)),
        evaluation=dataclasses.replace(base.evaluation, every_steps=0),
    )
