"""The run of an update: how it differs from the one that the updates began with."""

import dataclasses
import math
from pathlib import Path

from jaxrec.config import TrainConfig, override_run
from jaxrec.data.config import GlobalTime
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.pipeline import TrainingRows
from jaxrec.updating.options import UpdateOptions
from jaxrec.updating.snapshot import Plan

__all__ = ["next_config"]


def next_config(
    base: TrainConfig,
    dataset: PreparedDataset,
    plan: Plan,
    options: UpdateOptions,
    *,
    number: int,
    start: Path,
) -> TrainConfig:
    """The run of an update: that of `base` on the grown data, from the run in `start`, as long as the news are many.

    The rates warm up for a tenth of the steps and fall to nothing, and no averages are kept: these would hold on to the
    model that the run starts from.
    """
    assert dataset.directory is not None, "it was prepared"
    data = dataclasses.replace(
        base.data,
        path=str(dataset.directory.resolve()),
        source=None,
        split=GlobalTime(moments=(plan.cut, plan.cut)),
        cold_items=None,
        noisy_events=None,
        train_since=plan.since,
        replay_share=options.replay_share,
    )
    rows = TrainingRows.make(
        dataset,
        history_length=data.history_length,
        windows=data.windows,
        user_share=data.train_users,
        train_since=data.train_since,
        replay_share=data.replay_share,
        domain_temperature=data.domain_temperature,
    )
    steps = max(math.ceil(options.passes * sum(rows.mixing.turns) / base.global_batch_size), 1)
    config = dataclasses.replace(
        base,
        name=f"{base.name}-update-{number}",
        data=data,
        num_train_steps=steps,
        init_from=str(start),
        init_without=(),
        seed=(base.seed + number) % 2**31,
        optimizer=dataclasses.replace(
            base.optimizer, warmup_steps=steps // 10, schedule="cosine", final_factor=0.0, ema_decay=0.0
        ),
        evaluation=dataclasses.replace(base.evaluation, every_steps=0),
    )
    return override_run(config, options.overrides)
