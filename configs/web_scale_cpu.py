"""`web_scale` at a thousandth, really trained on one machine: 1 million items x 128 and 2 million users x 64, 1.04 GB.

    JAXREC_CPU_DEVICES=8 python -m jaxrec.train --config=configs/web_scale_cpu.py --workdir=runs/web_scale_cpu

About 2 minutes on 2 cores, the data included. They are synthetic; what it shows is that the run of the pod runs: the
loss falls from 13.8, the logarithm of a million, to about 11.2.
"""

import dataclasses

from configs import web_scale
from jaxrec.config import TrainConfig
from jaxrec.data.synthetic import SyntheticEvents
from jaxrec.losses.samplers import LogUniformSampler
from jaxrec.tasks.candidates import SampledSoftmax
from jaxrec.tasks.next_item import NextItem


def get_config() -> TrainConfig:
    """Every option of the pod's run, small sizes."""
    base = web_scale.get_config()
    encoder = dataclasses.replace(base.model.encoder, embed_dim=64, num_layers=3, num_heads=4, mlp_dim=256)
    return dataclasses.replace(
        base,
        name="web_scale_cpu",
        data=dataclasses.replace(
            base.data,
            source=SyntheticEvents(num_items=1_000_000, num_users=2_000_000, events_per_user=3.5),
            history_length=64,
        ),
        model=dataclasses.replace(base.model, encoder=encoder, item_dim=128, user_dim=64),
        tasks={"next_item": NextItem(candidates=SampledSoftmax(sampler=LogUniformSampler(num_samples=512)))},
        optimizer=dataclasses.replace(base.optimizer, learning_rate=1e-3, warmup_steps=50),
        num_train_steps=300,
        global_batch_size=64,
        log_every_steps=10,
        checkpoint_every_steps=100,
    )
