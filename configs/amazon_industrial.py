"""Next item on Amazon Industrial & Scientific (2018), a tenth of the items taken out of training: new products.

    python -m jaxrec.train --config=configs/amazon_industrial.py --workdir=runs/industrial --config.data.path=DIR

where DIR is laid out as docs/data.md says, with an items table. Seven events a user: title, description and brand say
most of it. python benchmarks/quality/cold_items.py trains five draws of the items and checks them.
"""

import dataclasses
import os

from configs import ml1m_cold
from jaxrec.config import TrainConfig
from jaxrec.data.columns import ColumnMap

LENGTH, DIM = 32, 256


def get_config() -> TrainConfig:
    """`ml1m_cold` for short histories: rows that start from what is written about the items, wide enough to hold it.

    Width and steps were chosen on draw 7 of the items, which is none of the five that are judged.
    """
    base = ml1m_cold.get_config()
    encoder = dataclasses.replace(
        base.model.encoder,
        embed_dim=DIM,
        num_heads=4,
        mlp_dim=2 * DIM,
        max_positions=LENGTH,
        dropout_rate=0.5,
        attention_dropout_rate=0.5,
        mlp_dropout_rate=0.5,
        embedding_dropout_rate=0.5,
    )
    return dataclasses.replace(
        base,
        name="amazon_industrial",
        data=dataclasses.replace(
            base.data,
            path=os.path.join(os.environ.get("JAXREC_DATA", "../shared/data"), "amazon18-industrial"),
            columns=ColumnMap(features=("brand",)),
            history_length=LENGTH,
        ),
        model=dataclasses.replace(base.model, encoder=encoder, item_dim=DIM, feature_init_scale=0.1),
        num_train_steps=400,
        checkpoint_every_steps=200,
        evaluation=dataclasses.replace(base.evaluation, every_steps=200),
    )
