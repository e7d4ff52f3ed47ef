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
    model = dataclasses.replace(base.model, memory=TransitionMemory(num_successors=128))
    # It is still learning when the time is over: rates that fall further end below (on validation targets).
    optimizer = dataclasses.replace(base.optimizer, final_factor=0.5)
    return dataclasses.replace(base, name="ml1m", model=model, optimizer=optimizer, num_train_steps=1500)
