"""Next item on ML-1M with a tenth of the items taken out of training: what the items table says of new items.

    python -m jaxrec.train --config=configs/ml1m_cold.py --workdir=runs/ml1m_cold --config.data.path=DIR

where DIR is laid out as docs/data.md says, with an items table. A new item is no negative of training, so that nothing
is learned of it; it gets its row from title, genres, abstract and year, by regression on the trained rows
(docs/new_items.md). python benchmarks/quality/cold_items.py trains five draws of the items and checks them. `by_text`
reads the same with a text encoder that is trained along (docs/text.md).
"""

import dataclasses
import os

from jaxrec.config import TrainConfig
from jaxrec.data.columns import ColumnMap
from jaxrec.data.config import ColdItems, DataConfig, TextConfig
from jaxrec.embedding.row_optimizer import Adam
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.models.item_text import TextTower
from jaxrec.models.new_items import RowRegression
from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.candidates import FullSoftmax
from jaxrec.tasks.item_similarity import ItemSimilarity
from jaxrec.tasks.next_item import NextItem
from jaxrec.training.optimizer import OptimizerConfig

LENGTH, MAX_TOKENS = 100, 64


def get_config() -> TrainConfig:
    """Some ten minutes on two cores."""
    return TrainConfig(
        name="ml1m_cold",
        data=DataConfig(
            path=os.path.join(os.environ.get("JAXREC_DATA", "../shared/data"), "ml-1m"),
            columns=ColumnMap(features=("year",)),
            history_length=LENGTH,
            cold_items=ColdItems(),
            text=TextConfig(max_tokens=MAX_TOKENS),
        ),
        model=TwoTowerConfig(
            encoder=EncoderConfig(
                embed_dim=64,
                num_layers=2,
                num_heads=2,
                mlp_dim=128,
                max_positions=LENGTH,
                norm_position="post",
                dropout_rate=0.2,
                attention_dropout_rate=0.2,
                mlp_dropout_rate=0.2,
                embedding_dropout_rate=0.2,
            ),
            item_dim=64,
            projection=False,
            item_bias=False,
            new_items=RowRegression(),
        ),
        tasks={"next_item": NextItem(candidates=FullSoftmax(new_items=False))},
        optimizer=OptimizerConfig(
            learning_rate=2e-3, warmup_steps=100, schedule="cosine", final_factor=0.05, ema_decay=0.995
        ),
        row_optimizer=Adam(learning_rate=2e-3),
        num_train_steps=2500,
        global_batch_size=64,
        checkpoint_every_steps=500,
        evaluation=EvaluationConfig(every_steps=500, cold_items=True, baselines=("popularity", "transition")),
    )


def by_text() -> TrainConfig:
    """By a text encoder that is trained along; in a step a third of the items are without their row.

    A step takes three times as long, and so there are fewer and smaller ones.
    """
    base = get_config()
    text = TextTower(
        encoder=EncoderConfig(
            embed_dim=64,
            num_layers=1,
            num_heads=2,
            mlp_dim=128,
            max_positions=MAX_TOKENS,
            vocab_size=30_522,
            type_vocab_size=1,
        ),
        trained_items=128,
        refresh_every_steps=100,
        id_dropout_rate=0.3,
    )
    return dataclasses.replace(
        base,
        name="ml1m_cold_text",
        model=dataclasses.replace(base.model, new_items=None, text=text),
        tasks=dict(base.tasks) | {"item_similarity": ItemSimilarity(weight=0.2)},
        num_train_steps=1000,
        global_batch_size=32,
        checkpoint_every_steps=250,
        evaluation=dataclasses.replace(base.evaluation, every_steps=250),
    )
