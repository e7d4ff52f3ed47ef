"""Next item on ML-1M with a fifth of the training events falsified: what a model loses by events that say nothing.

    python -m jaxrec.train --config=configs/noisy.py --workdir=runs/noisy --config.data.path=DIR

where DIR holds the ML-1M events in the order of the SASRec file. A short run of a smaller `ml1m_sasrec`, made to be
compared with itself; `clean` leaves the data as they are. python benchmarks/quality/noise.py compares losses that
believe every target with losses that do not (docs/noise.md).
"""

import dataclasses

from configs import ml1m_sasrec
from jaxrec.config import TrainConfig
from jaxrec.data.config import NoisyEvents
from jaxrec.evaluation.config import EvaluationConfig

LENGTH = 100


def get_config() -> TrainConfig:
    """The plain loss."""
    base = ml1m_sasrec.get_config()
    encoder = dataclasses.replace(base.model.encoder, embed_dim=64, mlp_dim=128, max_positions=LENGTH)
    return dataclasses.replace(
        base,
        name="noisy",
        data=dataclasses.replace(base.data, history_length=LENGTH, noisy_events=NoisyEvents()),
        model=dataclasses.replace(base.model, encoder=encoder, item_dim=64),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=2e-3, ema_decay=0.99),
        row_optimizer=dataclasses.replace(base.row_optimizer, learning_rate=2e-3),
        num_train_steps=1000,
        checkpoint_every_steps=250,
        evaluation=EvaluationConfig(every_steps=250, baselines=("popularity", "transition")),
    )


def clean() -> TrainConfig:
    """The same without noise."""
    base = get_config()
    return dataclasses.replace(base, name="clean", data=dataclasses.replace(base.data, noisy_events=None))
