"""The layers' own backward passes against automatic ones, and the attention against its definition."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.nn.attention import attend
from jaxrec.nn.dropout import dropout
from jaxrec.nn.layers import LayerNorm, affine, normalize, parameter
from jaxrec.nn.visibility import Visibility


def random_arrays(seed, *shapes):
    random = np.random.default_rng(seed)
    return tuple(jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes)


def assert_same_gradients(ours, plain, arrays, *, tolerance=1e-5):
    """Of a random weighted sum of the output, with respect to every array."""
    (weights,) = random_arrays(9, jax.eval_shape(plain, *arrays).shape)
    argnums = tuple(range(len(arrays)))
    got = jax.jit(jax.value_and_grad(lambda *a: jnp.sum(ours(*a) * weights), argnums))(*arrays)
    wanted = jax.jit(jax.value_and_grad(lambda *a: jnp.sum(plain(*a) * weights), argnums))(*arrays)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=tolerance * float(1 + jnp.abs(other).max()))


@settings(max_examples=8)
@given(
    lead=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    in_dim=st.integers(1, 6),
    out_dim=st.integers(1, 6),
)
def test_affine_equals_its_automatic_gradient(lead, in_dim, out_dim):
    arrays = random_arrays(0, (*lead, in_dim), (in_dim, out_dim), (out_dim,))
    assert_same_gradients(affine, lambda x, kernel, bias: x @ kernel + bias, arrays)


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 8), (4, 1)])
def test_normalize_equals_its_automatic_gradient(shape):
    def plain(x, scale, bias):
        mean, variance = jnp.mean(x, -1, keepdims=True), jnp.var(x, -1, keepdims=True)
        return (x - mean) / jnp.sqrt(variance + 1e-3) * scale + bias

    arrays = random_arrays(0, shape, shape[-1:], shape[-1:])
    assert_same_gradients(lambda *a: normalize(*a, 1e-3), plain, arrays)


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("num_queries", [6, 2])
def test_attend_equals_its_automatic_gradient(rate, num_queries):
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    last = None if num_queries == 6 else jnp.array([[2, 4], [5, 0]])
    mask = Visibility.of(segment_ids, causal=True, query_positions=last).mask
    key = jax.random.key(0)

    def plain(query, keys, values):
        scores = jnp.einsum("bhqk,bhlk->bhql", query, keys) / math.sqrt(query.shape[-1])
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("bhql,bhlk->bhqk", dropout(weights, rate, key), values)

    arrays = random_arrays(0, (2, 3, num_queries, 4), (2, 3, 6, 4), (2, 3, 6, 4))
    assert_same_gradients(lambda *a: attend(*a, mask, key, rate), plain, arrays)


def test_attention_survives_large_scores():
    query, keys, values = random_arrays(0, (1, 1, 3, 4), (1, 1, 3, 4), (1, 1, 3, 4))
    mask = Visibility.of(jnp.ones((1, 3), jnp.int32), causal=True).mask
    value, gradient = jax.value_and_grad(lambda q: jnp.sum(attend(q, keys * 1e4, values, mask)))(query * 1e4)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_who_sees_whom():
    segment_ids = jnp.array([[1, 1, 2, 0]])
    both = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], bool)
    np.testing.assert_array_equal(Visibility.of(segment_ids, causal=False).mask[0], both)
    np.testing.assert_array_equal(Visibility.of(segment_ids, causal=True).mask[0], np.tril(both))
    chosen = Visibility.of(segment_ids, causal=True, query_positions=jnp.array([[2, 0]]))
    np.testing.assert_array_equal(chosen.mask[0], np.tril(both)[[2, 0]])


def test_layer_norm_statistics_are_float32():
    layer = LayerNorm(64, 1e-12)
    x = 300.0 + jnp.asarray(np.random.default_rng(0).normal(size=(3, 64)), jnp.float32)
    narrow = x.astype(jnp.bfloat16)
    output = layer(narrow)
    assert output.dtype == jnp.bfloat16
    wanted = layer(narrow.astype(jnp.float32))
    np.testing.assert_allclose(output.astype(jnp.float32), wanted, rtol=0.01, atol=0.01)


def test_parameters_must_name_every_dim_by_a_known_name():
    with pytest.raises(ValueError, match="name every dim"):
        parameter(jnp.ones((2, 3)), "embed")
    with pytest.raises(ValueError, match="unknown logical axis 'embde'"):
        parameter(jnp.ones((2,)), "embde")
