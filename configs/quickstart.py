"""The quickstart: MovieLens-latest-small (embedded), next item with a memory of transitions and like prediction.

python -m jaxrec.train --config=configs/quickstart.py --workdir=runs/quickstart

Two to four minutes on two cores. Test NDCG@10 .077 (EASE .039, transition counts .076).
"""

from jaxrec.config import TrainConfig
from jaxrec.data.config import DataConfig
from jaxrec.embedding.row_optimizer import Adam
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.models.memory import TransitionMemory
from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.behaviour import Behaviour
from jaxrec.tasks.next_item import NextItem
from jaxrec.training.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    """Small batches: the set has 610 users only."""
    return TrainConfig(
        name="quickstart",
        data=DataConfig(history_length=128, windows="all"),
        model=TwoTowerConfig(
            encoder=EncoderConfig(
                embed_dim=64,
                num_layers=2,
                num_heads=2,
                mlp_dim=128,
                max_positions=128,
                norm_position="post",
                dropout_rate=0.2,
                attention_dropout_rate=0.2,
                mlp_dropout_rate=0.2,
                embedding_dropout_rate=0.2,
            ),
            item_dim=64,
            projection=False,
            item_bias=True,
            memory=TransitionMemory(num_successors=256, window=20, decay=0.8),
        ),
        tasks={"next_item": NextItem(), "behaviour": Behaviour(weight=0.1)},
        optimizer=OptimizerConfig(
            learning_rate=3e-3,
            warmup_steps=50,
            schedule="cosine",
            final_factor=0.05,
            weight_decay=0.01,
            ema_decay=0.99,
        ),
        row_optimizer=Adam(learning_rate=3e-3),
        num_train_steps=400,
        global_batch_size=8,
        checkpoint_every_steps=100,
        evaluation=EvaluationConfig(every_steps=100),
    )
