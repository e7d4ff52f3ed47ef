"""Distillation: the loss against a naive one on every mesh, nothing where the student is its teacher, the checks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.core.batch import Batch
from jaxrec.embedding.table import from_logical
from jaxrec.losses.samplers import UniformSampler
from jaxrec.models.teacher import Teacher
from jaxrec.models.two_tower import ITEM, ITEM_BIAS, Outputs, TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.base import DataFacts, Forward
from jaxrec.tasks.distillation import SAMPLE, Distillation, asked_columns
from jaxrec.training.state import make_model

NUM_ITEMS, ROWS, LENGTH = 20, 8, 5
ITEM_IDS = np.random.default_rng(0).integers(1, NUM_ITEMS + 1, (ROWS, LENGTH)).astype(np.int32)
SEGMENTS = np.tile(np.array([1, 1, 1, 2, 2], np.int32), (ROWS, 1))
NOTHING = np.zeros((ROWS, LENGTH), np.int32)
BATCH = Batch(
    item_ids=ITEM_IDS, user_ids=NOTHING, segment_ids=SEGMENTS, time_gaps=NOTHING, times=NOTHING,
    positions=np.tile(np.array([0, 1, 2, 0, 1], np.int32), (ROWS, 1)),
    labels=np.zeros((ROWS, LENGTH, 0), np.int8), values=np.zeros((ROWS, LENGTH), np.float32),
)  # fmt: skip


def tower(seed, width):
    encoder = EncoderConfig(embed_dim=width, num_layers=1, num_heads=2, mlp_dim=8, max_positions=LENGTH)
    rng = np.random.default_rng(seed)
    tables = {
        ITEM: rng.normal(size=(NUM_ITEMS + 1, width)).astype(np.float32),
        ITEM_BIAS: rng.normal(size=(NUM_ITEMS + 1, 1)).astype(np.float32),
    }
    return make_model(TwoTowerConfig(encoder=encoder, item_dim=width), Outputs(), seed), tables


def facts(seed=1, width=16):
    model, tables = tower(seed, width)
    teacher = Teacher(model=model, tables=tables, temperature=0.5)
    return DataFacts(
        name="toy", num_items=NUM_ITEMS, num_users=9, behaviours=(), item_counts=None, teacher=teacher
    )


def forward_of(model, tables, known):
    return Forward(model, BATCH, known, jnp.asarray(tables[ITEM])[ITEM_IDS], None, None)


def loss_of(task, model, tables, known):
    forward = forward_of(model, tables, known)
    plan = task.plan(BATCH, known, jax.random.key(3))
    drawn = plan.shared_lookups.get(SAMPLE)
    if drawn is None:
        forward.catalogue = {
            name: from_logical(jnp.asarray(rows), NUM_ITEMS + 1) for name, rows in tables.items()
        }
    else:
        forward.rows = {name: {SAMPLE: jnp.asarray(rows)[drawn]} for name, rows in tables.items()}
    return task.loss(forward, plan, jax.random.key(4)).total, plan


@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("sampler", [None, UniformSampler(num_samples=7)])
def test_the_loss_is_the_naive_one_on_every_mesh(mesh, sampler, share):
    task, known = Distillation(temperature=2.0, sampler=sampler, events_share=share), facts()
    model, tables = tower(0, 8)
    total, plan = jax.jit(lambda: loss_of(task, model, tables, known))()
    log_softmax = lambda x: x - np.log(np.exp(x).sum())  # noqa: E731
    drawn = np.arange(1, NUM_ITEMS + 1) if sampler is None else np.asarray(plan.shared_lookups[SAMPLE])
    sides = []
    for one, rows, over in ((known.teacher.model, known.teacher.tables, 0.5), (model, tables, 1.0)):
        queries = np.asarray(forward_of(one, rows, known).causal_queries)
        sides.append(queries @ rows[ITEM][drawn].T / over + rows[ITEM_BIAS][drawn, 0])
    expected, asked = 0.0, 0
    for row in range(ROWS):
        for column in np.asarray(plan.arrays["columns"])[row]:
            if column not in (0, 1, 3):  # the last event of a history has no successor
                continue
            asked += 1
            teacher, student = (log_softmax(side[row, column] / 2.0) for side in sides)
            expected += 4.0 * np.sum(np.exp(teacher) * (teacher - student))
    assert float(plan.weight) == asked == 3 * ROWS  # three of five columns at .6: those that have one
    np.testing.assert_allclose(total, expected, rtol=1e-4)


def test_events_are_asked_alike_often_and_never_twice():
    weights = jnp.asarray([[1.0, 0, 1, 1, 1, 0, 1, 1]] * 400)
    asked = np.asarray(asked_columns(weights, 3, jax.random.key(0)))
    assert all(len(set(row)) == 3 for row in asked)
    counts = np.bincount(asked.ravel(), minlength=8)
    assert counts[[1, 5]].sum() == 0
    np.testing.assert_allclose(counts[[0, 2, 3, 4, 6, 7]], 200, atol=5 * np.sqrt(400 * 0.5 * 0.5))
    few = np.asarray(asked_columns(weights, 7, jax.random.key(0)))
    assert all({0, 2, 3, 4, 6, 7} <= set(row) for row in few)


@pytest.mark.parametrize("sampler", [None, UniformSampler(num_samples=7)])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(sampler, mesh):
    known = facts()
    task = Distillation(student_temperature=0.5, sampler=sampler)
    same, _ = loss_of(task, known.teacher.model, known.teacher.tables, known)
    other, _ = loss_of(task, *tower(2, 16), known)
    assert abs(float(same)) < 1e-4 < 0.1 < float(other)


def test_the_sample_stands_for_the_catalogue(mesh):
    """With every item drawn alike often the divergence is that over all items."""
    known, (model, tables) = facts(), tower(0, 8)
    full, sampled = (
        float(loss_of(Distillation(sampler=sampler, events_share=1.0), model, tables, known)[0])
        for sampler in (None, UniformSampler(num_samples=20_000))
    )
    np.testing.assert_allclose(sampled, full, rtol=0.1)


def test_settings_and_a_missing_teacher_are_errors():
    for field, value in (("temperature", 0.0), ("student_temperature", -1.0)):
        with pytest.raises(ValueError, match=f"{field}={value} must be above 0"):
            Distillation(**{field: value})
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"events_share={share} must lie in \(0, 1\]"):
            Distillation(events_share=share)
    with pytest.raises(ValueError, match="num_samples=1 must be at least 2"):
        Distillation(sampler=UniformSampler(num_samples=1))
    lonely = dataclasses.replace(facts(), teacher=None)
    with pytest.raises(ValueError, match="teacher='runs/big' was not opened"):
        loss_of(Distillation(teacher="runs/big"), *tower(0, 8), lonely)
