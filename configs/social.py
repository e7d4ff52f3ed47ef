"""draft"""

import os

from jaxrec.config import TrainConfig
from jaxrec.data.config import DataConfig, GlobalTime
from jaxrec.data.social import MOMENTS, Social
from jaxrec.embedding.row_optimizer import Adam
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.masked_item import MaskedItem
from jaxrec.training.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="social",
        data=DataConfig(
            source=Social(
                path=os.path.join(os.environ.get("JAXREC_DATA", "../shared/data"), "lastfm-2k"),
                edges="friends.parquet",
            ),
            split=GlobalTime(moments=MOMENTS),
            history_length=192,
        ),
        model=TwoTowerConfig(
            encoder=EncoderConfig(
                embed_dim=64,
                num_layers=1,
                num_heads=2,
                mlp_dim=128,
                max_positions=192,
                positions="none",
                dropout_rate=0.2,
                embedding_dropout_rate=0.2,
            ),
            item_dim=64,
            projection=False,
        ),
        tasks={"masked_item": MaskedItem(mask_rate=0.3, last_item_rate=0.0)},
        optimizer=OptimizerConfig(
            learning_rate=2e-3, warmup_steps=50, schedule="cosine", final_factor=0.05, weight_decay=0.01
        ),
        row_optimizer=Adam(learning_rate=2e-3),
        num_train_steps=400,
        global_batch_size=16,
        checkpoint_every_steps=100,
        evaluation=EvaluationConfig(every_steps=100, baselines=("popularity", "item_knn", "ease")),
    )
