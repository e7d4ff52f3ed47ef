"""Masked item (BERT4Rec) on ML-1M, protocol A: bidirectional encoder, softmax at the hidden positions only.

    python -m jaxrec.train --config=configs/ml1m_bert4rec.py --workdir=runs/ml1m_bert4rec --config.data.path=DIR

DIR holds the ML-1M events in the order of the SASRec file. About half an hour on two cores; test NDCG@10 .155,
HR@10 .280 (benchmarks/results/quality-ml1m_bert4rec.json).
"""

import dataclasses

from configs import ml1m_sasrec
from jaxrec.config import TrainConfig
from jaxrec.embedding.row_optimizer import Adam
from jaxrec.tasks.masked_item import MaskedItem


def get_config() -> TrainConfig:
    """The data and the training of `ml1m_sasrec`, the objective of BERT4Rec."""
    base = ml1m_sasrec.get_config()
    # Few targets a pass make it slow to fit: it wants less dropout and longer steps.
    encoder = dataclasses.replace(
        base.model.encoder,
        dropout_rate=0.1,
        attention_dropout_rate=0.1,
        mlp_dropout_rate=0.1,
        embedding_dropout_rate=0.1,
    )
    return dataclasses.replace(
        base,
        name="ml1m_bert4rec",
        model=dataclasses.replace(base.model, encoder=encoder, item_bias=True),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=2e-3),
        row_optimizer=Adam(learning_rate=2e-3),
        tasks={"masked_item": MaskedItem(mask_rate=0.3, last_item_rate=0.1)},
        num_train_steps=3200,
    )
