"""Next item on ML-1M (protocol A): causal encoder, full softmax over the catalogue.

    python -m jaxrec.train --config=configs/ml1m_sasrec.py --workdir=runs/ml1m_sasrec --config.data.path=DIR

where DIR holds the ML-1M events in the order of the SASRec file. About half an hour on two cores; test NDCG@10 .183,
HR@10 .315 (benchmarks/results/quality-ml1m_sasrec.json).
"""

import os

from jaxrec.config import TrainConfig
from jaxrec.data.config import DataConfig
from jaxrec.embedding.row_optimizer import Adam
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.next_item import NextItem
from jaxrec.training.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    """The proof of quality."""
    return TrainConfig(
        name="ml1m_sasrec",
        data=DataConfig(
            path=os.path.join(os.environ.get("JAXREC_DATA", "../shared/data"), "ml-1m-sasrec"),
            history_length=200,
        ),
        model=TwoTowerConfig(
            encoder=EncoderConfig(
                embed_dim=128,
                num_layers=2,
                num_heads=2,
                mlp_dim=256,
                max_positions=200,
                norm_position="post",
                dropout_rate=0.2,
                attention_dropout_rate=0.2,
                mlp_dropout_rate=0.2,
                embedding_dropout_rate=0.2,
            ),
            item_dim=128,
            projection=False,
            item_bias=False,
        ),
        tasks={"next_item": NextItem()},
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_steps=100, schedule="cosine", final_factor=0.05, ema_decay=0.998
        ),
        row_optimizer=Adam(learning_rate=1e-3),
        num_train_steps=2500,
        global_batch_size=64,
        checkpoint_every_steps=500,
        evaluation=EvaluationConfig(every_steps=500),
    )
