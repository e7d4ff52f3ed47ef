"""Query to item: the loss against a naive one, on every mesh; answers of the same query are no negatives."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.core.batch import Batch
from jaxrec.core.queries import TextQueries
from jaxrec.models.two_tower import ITEM
from jaxrec.tasks.base import DataFacts, Forward
from jaxrec.tasks.query_item import QueryItem

NUM_QUERIES, NUM_ITEMS, ROWS, LENGTH = 4, 6, 8, 3
QUERIES = TextQueries(
    token_ids=np.arange(1, 1 + NUM_QUERIES, dtype=np.int32)[:, None],
    query_ids=np.array([0, 0, 0, 1, 1, 2, 3], np.int32),
    item_ids=np.array([1, 2, 5, 2, 3, 4, 6], np.int32),
)
FACTS = DataFacts(
    name="toy", num_items=NUM_ITEMS, num_users=9, behaviours=(), item_counts=None, queries=QUERIES
)
TEXTS = np.random.default_rng(1).normal(size=(NUM_QUERIES + 1, 4)).astype(np.float32)
TEXTS /= np.linalg.norm(TEXTS, axis=1, keepdims=True)
MODEL = types.SimpleNamespace(
    candidate_vectors=lambda vectors: vectors,
    config=types.SimpleNamespace(scored_table=ITEM),
    text_queries=lambda tokens, key: jnp.asarray(TEXTS)[tokens[:, 0]],
)
NOTHING = np.zeros((ROWS, LENGTH), np.int32)
BATCH = Batch(
    item_ids=NOTHING, user_ids=NOTHING, segment_ids=NOTHING, positions=NOTHING, time_gaps=NOTHING, times=NOTHING,
    labels=np.zeros((ROWS, LENGTH, 0), np.int8), values=np.zeros((ROWS, LENGTH), np.float32),
)  # fmt: skip


def naive(query_ids, item_ids, vectors, temperature):
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    shares = np.bincount(QUERIES.item_ids, minlength=NUM_ITEMS + 1) / len(QUERIES.item_ids)
    log_draws = np.log(len(item_ids) - 1)
    total = 0.0
    for query, target in zip(query_ids, item_ids, strict=True):
        scores = unit @ TEXTS[query + 1] / temperature
        answers = QUERIES.item_ids[QUERIES.query_ids == query]
        others = [
            np.exp(scores[item] - np.log(shares[item]) - log_draws)
            for item in item_ids
            if item not in answers
        ]
        total -= scores[target] - np.log(np.exp(scores[target]) + sum(others))
    return total


def test_the_loss_is_the_naive_one_on_every_mesh(mesh):
    vectors = np.random.default_rng(0).normal(size=(NUM_ITEMS + 1, 4)).astype(np.float32)
    task = QueryItem(pairs_per_row=3, temperature=0.3)

    @jax.jit
    def loss(table, batch):
        plan = task.plan(batch, FACTS, jax.random.key(0))
        forward = Forward(MODEL, batch, FACTS, table[batch.item_ids], None, None)
        forward.rows = {ITEM: {"answers": table[plan.lookups["answers"]]}}
        return task.loss(forward, plan, jax.random.key(1)).total, plan

    total, plan = loss(jnp.asarray(vectors), jax.tree.map(jnp.asarray, BATCH))
    query_ids = np.asarray(plan.arrays["query_ids"]).ravel()
    item_ids = np.asarray(plan.lookups["answers"]).ravel()
    pairs = set(zip(QUERIES.query_ids.tolist(), QUERIES.item_ids.tolist(), strict=True))
    assert set(zip(query_ids.tolist(), item_ids.tolist(), strict=True)) == pairs, "24 draws show all seven"
    assert float(plan.weight) == ROWS * 3
    np.testing.assert_allclose(total, naive(query_ids, item_ids, vectors, 0.3), rtol=1e-5)


def test_bad_settings_and_data_without_queries_are_refused():
    with pytest.raises(ValueError, match="QueryItem.temperature=0"):
        QueryItem(temperature=0)
    with pytest.raises(ValueError, match="QueryItem.pairs_per_row=0"):
        QueryItem(pairs_per_row=0)
    facts = DataFacts(name="plan", num_items=6, num_users=9, behaviours=(), item_counts=None)
    with pytest.raises(ValueError, match="dataset 'plan' has none; name their table with data.queries"):
        QueryItem().check_data(facts)
