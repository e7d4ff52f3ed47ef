"""gBCE against a loop, on every mesh, and against what it promises: calibrated probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.core.partition import sharding
from jaxrec.losses.generalised_bce import generalised_bce
from jaxrec.tasks.candidates import SampledBinary

NUM_ITEMS, DIM = 30, 4


def problem(num_targets=24, num_negatives=9, seed=0):
    rng = np.random.default_rng(seed)
    vectors, bias = rng.normal(size=(NUM_ITEMS + 1, DIM)), rng.normal(size=NUM_ITEMS + 1)
    queries, targets = rng.normal(size=(num_targets, DIM)), rng.integers(1, NUM_ITEMS + 1, num_targets)
    weights, negatives = rng.integers(0, 3, num_targets), rng.integers(1, NUM_ITEMS + 1, num_negatives)
    floats = [jnp.asarray(x, jnp.float32) for x in (queries, vectors, bias, weights)]
    return *floats, jnp.asarray(targets, jnp.int32), jnp.asarray(negatives, jnp.int32)


def loss_of(queries, vectors, bias, weights, targets, negatives, **more):
    options = {"calibration": 0.75, "num_items": NUM_ITEMS} | more
    return generalised_bce(
        queries, targets, vectors[targets], weights, negatives, vectors[negatives],
        target_bias=bias[targets], negative_bias=bias[negatives], **options,
    )  # fmt: skip


jitted = jax.jit(loss_of, static_argnames=("calibration", "chunk_logits"))


@pytest.mark.parametrize(
    ("num_targets", "num_negatives", "chunk_logits"), [(1, 1, 99), (7, 5, 12), (4, 40, 1)]
)
@given(seed=st.integers(0, 999), calibration=st.sampled_from([0.0, 0.75, 1.0]))
def test_equals_a_loop_over_targets_and_negatives(
    num_targets, num_negatives, chunk_logits, seed, calibration
):
    arrays = problem(num_targets, num_negatives, seed)
    queries, vectors, bias, weights, targets, negatives = map(np.asarray, arrays)
    alpha = min(1.0, num_negatives / (NUM_ITEMS - 1))
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)  # as the paper writes it
    sigmoid = lambda x: 1 / (1 + np.exp(-np.float64(x)))  # noqa: E731
    wanted = 0.0
    for query, target, weight in zip(queries, targets, weights, strict=True):
        scores = vectors @ query + bias
        total = -beta * np.log(sigmoid(scores[target]))
        total -= sum(np.log(sigmoid(-scores[negative])) for negative in negatives if negative != target)
        wanted += weight * total / (num_negatives + 1)
    found, weight = jitted(*arrays, calibration=calibration, chunk_logits=chunk_logits)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(weight, weights.sum())


@pytest.mark.parametrize("chunk_logits", [10**9, 20])
def test_every_mesh_gives_the_same_value_and_gradient(mesh, chunk_logits):
    queries, *rest = problem()

    def loss(queries, vectors):
        return loss_of(queries, vectors, *rest[1:], chunk_logits=chunk_logits)[0]

    one = jax.value_and_grad(loss, (0, 1))(queries, rest[0])
    split = jax.device_put(queries, sharding(mesh, "batch"))
    other = jax.jit(jax.value_and_grad(loss, (0, 1)))(split, rest[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, other)


@pytest.mark.parametrize("calibration", [0.0, 1.0])
def test_only_the_calibrated_loss_learns_the_probability(calibration):
    """One query, one item that follows in a fifth of the cases: where is the minimum of the expected loss?"""
    probability, num_negatives = 0.2, 2
    share = num_negatives / (NUM_ITEMS - 1)
    beta = 1.0 - calibration * (1.0 - share)
    logits = np.linspace(-6, 6, 100_001)
    # As a target with chance p, and else among the draws with chance `share`.
    expected = probability * beta * np.log1p(np.exp(-logits)) + (1 - probability) * share * np.log1p(
        np.exp(logits)
    )
    best = 1 / (1 + np.exp(-logits[np.argmin(expected)]))
    assert best == pytest.approx(0.2, abs=1e-3) if calibration else best > 0.75
    # The same minimum by the loss itself.
    step = lambda logit, is_target: float(  # noqa: E731
        jitted(
            jnp.full((1, DIM), logit), jnp.eye(NUM_ITEMS + 1, DIM, -1), jnp.zeros(NUM_ITEMS + 1),
            jnp.ones(1), jnp.array([1 if is_target else 20]), jnp.array([20 if is_target else 1, 20]),
            calibration=calibration,
        )[0]
    )  # fmt: skip
    at = logits[np.argmin(expected)]
    slope = lambda is_target: (step(at + 0.01, is_target) - step(at - 0.01, is_target)) / 0.02  # noqa: E731
    balance = probability * slope(True) + (1 - probability) * share * slope(False)
    assert abs(balance) < 1e-3


def test_a_calibration_that_cannot_be_is_told():
    with pytest.raises(ValueError, match=r"calibration=1\.5 must lie in"):
        SampledBinary(calibration=1.5)
