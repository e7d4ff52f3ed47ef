"""Search on MovieLens-latest-small: a tag finds the films that bear it, among all 9,724.

    python -m jaxrec.train --config=configs/search.py --workdir=runs/search

where JAXREC_DATA holds ml-latest-small with its tags.parquet. Variant: `alone` (without the next item, not measured).
Four minutes beside other work on two cores. Validation NDCG@10 over queries .053 (popularity .039, TF-IDF with the
training tags .035): docs/scenarios/search.md.
"""

import dataclasses
import os

from jaxrec.config import TrainConfig
from jaxrec.data.config import DataConfig, QueryConfig, TextConfig
from jaxrec.embedding.row_optimizer import Adam
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.models.item_text import TextTower
from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.candidates import InBatch
from jaxrec.tasks.next_item import NextItem
from jaxrec.tasks.query_item import QueryItem
from jaxrec.training.optimizer import OptimizerConfig

MAX_TOKENS = 24  # of an item: a title and its genres


def get_config() -> TrainConfig:
    """Tags beside the next item, which tells films apart that no tag names."""
    return TrainConfig(
        name="search",
        data=DataConfig(
            path=os.path.join(os.environ.get("JAXREC_DATA", "../shared/data"), "ml-latest-small"),
            history_length=64,
            windows="all",
            text=TextConfig(max_tokens=MAX_TOKENS),
            queries=QueryConfig(file="tags.parquet", text="tag"),
        ),
        model=TwoTowerConfig(
            encoder=EncoderConfig(
                embed_dim=64, num_layers=1, num_heads=2, mlp_dim=128, max_positions=64, dropout_rate=0.2
            ),
            item_dim=64,
            projection=False,
            item_bias=False,
            text=TextTower(
                encoder=EncoderConfig(
                    embed_dim=64,
                    num_layers=1,
                    num_heads=2,
                    mlp_dim=128,
                    max_positions=MAX_TOKENS,
                    vocab_size=30_522,
                    type_vocab_size=1,
                    dropout_rate=0.2,
                ),
                trained_items=128,
                refresh_every_steps=100,
            ),
        ),
        tasks={"next_item": NextItem(candidates=InBatch()), "search": QueryItem(pairs_per_row=16)},
        optimizer=OptimizerConfig(
            learning_rate=2e-3, warmup_steps=50, schedule="cosine", final_factor=0.05, weight_decay=0.01
        ),
        row_optimizer=Adam(learning_rate=2e-3),
        num_train_steps=800,
        global_batch_size=8,
        checkpoint_every_steps=400,
        evaluation=EvaluationConfig(baselines=("popularity", "transition")),
    )


def alone() -> TrainConfig:
    """Tags alone: the next item is learned too little to matter, and is there to recommend by."""
    base = get_config()
    tasks = {**base.tasks, "next_item": NextItem(weight=1e-6, candidates=InBatch())}
    return dataclasses.replace(base, name="search_alone", tasks=tasks)
