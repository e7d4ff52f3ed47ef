"""Item similarity: the loss against a naive one, on every mesh."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.core.batch import Batch
from jaxrec.models.two_tower import ITEM
from jaxrec.tasks.base import DataFacts, Forward
from jaxrec.tasks.item_similarity import ItemSimilarity

# Two histories a row; an item follows itself; items are followers more than once.
IDS = np.array([[1, 2, 2, 3, 4, 1], [5, 6, 0, 0, 0, 0], [2, 3, 1, 4, 2, 6], [3, 4, 5, 1, 2, 0]] * 2, np.int32)
SEGMENTS = np.array(
    [[1, 1, 1, 1, 2, 2], [1, 1, 0, 0, 0, 0], [1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 0]] * 2, np.int32
)
COUNTS = np.array([0, 5, 9, 4, 2, 7, 1], np.float32)
FACTS = DataFacts(name="toy", num_items=6, num_users=9, behaviours=(), item_counts=COUNTS)
MODEL = types.SimpleNamespace(
    candidate_vectors=lambda vectors: vectors, config=types.SimpleNamespace(scored_table=ITEM)
)
NOTHING = np.zeros_like(IDS)
BATCH = Batch(
    item_ids=IDS, user_ids=NOTHING, segment_ids=SEGMENTS, positions=NOTHING, time_gaps=NOTHING, times=NOTHING,
    labels=np.zeros((*IDS.shape, 0), np.int8), values=np.zeros(IDS.shape, np.float32),
)  # fmt: skip


def naive(vectors, temperature):
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [
        (IDS[row, column], IDS[row, column + 1])
        for row, column in zip(
            *np.nonzero(SEGMENTS[:, :-1] * (SEGMENTS[:, :-1] == SEGMENTS[:, 1:])), strict=True
        )
        if IDS[row, column] != IDS[row, column + 1]
    ]
    total = 0.0
    for own, target in pairs:
        score = lambda item: unit[own] @ unit[item] / temperature  # noqa: B023, E731
        log_draws = np.log(len(pairs) - 1)
        others = [
            np.exp(score(item) - np.log(COUNTS[item] / COUNTS.sum()) - log_draws)
            for _, item in pairs
            if item not in (own, target)
        ]
        total -= score(target) - np.log(np.exp(score(target)) + sum(others))
    return total, len(pairs)


def test_the_loss_is_the_naive_one_on_every_mesh(mesh):
    vectors = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    task = ItemSimilarity(temperature=0.3)

    @jax.jit
    def loss(table, batch):
        plan = task.plan(batch, FACTS, jax.random.key(0))
        forward = Forward(MODEL, batch, FACTS, table[batch.item_ids], None, None)
        forward.rows = {ITEM: {"targets": table[plan.lookups["targets"]]}}
        return task.loss(forward, plan, jax.random.key(1)).total, plan.weight

    batch = jax.tree.map(jnp.asarray, BATCH)
    total, weight = loss(jnp.asarray(vectors), batch)
    wanted, count = naive(vectors, 0.3)
    assert float(weight) == count
    np.testing.assert_allclose(total, wanted, rtol=1e-5)


def test_bad_settings_and_data_without_counts_are_refused():
    with pytest.raises(ValueError, match="ItemSimilarity.temperature=0"):
        ItemSimilarity(temperature=0)
    facts = DataFacts(name="plan", num_items=6, num_users=9, behaviours=(), item_counts=None)
    with pytest.raises(ValueError, match="corrected by the items' counts"):
        ItemSimilarity().check_data(facts)
