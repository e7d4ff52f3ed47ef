"""What the losses over sharded rows are tested by: rows in physical order and back, and the comparison with a twin."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.core.partition import sharding
from jaxrec.embedding.table import from_logical, to_logical


def in_physical_order(bias):
    return jax.jit(lambda b: from_logical(b, len(bias)))(jnp.pad(bias, (0, -len(bias) % 1024)))


def in_logical_order(array, num_rows):
    return np.asarray(jax.jit(lambda t: to_logical(t, num_rows))(array))[:num_rows]


def assert_equal_to_twin(loss, twin, queries, table, bias, mesh):
    """Value and gradients of a loss over sharded rows against those of a function of logical rows."""
    num_rows = len(bias)
    inputs = jax.device_put(queries, sharding(mesh, "batch")), table, in_physical_order(bias)
    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*inputs)
    expected, expected_gradients = jax.value_and_grad(twin, (0, 1, 2))(
        queries, jnp.asarray(in_logical_order(table, num_rows)), bias
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradients[0], expected_gradients[0], atol=1e-4)
    for found, wanted in zip(gradients[1:], expected_gradients[1:], strict=True):
        np.testing.assert_allclose(in_logical_order(found, num_rows), wanted, atol=1e-4)
    assert gradients[1].sharding.is_equivalent_to(sharding(mesh, "row", None), 2)
    # Without a gradient the same value comes.
    np.testing.assert_allclose(jax.jit(loss)(*inputs), expected, rtol=1e-5)


@pytest.fixture(scope="session")
def sharded_rows():
    return types.SimpleNamespace(
        in_physical_order=in_physical_order,
        in_logical_order=in_logical_order,
        assert_equal_to_twin=assert_equal_to_twin,
    )
