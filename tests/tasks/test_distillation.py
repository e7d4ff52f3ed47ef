"""Distillation: the loss against a naive one on every mesh, nothing where the student is its teacher, the checks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.core.batch import Batch
from jaxrec.losses.samplers import UniformSampler
from jaxrec.models.teacher import Teacher
from jaxrec.models.two_tower import ITEM, ITEM_BIAS, Outputs, TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.base import DataFacts, Forward
from jaxrec.tasks.distillation import SAMPLE, Distillation
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
    drawn = plan.shared_lookups[SAMPLE]
    forward.rows = {name: {SAMPLE: jnp.asarray(rows)[drawn]} for name, rows in tables.items()}
    return task.loss(forward, plan, jax.random.key(4)).total, plan


def test_the_loss_is_the_naive_one_on_every_mesh(mesh):
    task, known = Distillation(temperature=2.0, sampler=UniformSampler(num_samples=7)), facts()
    model, tables = tower(0, 8)
    total, plan = jax.jit(lambda: loss_of(task, model, tables, known))()
    drawn, log_softmax = np.asarray(plan.shared_lookups[SAMPLE]), lambda x: x - np.log(np.exp(x).sum())
    sides = []
    for one, rows, over in ((known.teacher.model, known.teacher.tables, 0.5), (model, tables, 1.0)):
        queries = np.asarray(forward_of(one, rows, known).causal_queries())
        sides.append(queries @ rows[ITEM][drawn].T / over + rows[ITEM_BIAS][drawn, 0])
    expected = 0.0
    for row in range(ROWS):
        for column in (0, 1, 3):  # the last event of a history has no successor
            teacher, student = (log_softmax(side[row, column] / 2.0) for side in sides)
            expected += 4.0 * np.sum(np.exp(teacher) * (teacher - student))
    assert float(plan.weight) == 3 * ROWS
    np.testing.assert_allclose(total, expected, rtol=1e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    known = facts()
    task = Distillation(student_temperature=0.5, sampler=UniformSampler(num_samples=7))
    same, _ = loss_of(task, known.teacher.model, known.teacher.tables, known)
    other, _ = loss_of(task, *tower(2, 16), known)
    assert abs(float(same)) < 1e-4 < 0.1 < float(other)


def test_the_sample_stands_for_the_catalogue():
    """With every item drawn alike often the divergence is that over all items, however often that is."""
    known, (model, tables) = facts(), tower(0, 8)
    losses = [
        np.mean(
            [float(loss_of(Distillation(sampler=UniformSampler(num_samples=n)), model, tables, known)[0])]
        )
        for n in (2000, 4000)
    ]
    np.testing.assert_allclose(*losses, rtol=0.1)


def test_settings_and_a_missing_teacher_are_errors():
    for field, value in (("temperature", 0.0), ("student_temperature", -1.0)):
        with pytest.raises(ValueError, match=f"{field}={value} must be above 0"):
            Distillation(**{field: value})
    with pytest.raises(ValueError, match="num_samples=1 must be at least 2"):
        Distillation(sampler=UniformSampler(num_samples=1))
    lonely = dataclasses.replace(facts(), teacher=None)
    with pytest.raises(ValueError, match="teacher='runs/big' was not opened"):
        loss_of(Distillation(teacher="runs/big"), *tower(0, 8), lonely)
