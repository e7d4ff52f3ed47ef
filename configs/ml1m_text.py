"""Next item on ML-1M with the text of the films: title, genres and DBpedia abstract in the item tower.

    python -m jaxrec.train --config=configs/ml1m_text.py --workdir=runs/ml1m_text --config.data.path=DIR

where DIR is laid out as docs/data.md says, with an items table. Not yet trained to its end: no figures are known. The
events are all of ML-1M, those of items with fewer than five ratings too, and not the SASRec file that `ml1m` and
`ml1m_sasrec` are trained on: figures of the two do not compare.
"""

import dataclasses
import os

from configs import ml1m_sasrec
from jaxrec.config import TrainConfig
from jaxrec.data.config import DataConfig, TextConfig
from jaxrec.models.item_text import TextTower
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.item_similarity import ItemSimilarity
from jaxrec.tasks.masked_text import MaskedText
from jaxrec.tasks.next_item import NextItem

MAX_TOKENS = 64  # of an item: most abstracts are longer, and their first sentence says what a film is


def get_config() -> TrainConfig:
    """The user tower of `ml1m_sasrec` over items that are read."""
    base = ml1m_sasrec.get_config()
    text = TextTower(
        encoder=EncoderConfig(
            embed_dim=64,
            num_layers=2,
            num_heads=2,
            mlp_dim=256,
            max_positions=MAX_TOKENS,
            vocab_size=30_522,
            type_vocab_size=1,
        ),
        trained_items=128,
        refresh_every_steps=100,
        id_dropout_rate=0.1,
        masked_head=True,
    )
    return dataclasses.replace(
        base,
        name="ml1m_text",
        data=DataConfig(
            path=os.path.join(os.environ.get("JAXREC_DATA", "../shared/data"), "ml-1m"),
            history_length=200,
            text=TextConfig(max_tokens=MAX_TOKENS),
        ),
        model=dataclasses.replace(base.model, text=text),
        tasks={
            "next_item": NextItem(),
            "masked_text": MaskedText(weight=0.1),
            "item_similarity": ItemSimilarity(weight=0.1),
        },
    )
