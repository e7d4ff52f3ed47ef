"""From one shop to another by text alone: trained on Amazon Beauty, asked on Amazon Industrial, whose items are new.

    python -m jaxrec.train --config=configs/text_transfer.py --workdir=runs/text_transfer

An item is its text alone in both stages (keywords there, titles here), so that encoder and projection fit any
catalogue. The second stage moves no parameter: its evaluation is that of the first one's model on the other shop.
`scratch` is the same without the first stage, `trained` learns on the second shop.
python benchmarks/quality/pretraining.py compares them.
"""

import dataclasses
import os

from jaxrec.config import Stage, TrainConfig
from jaxrec.data.columns import ColumnMap
from jaxrec.data.config import DataConfig, TextConfig
from jaxrec.embedding.row_optimizer import Adam
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.models.item_text import TextTower
from jaxrec.models.two_tower import Cosine, TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.candidates import InBatch
from jaxrec.tasks.item_similarity import ItemSimilarity
from jaxrec.tasks.next_item import NextItem
from jaxrec.training.optimizer import OptimizerConfig

MAX_TOKENS = 24
ITEMS_OF_A_STEP = 256


def get_config() -> TrainConfig:
    """Trained on Beauty, then asked on Industrial as it is."""
    base = scratch()
    source = Stage(
        data=_data("amazon14-beauty", ("keywords",)),
        optimizer=_optimizer(),
        num_train_steps=1500,
        evaluation=EvaluationConfig(every_steps=500),
    )
    return dataclasses.replace(base, name="text_transfer", stages={"source": source, "target": Stage()})


def trained() -> TrainConfig:
    """Learnt on Industrial itself, text alone too: how far the transfer stays behind."""
    return dataclasses.replace(
        scratch(),
        name="text_trained",
        optimizer=_optimizer(),
        num_train_steps=600,
        evaluation=EvaluationConfig(every_steps=100),
    )


def scratch() -> TrainConfig:
    """Random parameters on Industrial: one step that moves nothing but the mask vector, which next items never read."""
    return TrainConfig(
        name="text_scratch",
        data=_data("amazon18-industrial", ("title",)),
        model=TwoTowerConfig(
            encoder=EncoderConfig(
                embed_dim=64,
                num_layers=1,
                num_heads=2,
                mlp_dim=128,
                max_positions=20,
                dropout_rate=0.2,
                attention_dropout_rate=0.2,
                mlp_dropout_rate=0.2,
                embedding_dropout_rate=0.2,
            ),
            item_dim=64,
            projection=False,
            item_bias=False,
            cosine=Cosine(temperature=0.07),
            text=TextTower(
                encoder=EncoderConfig(
                    embed_dim=64,
                    num_layers=1,
                    num_heads=2,
                    mlp_dim=128,
                    max_positions=MAX_TOKENS,
                    vocab_size=30_522,
                    type_vocab_size=1,
                ),
                trained_items=ITEMS_OF_A_STEP,
                refresh_every_steps=100,
                id_dropout_rate=1.0,
            ),
        ),
        # In-batch negatives: of most items of the batch the text is then encoded with a gradient.
        tasks={
            "next_item": NextItem(candidates=InBatch()),
            "item_similarity": ItemSimilarity(weight=0.3),
        },
        optimizer=dataclasses.replace(_optimizer(), rates={"*": 0.0, "mask_vector": 1.0}),
        row_optimizer=Adam(learning_rate=1e-3),
        num_train_steps=1,
        global_batch_size=16,
        checkpoint_every_steps=100,
        evaluation=EvaluationConfig(every_steps=0),
    )


def _optimizer() -> OptimizerConfig:
    return OptimizerConfig(learning_rate=1e-3, warmup_steps=50, schedule="cosine", final_factor=0.05)


def _data(name: str, text: tuple[str, ...]) -> DataConfig:
    return DataConfig(
        path=os.path.join(os.environ.get("JAXREC_DATA", "../shared/data"), name),
        columns=ColumnMap(text=text),
        history_length=20,
        text=TextConfig(max_tokens=MAX_TOKENS),
    )
