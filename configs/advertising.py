"""Advertising on the Open Bandit data: the chance of a click on what is shown, by whom, where, and what it is.

    python -m jaxrec.train --config=configs/advertising.py --workdir=runs/advertising

where JAXREC_DATA holds open-bandit. The split is by time: the last fifth of the impressions is the test part, the
fifth before it calibrates. A minute on two cores, most of it compiling. Test AUC .497 with an interval of .421 to
.567: 54 clicks tell nothing, of the model or of the simple ones beside it (docs/scenarios/advertising.md).
"""

import os

from jaxrec.config import TrainConfig
from jaxrec.data.columns import ColumnMap
from jaxrec.data.config import DataConfig, GlobalTime
from jaxrec.data.open_bandit import OpenBandit
from jaxrec.embedding.row_optimizer import Adam
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.behaviour import Behaviour
from jaxrec.tasks.candidates import InBatch
from jaxrec.tasks.next_item import NextItem
from jaxrec.training.optimizer import OptimizerConfig

CONTEXT = (
    "position",
    "campaign",
    *(f"user_feature_{number}" for number in range(4)),
    *(f"item_feature_{number}" for number in range(1, 4)),
)


def get_config() -> TrainConfig:
    """Few clicks, so little is learned of any one thing: small vectors, much dropout, rows that are drawn to 0."""
    return TrainConfig(
        name="advertising",
        data=DataConfig(
            source=OpenBandit(
                directory=os.path.join(os.environ.get("JAXREC_DATA", "../shared/data"), "open-bandit")
            ),
            columns=ColumnMap(context=CONTEXT),
            split=GlobalTime(validation_quantile=0.6, test_quantile=0.8),
            filter_seen=False,
            history_length=64,
            windows="all",
        ),
        model=TwoTowerConfig(
            encoder=EncoderConfig(
                embed_dim=16,
                num_layers=1,
                num_heads=2,
                mlp_dim=32,
                max_positions=64,
                dropout_rate=0.3,
                embedding_dropout_rate=0.3,
            ),
            item_dim=16,
            projection=False,
            item_bias=False,
            context_rows=1024,
        ),
        tasks={
            "next_item": NextItem(
                weight=0.01, candidates=InBatch()
            ),  # what is shown next is the policy's choice
            "behaviour": Behaviour(behaviours=("click",)),
        },
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_steps=20, schedule="cosine", final_factor=0.05, weight_decay=0.1
        ),
        row_optimizer=Adam(learning_rate=1e-3, weight_decay=0.1),
        num_train_steps=200,
        global_batch_size=16,
        checkpoint_every_steps=100,
        evaluation=EvaluationConfig(
            behaviour_events="all",
            baselines=("popularity",),
            behaviour_baselines=("item_rate", "logistic_regression"),
        ),
    )
