"""In-batch softmax against a loop, its masks, and its correction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.core.partition import sharding
from jaxrec.losses.in_batch import in_batch_softmax, item_log_q


def problem(num_targets, num_items=6, dim=3, seed=0):
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(num_items + 1, dim)).astype(np.float32)
    queries = random.normal(size=(num_targets, dim)).astype(np.float32)
    targets = random.integers(1, num_items + 1, num_targets).astype(np.int32)
    weights = (random.random(num_targets) < 0.8).astype(np.float32)
    log_q = item_log_q(random.integers(1, 9, num_items + 1))
    return queries, vectors, targets, weights, log_q


jitted = jax.jit(in_batch_softmax, static_argnames="chunk_logits")


@pytest.mark.parametrize(("num_targets", "chunk_logits"), [(1, 99), (13, 999), (13, 30), (6, 1)])
@given(seed=st.integers(0, 999))
def test_equals_a_loop(num_targets, chunk_logits, seed):
    queries, vectors, targets, weights, log_q = problem(num_targets, seed=seed)
    bias = np.random.default_rng(seed).normal(size=len(vectors)).astype(np.float32)
    others = max(weights.sum() - 1, 1)
    wanted = 0.0
    for i in range(num_targets):
        scores = vectors[targets] @ queries[i] + bias[targets]
        total = np.exp(scores[i])
        for j in range(num_targets):
            if weights[j] and targets[j] != targets[i]:
                total += np.exp(scores[j] - log_q[targets[j]]) / others
        wanted += weights[i] * (np.log(total) - scores[i])
    total, weight = jitted(
        jnp.asarray(queries), jnp.asarray(targets), jnp.asarray(vectors[targets]), jnp.asarray(weights),
        jnp.asarray(log_q[targets]), target_bias=jnp.asarray(bias[targets]), chunk_logits=chunk_logits,
    )  # fmt: skip
    np.testing.assert_allclose(total, wanted, rtol=1e-4, atol=1e-4)
    assert weight == weights.sum()


def test_the_same_item_elsewhere_is_no_negative():
    queries, vectors = jnp.eye(3), jnp.eye(3)
    same = jnp.array([4, 4, 4])
    total, weight = in_batch_softmax(queries, same, vectors, jnp.ones(3), jnp.zeros(3))
    assert (total, weight) == (0.0, 3.0)


def test_padding_is_neither_target_nor_negative():
    queries, vectors, targets, _, log_q = problem(6)
    weights = np.array([1, 1, 1, 1, 0, 0], np.float32)
    arrays = [jnp.asarray(x) for x in (queries, targets, vectors[targets], weights, log_q[targets])]
    total = lambda vectors: in_batch_softmax(*arrays[:2], vectors, *arrays[3:])[0]  # noqa: E731
    value, gradient = jax.value_and_grad(total)(arrays[2])
    np.testing.assert_array_equal(gradient[4:], np.zeros_like(gradient[4:]))
    alone, _ = in_batch_softmax(*(x[:4] for x in arrays))
    np.testing.assert_allclose(value, alone, rtol=1e-6)


def test_converges_to_the_full_softmax_as_the_batch_grows():
    num_items, dim, num_targets = 12, 3, 20_000
    random = np.random.default_rng(0)
    vectors, query = random.normal(size=(num_items + 1, dim)), random.normal(size=dim)
    shares = random.dirichlet(np.ones(num_items))
    targets = random.choice(num_items, size=num_targets, p=shares) + 1
    log_q = np.log(np.concatenate([[1.0], shares]))
    weights = np.ones(num_targets, np.float32)
    arrays = [np.tile(query, (num_targets, 1)), vectors[targets], weights, log_q[targets]]
    query_rows, target_vectors, weights, target_log_q = (jnp.asarray(x, jnp.float32) for x in arrays)
    total, weight = in_batch_softmax(
        query_rows, jnp.asarray(targets), target_vectors, weights, target_log_q, chunk_logits=2_000_000
    )
    scores = vectors[1:] @ query
    full = np.log(np.exp(scores).sum()) - scores[targets - 1]
    np.testing.assert_allclose(float(total) / float(weight), full.mean(), rtol=0.02)


def test_every_mesh_gives_the_same_sum(mesh):
    queries, vectors, targets, weights, log_q = problem(32)
    arrays = tuple(jnp.asarray(x) for x in (queries, targets, vectors[targets], weights, log_q[targets]))

    def loss(*arrays):
        return in_batch_softmax(*arrays, chunk_logits=300)[0]

    value = jax.jit(loss)(*jax.device_put(arrays, sharding(mesh, "batch")))
    np.testing.assert_allclose(value, jax.jit(loss)(*arrays), rtol=1e-5)


def test_item_log_q_is_the_log_share_and_survives_unseen_items():
    np.testing.assert_allclose(
        item_log_q(np.array([0, 3, 1, 0]))[1:], np.log([3 / 5, 1 / 5, 1 / 5]), rtol=1e-6
    )
    with pytest.raises(ValueError, match=r"item_counts\[2\]=-1"):
        item_log_q(np.array([0, 3, -1]))
