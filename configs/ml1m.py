"""Next item on ML-1M (protocol A): the encoder of `ml1m_sasrec` with a memory of transitions.

    python -m jaxrec.train --config=configs/ml1m.py --workdir=runs/ml1m --config.data.path=DIR

where DIR holds the ML-1M events in the order of the SASRec file. python benchmarks/quality/ml1m.py trains three seeds
and checks them.
"""

import dataclasses

from configs import ml1m_sasrec
from jaxrec.config import TrainConfig
from jaxrec.models.memory import TransitionMemory


def get_config() -> TrainConfig:
    """`ml1m_sasrec` and the memory, with which fewer steps do."""
    base = ml1m_sasrec.get_config()
    memory = TransitionMemory(num_successors=128)
    model = dataclasses.replace(base.model, memory=memory)
    return dataclasses.replace(base, name="ml1m", model=model, num_train_steps=1500)
