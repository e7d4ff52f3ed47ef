"""Sampled softmax against the full softmax it stands for, and the samplers against their probabilities."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.core.partition import sharding
from jaxrec.losses.sampled import sampled_softmax
from jaxrec.losses.samplers import FrequencySampler, LogUniformSampler, Sampler, UniformSampler

NUM_ITEMS, DIM = 30, 4


def problem(num_targets=24, num_items=NUM_ITEMS, seed=0):
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(num_items + 1, DIM)).astype(np.float32)
    bias = random.normal(size=num_items + 1).astype(np.float32)
    queries = random.normal(size=(num_targets, DIM)).astype(np.float32)
    targets = random.integers(1, num_items + 1, num_targets).astype(np.int32)
    weights = random.integers(0, 3, num_targets).astype(np.float32)
    return tuple(map(jnp.asarray, (queries, vectors, bias, targets, weights)))


def full_twin(queries, vectors, bias, targets, weights):
    logits = (queries @ vectors.T + bias)[:, 1:]
    losses = -jax.nn.log_softmax(logits)[jnp.arange(len(targets)), targets - 1]
    return jnp.sum(weights * losses)


def sampled(queries, vectors, bias, targets, weights, negatives, log_q, **more):
    return sampled_softmax(
        queries, targets, vectors[targets], weights, negatives, vectors[negatives], log_q,
        target_bias=bias[targets], negative_bias=bias[negatives], **more,
    )  # fmt: skip


@pytest.mark.parametrize("chunk_logits", [10**9, 200, 1])
def test_with_every_item_as_negative_it_is_the_full_softmax(chunk_logits):
    queries, vectors, bias, targets, weights = problem()
    negatives = jnp.arange(1, NUM_ITEMS + 1)
    log_q = jnp.full(NUM_ITEMS, -jnp.log(NUM_ITEMS))

    def loss(queries, vectors, bias):
        arrays = queries, vectors, bias, targets, weights, negatives, log_q
        return sampled(*arrays, chunk_logits=chunk_logits)[0]

    value, gradients = jax.value_and_grad(loss, (0, 1, 2))(queries, vectors, bias)
    dense = jax.value_and_grad(full_twin, (0, 1, 2))
    expected, expected_gradients = dense(queries, vectors, bias, targets, weights)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted, atol=2e-5)


jitted = jax.jit(sampled, static_argnames="chunk_logits")


@pytest.mark.parametrize(
    ("num_targets", "num_negatives", "chunk_logits"), [(1, 1, 99), (7, 5, 99), (7, 5, 12), (4, 9, 1)]
)
@given(seed=st.integers(0, 999))
def test_equals_a_loop_over_targets_and_negatives(num_targets, num_negatives, chunk_logits, seed):
    queries, vectors, bias, targets, weights = problem(num_targets, seed=seed)
    random = np.random.default_rng(seed)
    negatives = random.integers(1, NUM_ITEMS + 1, num_negatives).astype(np.int32)
    mask = random.random(num_negatives) < 0.7
    log_q = np.log(random.random(num_negatives) + 0.01).astype(np.float32)
    wanted = 0.0
    for query, target, weight in zip(*map(np.asarray, (queries, targets, weights)), strict=True):
        score = (np.asarray(vectors) @ query + np.asarray(bias)).astype(np.float64)
        total = np.exp(score[target])
        for negative, real, log in zip(negatives, mask, log_q, strict=True):
            if real and negative != target:
                total += np.exp(score[negative]) / (np.exp(log) * mask.sum())
        wanted += weight * (np.log(total) - score[target])
    total, weight = jitted(
        queries, vectors, bias, targets, weights, jnp.asarray(negatives), jnp.asarray(log_q),
        negative_mask=jnp.asarray(mask), chunk_logits=chunk_logits,
    )  # fmt: skip
    np.testing.assert_allclose(total, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(weight, np.asarray(weights).sum())


@pytest.mark.parametrize("sampler", [UniformSampler(num_samples=40), LogUniformSampler(num_samples=40)])
def test_the_denominator_is_unbiased_and_converges(sampler):
    queries, vectors, bias, targets, _ = problem(3)
    weights = jnp.ones(3)
    scores = queries @ vectors.T + bias
    wanted = np.asarray(jax.nn.logsumexp(scores[:, 1:], axis=1) - scores[jnp.arange(3), targets])

    def ratio(key):  # denominator / e^target, of each target
        negatives = sampler.sample(key, NUM_ITEMS)
        log_q = sampler.log_q(negatives, NUM_ITEMS)

        def one(query, target):
            return sampled(query[None], vectors, bias, target[None], weights[:1], negatives, log_q)[0]

        return jnp.exp(jax.vmap(one)(queries, targets))

    ratios = np.asarray(jax.jit(jax.vmap(ratio))(jax.random.split(jax.random.key(0), 4000)))
    error = ratios.mean(0) - np.exp(wanted)
    assert np.all(np.abs(error) < 4 * ratios.std(0) / np.sqrt(len(ratios))), (error, ratios.std(0))


def test_a_corrected_target_moves_by_its_own_log_q():
    queries, vectors, bias, targets, weights = problem()
    negatives = jnp.arange(1, NUM_ITEMS + 1)
    log_q = jnp.log(jnp.arange(1, NUM_ITEMS + 1) / (NUM_ITEMS * (NUM_ITEMS + 1) / 2))
    corrected, _ = sampled(
        queries, vectors, bias, targets, weights, negatives, log_q, target_log_q=log_q[targets - 1]
    )
    # With every logit corrected alike, it is the softmax of the corrected logits.
    twin = full_twin(queries, vectors, bias - jnp.pad(log_q, (1, 0)), targets, weights)
    np.testing.assert_allclose(corrected, twin, rtol=1e-5)


def test_a_target_without_negatives_has_no_loss_and_no_gradient():
    queries, vectors, bias, _, _ = problem(2)
    targets, weights = jnp.array([3, 3]), jnp.ones(2)
    negatives = jnp.array([3, 5])
    mask = jnp.array([True, False])

    def loss(queries):
        arrays = queries, vectors, bias, targets, weights, negatives, jnp.zeros(2)
        return sampled(*arrays, negative_mask=mask)[0]

    value, gradient = jax.value_and_grad(loss)(queries)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_weight_zero_leaves_a_target_out_even_when_it_is_not_finite():
    queries, vectors, bias, targets, _ = problem(3)
    weights = jnp.array([1.0, 0.0, 2.0])
    negatives, log_q = jnp.arange(1, 9), jnp.full(8, -2.0)
    wanted, _ = sampled(queries, vectors, bias, targets, weights, negatives, log_q)
    moved, weight = sampled(queries.at[1].set(jnp.inf), vectors, bias, targets, weights, negatives, log_q)
    np.testing.assert_allclose(moved, wanted)
    assert weight == 3.0


@pytest.mark.parametrize("chunk_logits", [10**9, 100])
def test_every_mesh_gives_the_same_sum(mesh, chunk_logits):
    queries, vectors, bias, targets, weights = problem()
    negatives = UniformSampler(num_samples=16).sample(jax.random.key(0), NUM_ITEMS)
    log_q = UniformSampler().log_q(negatives, NUM_ITEMS)

    def loss(queries, targets, weights):
        arrays = queries, vectors, bias, targets, weights, negatives, log_q
        return sampled(*arrays, chunk_logits=chunk_logits)[0]

    split = jax.device_put((queries, targets, weights), sharding(mesh, "batch"))
    value, gradient = jax.jit(jax.value_and_grad(loss))(*split)
    expected, expected_gradient = jax.jit(jax.value_and_grad(loss))(queries, targets, weights)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)


@pytest.mark.parametrize("num_targets", [800, 803])
def test_no_device_gathers_the_targets_of_others(mesh, num_targets):
    """Where chunks do not divide a device's share, the compiler's own partitioning gathers every target."""
    queries, vectors, bias, targets, weights = problem(num_targets)
    negatives, log_q = jnp.arange(1, 17), jnp.full(16, -3.0)

    def gradients(chunk_logits):
        def loss(queries, vectors):
            arrays = queries, vectors, bias, targets, weights, negatives, log_q
            return sampled(*arrays, chunk_logits=chunk_logits)[0]

        return jax.jit(jax.value_and_grad(loss, (0, 1)))

    chunked = gradients(16 * 7)
    if num_targets % mesh.size == 0:
        split = jax.ShapeDtypeStruct(queries.shape, queries.dtype, sharding=sharding(mesh, "batch"))
        text = chunked.lower(split, vectors).compile().as_text()
        assert "all-reduce" in text and not re.findall(rf"\w+\[\d+,{DIM}\]\S* all-gather", text)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4),
        chunked(queries, vectors),
        gradients(10**9)(queries, vectors),
    )


def test_bfloat16_inputs_give_a_float32_loss():
    queries, vectors, bias, targets, weights = problem()
    narrow = sampled(
        queries.astype(jnp.bfloat16), vectors.astype(jnp.bfloat16), bias, targets, weights,
        jnp.arange(1, 20), jnp.full(19, -3.0),
    )[0]  # fmt: skip
    wide = sampled(queries, vectors, bias, targets, weights, jnp.arange(1, 20), jnp.full(19, -3.0))[0]
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, wide, rtol=0.02)


@pytest.mark.parametrize("sampler", [UniformSampler(), LogUniformSampler()])
@pytest.mark.parametrize("num_items", [1, 2, 4095, 8191, 8192, 8193, 99_999])
def test_probabilities_add_up_to_one(sampler, num_items):
    log_q = np.asarray(sampler.log_q(jnp.arange(1, num_items + 1), num_items), np.float64)
    np.testing.assert_allclose(np.exp(log_q).sum(), 1.0, rtol=1e-4)


@pytest.mark.parametrize("num_items", [1, 7, 50, 20_000])
@pytest.mark.parametrize("kind", [UniformSampler, LogUniformSampler])
def test_draws_follow_the_stated_probabilities(kind, num_items):
    sampler = kind(num_samples=400_000)
    ids = np.asarray(sampler.sample(jax.random.key(1), num_items))
    assert ids.dtype == np.int32 and ids.min() >= 1 and ids.max() <= num_items
    edges = np.unique(np.geomspace(1, num_items + 1, 12).astype(int))
    share = np.exp(np.asarray(sampler.log_q(jnp.arange(1, num_items + 1), num_items), np.float64))
    bins = np.searchsorted(edges, np.arange(1, num_items + 1), side="right")
    expected = np.bincount(bins, share) * len(ids)
    counts = np.bincount(np.searchsorted(edges, ids, side="right"), minlength=len(expected))
    assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected) + 1e-3 * expected + 1)


def test_large_catalogues_reach_every_id():
    num_items = 2**31 - 2
    ids = np.asarray(LogUniformSampler(num_samples=200_000).sample(jax.random.key(0), num_items))
    assert ids.min() == 1 and ids.max() <= num_items
    large = ids[ids > 2**28]
    assert len(np.unique(large)) > 0.99 * len(large)
    assert len(np.unique(large % 16)) == 16


def test_log_uniform_is_zipfs_law_where_blocks_are_single_ids():
    ids = np.arange(1, 5001)
    zipf = np.log(np.log1p(1 / ids) / np.log1p(5000))
    np.testing.assert_allclose(LogUniformSampler().log_q(jnp.asarray(ids), 5000), zipf, rtol=1e-4)


def test_a_sampler_without_samples_is_an_error():
    with pytest.raises(ValueError, match="num_samples=0"):
        UniformSampler(num_samples=0)


def test_the_base_sampler_says_what_is_missing():
    with pytest.raises(TypeError, match="Sampler must define sample"):
        Sampler().sample(jax.random.key(0), 3)
    with pytest.raises(TypeError, match="Sampler must define log_q"):
        Sampler().log_q(jnp.arange(3), 3)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60), st.sampled_from([0.0, 0.5, 0.75, 1.0]))
def test_frequency_probabilities_are_the_powers_of_the_counts(counts, power):
    item_counts = np.array([0, *counts])
    sampler = FrequencySampler(power=power)
    log_q = np.asarray(sampler.log_q(jnp.arange(1, len(counts) + 1), len(counts), item_counts), np.float64)
    wanted = np.maximum(counts, 1.0) ** power
    np.testing.assert_allclose(np.exp(log_q), wanted / wanted.sum(), rtol=2e-5, atol=1e-8)


def test_frequency_draws_follow_their_probabilities():
    item_counts = np.random.default_rng(0).zipf(1.5, 200).clip(max=5000)
    sampler = FrequencySampler(num_samples=400_000, power=0.75)
    ids = np.asarray(sampler.sample(jax.random.key(1), 199, item_counts))
    share = np.exp(np.asarray(sampler.log_q(jnp.arange(1, 200), 199, item_counts), np.float64))
    found = np.bincount(ids, minlength=200)[1:]
    expected = share * sampler.num_samples
    chi_squared = np.sum((found - expected) ** 2 / expected)
    assert chi_squared < 199 + 5 * (2 * 199) ** 0.5


def test_frequencies_need_a_count_for_each_item():
    with pytest.raises(ValueError, match="FrequencySampler got no counts for 3 items; pass one for each id"):
        FrequencySampler().sample(jax.random.key(0), 3)
    with pytest.raises(ValueError, match="got 3 counts for 3 items"):
        FrequencySampler().log_q(jnp.arange(1, 4), 3, np.ones(3))
