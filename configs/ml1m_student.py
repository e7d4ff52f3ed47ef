"""A student of `ml1m_sasrec` with half its layers, on ML-1M (protocol A): alone, and taught by a trained run.

    python -m jaxrec.train --config=configs/ml1m_student.py --workdir=runs/student
    python -m jaxrec.train --config=configs/ml1m_student.py:distilled --workdir=runs/distilled \\
        --config.tasks.distillation.teacher=runs/ml1m_sasrec

`python benchmarks/quality/compress.py` holds the two against each other over three seeds.
"""

import dataclasses

from configs import ml1m_sasrec
from jaxrec.config import TrainConfig
from jaxrec.tasks.distillation import Distillation


def get_config() -> TrainConfig:
    """`ml1m_sasrec` with one layer in the place of two."""
    base = ml1m_sasrec.get_config()
    encoder = dataclasses.replace(base.model.encoder, num_layers=1)
    return dataclasses.replace(
        base, name="ml1m_student", model=dataclasses.replace(base.model, encoder=encoder)
    )


def distilled() -> TrainConfig:
    """The same with a teacher's scores beside the hard targets."""
    base = get_config()
    taught = Distillation(teacher="runs/ml1m_sasrec")
    return dataclasses.replace(base, name="ml1m_distilled", tasks={**base.tasks, "distillation": taught})
