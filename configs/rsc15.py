"""Next click in the sessions of YooChoose (RecSys 2015, the 100 thousand clicks sample), split by time.

    python -m jaxrec.train --config=configs/rsc15.py --workdir=runs/rsc15 --config.data.path=DIR

where DIR holds the sessions as users. Every click of a test session after its first is a target, given the clicks
before it; what was clicked may be clicked again. python benchmarks/quality/global_time.py trains three seeds and checks
them.
"""

import dataclasses
import os

from configs import amazon_beauty
from jaxrec.config import TrainConfig
from jaxrec.data.config import DataConfig, GlobalTime

LENGTH = 32


def get_config() -> TrainConfig:
    """The model of `amazon_beauty`, with the memory, for four clicks a session and items that come often."""
    base = amazon_beauty.get_config()
    encoder = dataclasses.replace(
        base.model.encoder,
        max_positions=LENGTH,
        dropout_rate=0.3,
        attention_dropout_rate=0.3,
        mlp_dropout_rate=0.3,
        embedding_dropout_rate=0.3,
    )
    return dataclasses.replace(
        base,
        name="rsc15",
        data=DataConfig(
            path=os.path.join(os.environ.get("JAXREC_DATA", "../shared/data"), "rsc15-100k"),
            split=GlobalTime(),
            filter_seen=False,
            history_length=LENGTH,
        ),
        model=dataclasses.replace(base.model, encoder=encoder),
        num_train_steps=1000,
        checkpoint_every_steps=250,
        evaluation=dataclasses.replace(base.evaluation, every_steps=250, ranking_events="all"),
    )
