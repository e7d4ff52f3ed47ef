"""Every part once, in seconds: all tasks, a tiny encoder, the embedded data, 20 steps.

python -m jaxrec.train --config=configs/debug.py --workdir=runs/debug

Half a minute, most of it compilation; no metric is expected of it.
"""

from jaxrec.config import TrainConfig
from jaxrec.data.config import DataConfig
from jaxrec.embedding.row_optimizer import Adam
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.behaviour import Behaviour
from jaxrec.tasks.masked_item import MaskedItem
from jaxrec.tasks.next_item import NextItem
from jaxrec.training.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    """Not for quality."""
    return TrainConfig(
        name="debug",
        data=DataConfig(history_length=32),
        model=TwoTowerConfig(
            encoder=EncoderConfig(embed_dim=16, num_layers=2, num_heads=2, mlp_dim=32, max_positions=32),
            item_dim=8,
        ),
        tasks={
            "next_item": NextItem(),
            "masked_item": MaskedItem(weight=0.5),
            "behaviour": Behaviour(weight=0.1),
        },
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5, max_gradient_norm=1.0, ema_decay=0.9),
        row_optimizer=Adam(learning_rate=1e-2),
        num_train_steps=20,
        global_batch_size=16,
        log_every_steps=5,
        checkpoint_every_steps=5,
        evaluation=EvaluationConfig(every_steps=10, max_users=64, baselines=("popularity", "transition")),
    )
