"""Next item on ML-1M split at one moment for all users: the model of `ml1m`, asked for every event of the last tenth.

    python -m jaxrec.train --config=configs/ml1m_time.py --workdir=runs/ml1m_time --config.data.path=DIR

where DIR holds all of ML-1M with the column `timestamp_est`: the exact time where it is known (54 %), and else one
between the user's known ones, by the order of the events. A time that is a little wrong moves an event across the
moment, but never changes the order of a history. python benchmarks/quality/global_time.py trains and checks it.
"""

import dataclasses
import os

from configs import ml1m
from jaxrec.config import TrainConfig
from jaxrec.data.columns import ColumnMap
from jaxrec.data.config import DataConfig, GlobalTime


def get_config() -> TrainConfig:
    """Validation asks a quarter of the users: every event is a target, and a target costs what a user costs."""
    base = ml1m.get_config()
    return dataclasses.replace(
        base,
        name="ml1m_time",
        data=DataConfig(
            path=os.path.join(os.environ.get("JAXREC_DATA", "../shared/data"), "ml-1m"),
            columns=ColumnMap(timestamp="timestamp_est"),
            split=GlobalTime(validation_quantile=0.85, test_quantile=0.9),
            history_length=base.data.history_length,
        ),
        evaluation=dataclasses.replace(base.evaluation, ranking_events="all", max_users=1500),
    )
