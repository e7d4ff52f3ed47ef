"""Does pre-training pay? ML-1M, where the labels of fine-tuning, the next items, are known of a tenth of the users.

    python -m jaxrec.train --config=configs/ml1m_pretrain.py --workdir=runs/ml1m_pretrain

Two stages: hidden items of all users, then next items of the tenth. `scratch` has the second stage alone,
`scratch_long` as many steps as both. All users are evaluated.
python benchmarks/quality/pretraining.py compares the three.
"""

import dataclasses

from configs import ml1m_sasrec
from jaxrec.config import Stage, TrainConfig
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.tasks.masked_item import MaskedItem
from jaxrec.tasks.next_item import NextItem

PRETRAIN_STEPS, FINETUNE_STEPS = 1500, 300
TENTH = 0.1


def get_config() -> TrainConfig:
    """Pre-trained, then fine-tuned."""
    base = _base("ml1m_pretrain", FINETUNE_STEPS)
    everyone = dataclasses.replace(base.data, train_users=1.0)
    pretrain = Stage(
        data=everyone,
        tasks={"masked_item": MaskedItem()},
        num_train_steps=PRETRAIN_STEPS,
        evaluation=EvaluationConfig(every_steps=500),
    )
    return dataclasses.replace(base, stages={"pretrain": pretrain, "finetune": Stage()})


def scratch() -> TrainConfig:
    """The budget of the fine-tuning, without what comes before it."""
    return _base("ml1m_scratch", FINETUNE_STEPS)


def scratch_long() -> TrainConfig:
    """The budget of both stages, all of it for the task that counts."""
    return _base("ml1m_scratch_long", PRETRAIN_STEPS + FINETUNE_STEPS)


def _base(name: str, steps: int) -> TrainConfig:
    base = ml1m_sasrec.get_config()
    encoder = dataclasses.replace(base.model.encoder, embed_dim=64, mlp_dim=128, max_positions=100)
    return dataclasses.replace(
        base,
        name=name,
        data=dataclasses.replace(base.data, history_length=100, train_users=TENTH),
        model=dataclasses.replace(base.model, encoder=encoder, item_dim=64),
        tasks={"next_item": NextItem()},
        num_train_steps=steps,
        checkpoint_every_steps=100,
        evaluation=EvaluationConfig(every_steps=100),
    )
