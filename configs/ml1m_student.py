"""A student of `ml1m_sasrec` with half its layers, on ML-1M (protocol A): alone, and taught by a trained run.

    python -m jaxrec.train --config=configs/ml1m_student.py --workdir=runs/student
    python -m jaxrec.train --config=configs/ml1m_student.py:distilled --workdir=runs/distilled

where `runs/ml1m_sasrec` holds the teacher; another one is named by `--config.init_from=DIR` and
`--config.tasks.distillation.teacher=DIR`. `python benchmarks/quality/compress.py` holds the two against each other over
three seeds.
"""

import dataclasses

from configs import ml1m_sasrec
from jaxrec.config import TrainConfig
from jaxrec.tasks.distillation import Distillation

TEACHER = "runs/ml1m_sasrec"


def get_config() -> TrainConfig:
    """`ml1m_sasrec` with one layer in the place of two."""
    base = ml1m_sasrec.get_config()
    encoder = dataclasses.replace(base.model.encoder, num_layers=1)
    return dataclasses.replace(
        base, name="ml1m_student", model=dataclasses.replace(base.model, encoder=encoder)
    )


def half_dropout() -> TrainConfig:
    """The student alone with the dropout of the taught one."""
    base = get_config()
    encoder = dataclasses.replace(
        base.model.encoder,
        dropout_rate=0.1,
        attention_dropout_rate=0.1,
        mlp_dropout_rate=0.1,
        embedding_dropout_rate=0.1,
    )
    return dataclasses.replace(base, model=dataclasses.replace(base.model, encoder=encoder))


def distilled() -> TrainConfig:
    """Starts with the teacher's rows and its first layer (Sanh et al., 2019), and learns its scores too.

    Soft targets keep it from learning by heart, so half the dropout does (chosen on validation targets).
    """
    base = half_dropout()
    tasks = {**base.tasks, "distillation": Distillation(teacher=TEACHER)}
    return dataclasses.replace(base, name="ml1m_distilled", tasks=tasks, init_from=TEACHER)
