"""Funnels and second stages: the loss against its formula, the order of the probabilities, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.core.batch import Batch
from jaxrec.core.mesh import make_mesh
from jaxrec.embedding.engine import Exchange
from jaxrec.embedding.row_optimizer import Adam
from jaxrec.models.two_tower import Outputs, TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.nn.heads import MMoE
from jaxrec.tasks.base import DataFacts, Forward
from jaxrec.tasks.behaviour import Behaviour
from jaxrec.tasks.funnel import Funnel
from jaxrec.training.optimizer import OptimizerConfig
from jaxrec.training.setup import make_setup
from jaxrec.training.state import make_model

FACTS = DataFacts(
    name="toy", num_items=9, num_users=2, behaviours=("buy", "like", "click"), item_counts=np.ones(10)
)
FUNNEL = Funnel(first="click", second="buy")
SECOND_STAGE = Behaviour(behaviours=("buy",), given="click")
# Every pair of labels of (buy, click), at events of two histories that are not the first ones.
PAIRS = [(buy, click) for buy in (-1, 0, 1) for click in (-1, 0, 1)]
LENGTH = len(PAIRS) + 2


def make_batch():
    positions = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]], np.int32)
    labels = np.ones((1, LENGTH, 3), np.int8)
    labels[0, positions[0] > 0, 0], labels[0, positions[0] > 0, 2] = np.transpose(PAIRS)
    return Batch(
        item_ids=np.arange(LENGTH, dtype=np.int32)[None] % 9 + 1,
        user_ids=np.ones((1, LENGTH), np.int32),
        segment_ids=np.where(np.arange(LENGTH) < 5, 1, 2)[None].astype(np.int32),
        positions=positions,
        time_gaps=np.zeros((1, LENGTH), np.int32),
        times=np.zeros((1, LENGTH), np.int32),
        labels=labels,
        values=np.zeros((1, LENGTH), np.float32),
    )


def forward_of(batch, dtype="float32"):
    encoder = EncoderConfig(embed_dim=8, num_layers=1, mlp_dim=8, max_positions=LENGTH, dtype=dtype)
    model = make_model(
        TwoTowerConfig(encoder=encoder, item_dim=8, head=MMoE(expert_dim=8)), Outputs(num_behaviours=3), 0
    )
    events = 3.0 * jax.random.normal(jax.random.key(1), (1, LENGTH, 8))
    return Forward(model, batch, FACTS, events, None, None)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def cross_entropies(probability, labels):
    return -np.where(labels > 0, np.log(probability), np.log(1 - probability))


def test_the_loss_is_that_of_the_first_and_of_the_product_everywhere():
    batch = make_batch()
    plan, forward = FUNNEL.plan(batch, FACTS, jax.random.key(0)), forward_of(batch)
    total = FUNNEL.loss(forward, plan, jax.random.key(0)).total
    given, _, first = np.moveaxis(sigmoid(forward.behaviour_logits)[0], -1, 0)
    past = batch.positions[0] > 0
    buys, clicks = batch.labels[0, :, 0], batch.labels[0, :, 2]
    expected = cross_entropies(first, clicks)[past & (clicks >= 0)].sum()
    expected += cross_entropies(first * given, buys)[past & (buys >= 0)].sum()
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert float(plan.weight) == 12  # of the nine pairs six tell a click and six a buy
    rounded = FUNNEL.loss(forward_of(batch, "bfloat16"), plan, jax.random.key(0)).total
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, total, rtol=0.05)


def test_a_second_stage_learns_where_the_first_one_was():
    batch = make_batch()
    plan, forward = SECOND_STAGE.plan(batch, FACTS, jax.random.key(0)), forward_of(batch)
    total = SECOND_STAGE.loss(forward, plan, jax.random.key(0)).total
    clicked = (batch.positions[0] > 0) & (batch.labels[0, :, 2] == 1) & (batch.labels[0, :, 0] >= 0)
    losses = cross_entropies(sigmoid(forward.behaviour_logits)[0, :, 0], batch.labels[0, :, 0])
    np.testing.assert_allclose(total, losses[clicked].sum(), rtol=1e-5)
    assert float(plan.weight) == clicked.sum() == 2


def test_the_second_is_predicted_as_the_product_and_nothing_else_changes():
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 4, (50, 3)), jnp.float32)
    found = np.asarray(FUNNEL.predicted_logits(logits, FACTS))
    np.testing.assert_array_equal(found[:, 1:], logits[:, 1:])
    np.testing.assert_allclose(sigmoid(found[:, 0]), sigmoid(logits[:, 0]) * sigmoid(logits[:, 2]), rtol=1e-5)
    assert (found[:, 0] <= found[:, 2]).all()
    np.testing.assert_array_equal(SECOND_STAGE.predicted_logits(logits, FACTS), logits)


def test_what_is_asked_must_be_a_column():
    for task in (Funnel(first="click", second="share"), Behaviour(behaviours=("buy",), given="share")):
        name = type(task).__name__
        with pytest.raises(
            ValueError, match=f"task {name} asks for behaviour 'share', and dataset 'toy' has"
        ):
            task.check_data(FACTS)
        with pytest.raises(ValueError, match=f"task {name} needs behaviour labels"):
            task.check_data(dataclasses.replace(FACTS, behaviours=()))
    FUNNEL.check_data(FACTS)
    SECOND_STAGE.check_data(FACTS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Funnel(first="click", second="click"), "must be two behaviours"),
        (lambda: Behaviour(given="click"), "Behaviour.given='click' needs behaviours"),
        (lambda: Behaviour(behaviours=("click",), given="click"), "to name others than itself"),
    ],
)
def test_a_stage_that_is_its_own_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def check_together(**tasks):
    encoder = EncoderConfig(embed_dim=8, num_layers=1, mlp_dim=8)
    make_setup(
        facts=FACTS,
        mesh=make_mesh((1, 1), jax.devices()[:1]),
        model=TwoTowerConfig(encoder=encoder, item_dim=8),
        tasks=tasks,
        optimizer=OptimizerConfig(),
        row_optimizer=Adam(),
        exchange=Exchange(),
        num_train_steps=1,
        accumulation_steps=1,
        seed=0,
    )


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            Behaviour(),
            "task 'funnel' .Funnel. learns 'buy' given another behaviour, and task 'other' learns it",
        ),
        (Funnel(first="like", second="buy"), "learns 'buy' given another"),
        (Funnel(first="buy", second="like"), "leave it out of the behaviours of 'other'"),
        (SECOND_STAGE, "learns 'buy' given another"),
    ],
)
def test_a_column_has_one_meaning(other, message):
    with pytest.raises(ValueError, match=message):
        check_together(funnel=FUNNEL, other=other)
    check_together(funnel=FUNNEL, other=Behaviour(behaviours=("like", "click")))
