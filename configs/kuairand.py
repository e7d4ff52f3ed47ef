"""Behaviours on KuaiRand (kcore15): click, long view, profile entry and comment, learned together over one encoder.

    python -m jaxrec.train --config=configs/kuairand.py --workdir=runs/kuairand

The split is by time: the last tenth of the events is the test part, and every event of it is judged. Variants:
`mmoe`, `ple` (other heads), `esmm` (long view as a product over click), `single_click`, `single_long_view`,
`single_profile_enter`, `single_comment` (one behaviour alone), `second_stage` (long view learned where there was a
click). A minute each on two cores. Validation AUC of one seed: click .755, long view .735, profile entry .716, comment
.682, below those of counting a user's and an item's rates (.771, .754, .754, .709).
python benchmarks/quality/multitask.py trains all variants and compares them on the test part, where counting is above
all of them, too.
"""

import dataclasses
import os

from jaxrec.config import TrainConfig
from jaxrec.data.config import DataConfig, GlobalTime
from jaxrec.embedding.row_optimizer import Adam
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.nn.heads import PLE, Head, MMoE
from jaxrec.tasks.base import Task
from jaxrec.tasks.behaviour import Behaviour
from jaxrec.tasks.candidates import InBatch
from jaxrec.tasks.funnel import Funnel
from jaxrec.tasks.next_item import NextItem
from jaxrec.training.optimizer import OptimizerConfig

LEARNED = ("click", "long_view", "profile_enter", "comment")


def get_config() -> TrainConfig:
    """All four jointly. The next item is learned a little beside them, so that the run can recommend too."""
    return TrainConfig(
        name="kuairand",
        data=DataConfig(
            path=os.path.join(os.environ.get("JAXREC_DATA", "../shared/data"), "kuairand-kcore15"),
            split=GlobalTime(),
            history_length=100,
            windows="all",
        ),
        model=TwoTowerConfig(
            encoder=EncoderConfig(
                embed_dim=32,
                num_layers=2,
                num_heads=2,
                mlp_dim=64,
                max_positions=100,
                dropout_rate=0.4,
                attention_dropout_rate=0.2,
                mlp_dropout_rate=0.2,
                # 33 thousand events are learned by heart in a few passes with less.
                embedding_dropout_rate=0.5,
            ),
            item_dim=32,
            projection=False,
            item_bias=False,
            user_dim=32,
            time_gaps=True,
        ),
        tasks={
            # More of it, or negatives from outside of the batch, costs the behaviours a point and more of AUC.
            "next_item": NextItem(weight=0.01, candidates=InBatch()),
            "behaviour": Behaviour(behaviours=LEARNED),
        },
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_steps=50, schedule="cosine", final_factor=0.05, weight_decay=0.01
        ),
        # A user's rows are in few batches, so they move fast, and items have few events, so they are drawn to 0.
        row_optimizer=Adam(learning_rate=3e-2, weight_decay=5.0),
        num_train_steps=400,
        global_batch_size=16,
        checkpoint_every_steps=200,
        evaluation=EvaluationConfig(behaviour_events="all", baselines=("popularity", "transition")),
    )


def mmoe() -> TrainConfig:
    """A gate a behaviour over four shared experts."""
    return _with_head("mmoe", MMoE(num_experts=4, expert_dim=16))


def ple() -> TrainConfig:
    """Two levels of two shared experts and one of each behaviour."""
    return _with_head("ple", PLE(num_layers=2, shared_experts=2, own_experts=1, expert_dim=16))


def esmm() -> TrainConfig:
    """Long view is the product of click and of long view given click; the other two as they were."""
    rest = Behaviour(behaviours=("profile_enter", "comment"))
    return _with_tasks("esmm", behaviour=rest, funnel=Funnel(first="click", second="long_view"))


def single_click() -> TrainConfig:
    """Click alone."""
    return _with_tasks("single_click", behaviour=Behaviour(behaviours=("click",)))


def single_long_view() -> TrainConfig:
    """Long view alone."""
    return _with_tasks("single_long_view", behaviour=Behaviour(behaviours=("long_view",)))


def single_profile_enter() -> TrainConfig:
    """Profile entry alone."""
    return _with_tasks("single_profile_enter", behaviour=Behaviour(behaviours=("profile_enter",)))


def single_comment() -> TrainConfig:
    """Comment alone."""
    return _with_tasks("single_comment", behaviour=Behaviour(behaviours=("comment",)))


def second_stage() -> TrainConfig:
    """Long view alone, where there was a click: what a funnel is usually built from."""
    return _with_tasks("second_stage", behaviour=Behaviour(behaviours=("long_view",), given="click"))


def _with_head(name: str, head: Head) -> TrainConfig:
    base = get_config()
    return dataclasses.replace(
        base, name=f"kuairand_{name}", model=dataclasses.replace(base.model, head=head)
    )


def _with_tasks(name: str, **tasks: Task) -> TrainConfig:
    base = get_config()
    return dataclasses.replace(
        base, name=f"kuairand_{name}", tasks={"next_item": base.tasks["next_item"], **tasks}
    )
