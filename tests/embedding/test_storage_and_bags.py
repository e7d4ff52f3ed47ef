"""Rounding, quantised rows and pooled bags."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.core.hashing import hashed_bits
from jaxrec.core.partition import sharding
from jaxrec.embedding.bags import pool_padded, pool_ragged
from jaxrec.embedding.storage import dequantize_rows, quantize_rows, round_stochastically

FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)


@given(FLOATS, st.integers(0, 2**32 - 1))
def test_rounding_goes_to_a_neighbour(value, bits):
    exact = np.float32(value)
    found = np.asarray(round_stochastically(jnp.full((1, 1), exact), jnp.full((1, 1), bits, jnp.uint32)))
    word = exact.view(np.uint32)
    down = np.uint32(word & np.uint32(0xFFFF0000)).view(np.float32)
    up = np.uint32((int(word) & 0xFFFF0000) + 0x10000 & 0xFFFFFFFF).view(np.float32)
    found = found.astype(np.float32)[0, 0]
    if np.isfinite(exact):
        assert np.isfinite(found) or not np.isfinite(np.float32(jnp.bfloat16(exact)))
        assert found in (down, up, np.float32(jnp.bfloat16(exact)))
    else:
        assert (np.isnan(found) and np.isnan(exact)) or found == exact


def test_rounding_keeps_the_mean():
    values = jnp.full((1, 100_000), 1.0 + 2.0**-9, jnp.float32)  # a quarter of the way to the next bfloat16
    rounded = round_stochastically(values, hashed_bits(jax.random.key(0), values.shape)).astype(jnp.float32)
    share = float(jnp.mean(rounded > 1.0))
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 100_000) ** 0.5


@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=1, max_size=8))
def test_int8_rows_are_off_by_half_a_step_at_most(rows):
    rows = np.array(rows, np.float32)
    found = np.asarray(dequantize_rows(quantize_rows(jnp.asarray(rows))))
    assert np.all(np.abs(found - rows) <= np.abs(rows).max(1, keepdims=True) / 127 * 0.501 + 1e-37)


BAGS = [[1.0, -2.0], [], [3.0, 4.0, -5.0], [6.0], [], [7.0, 7.0], [0.5], [2.0]]  # one row entry an id


@pytest.mark.parametrize("pooling", ["sum", "mean", "max"])
@pytest.mark.parametrize("weighted", [False, True])
def test_padded_and_ragged_bags_agree_with_numpy(mesh, pooling, weighted):
    rows = np.zeros((8, 3, 2), np.float32)
    weights = np.zeros((8, 3), np.float32)
    expected = np.zeros((8, 2), np.float32)
    for bag, values in enumerate(BAGS):
        vectors = np.stack([[value, value * value] for value in values]) if values else np.zeros((0, 2))
        scale = np.arange(1, len(values) + 1) / 2 if weighted else np.ones(len(values))
        rows[bag, : len(values)], weights[bag, : len(values)] = vectors, scale
        if len(values):
            total = (vectors * scale[:, None]).sum(0)
            expected[bag] = {"sum": total, "mean": total / scale.sum(), "max": vectors.max(0)}[pooling]
    np.testing.assert_allclose(pool_padded(rows, weights, pooling), expected, rtol=1e-6)

    # Ragged: one bag a device, three ids a device, the empty places without weight.
    split = sharding(mesh, "batch")
    flat = jax.device_put((rows.reshape(24, 2), np.zeros(24, np.int32), weights.reshape(24)), split)
    ragged = jax.jit(lambda r, b, w: pool_ragged(r, b, w, pooling, bags_a_device=1))
    np.testing.assert_allclose(ragged(*flat), expected, rtol=1e-6)


def test_pooling_has_the_gradient_of_its_formula():
    rows, weights = jnp.arange(12.0).reshape(2, 3, 2), jnp.array([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    gradient = jax.grad(lambda r: jnp.sum(pool_padded(r, weights, "mean")))(rows)
    np.testing.assert_allclose(gradient[0, :, 0], [1 / 3, 2 / 3, 0])
    assert np.isfinite(gradient).all() and not gradient[1].any()
    highest = jax.grad(lambda r: jnp.sum(pool_padded(r, weights, "max")))(rows)
    assert highest.sum() == 2 and not highest[1].any()
