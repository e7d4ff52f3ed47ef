"""Friends and artists on lastfm-2k: who one might know, what one might listen to through friends, and groups.

    python -m jaxrec.train --config=configs/social.py --workdir=runs/social

where JAXREC_DATA holds lastfm-2k. Variant: `without_friends` (histories hold no friends). Seven minutes beside other
work on two cores. Test NDCG@10 of friends .117 (Adamic-Adar .141, iALS .169), of artists .171 (item-kNN .174, iALS
.206): docs/scenarios/social.md.
"""

import dataclasses
import os

from jaxrec.config import TrainConfig
from jaxrec.data.config import DataConfig, GlobalTime
from jaxrec.data.social import MOMENTS, Social
from jaxrec.embedding.row_optimizer import Adam
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.evaluation.groups import Average, Fair, Group, LeastMisery, MostPleasure, Multiplicative
from jaxrec.losses.samplers import UniformSampler
from jaxrec.models.two_tower import Cosine, TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.candidates import Mixed
from jaxrec.tasks.masked_item import MaskedItem
from jaxrec.training.optimizer import OptimizerConfig


def source(*, friends_as_input: bool) -> Social:
    """Last.fm listeners and their friends."""
    return Social(
        path=os.path.join(os.environ.get("JAXREC_DATA", "../shared/data"), "lastfm-2k"),
        edges="friends.parquet",
        friends_as_input=friends_as_input,
    )


def get_config() -> TrainConfig:
    """Histories are sets: an encoder without positions fills in what is hidden, of either kind."""
    return TrainConfig(
        name="social",
        data=DataConfig(
            source=source(friends_as_input=True), split=GlobalTime(moments=MOMENTS), history_length=192
        ),
        model=TwoTowerConfig(
            encoder=EncoderConfig(
                embed_dim=64,
                num_layers=1,
                num_heads=2,
                mlp_dim=128,
                max_positions=192,
                positions="none",
                dropout_rate=0.2,
                embedding_dropout_rate=0.3,
            ),
            item_dim=64,
            projection=False,
            cosine=Cosine(temperature=0.1, learned=True),
            init_scale=0.1,
        ),
        tasks={
            "masked_item": MaskedItem(
                mask_rate=0.4, last_item_rate=0.0, candidates=Mixed(sampler=UniformSampler(num_samples=512))
            )
        },
        optimizer=OptimizerConfig(
            learning_rate=4e-3, warmup_steps=50, schedule="cosine", final_factor=0.05, weight_decay=0.01
        ),
        row_optimizer=Adam(learning_rate=4e-3),
        num_train_steps=1500,
        global_batch_size=16,
        checkpoint_every_steps=250,
        evaluation=EvaluationConfig(
            every_steps=250,
            list_length=20,
            baselines=("popularity", "item_knn", "ease", "ials"),
            groups={
                "average": Group(aggregation=Average()),
                "multiplicative": Group(aggregation=Multiplicative()),
                "least_misery": Group(aggregation=LeastMisery()),
                "most_pleasure": Group(aggregation=MostPleasure()),
                "fair": Group(aggregation=Fair()),
            },
        ),
    )


def without_friends() -> TrainConfig:
    """The same artists are asked for; no friend is in a history."""
    base = get_config()
    return dataclasses.replace(
        base,
        name="social_without_friends",
        data=dataclasses.replace(base.data, source=source(friends_as_input=False)),
    )
