"""The divergence over sharded rows equals the dense one, in value and gradient, on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.core.mesh import make_mesh
from jaxrec.core.partition import sharding
from jaxrec.embedding.table import TableSpec, init_table, to_logical
from jaxrec.losses.divergence import full_divergence

NUM_ROWS, DIM, TAUGHT_DIM = 37, 8, 5


def dense_twin(queries, vectors, bias, weights, taught):
    sides = (taught, (queries, vectors, bias))
    theirs, own = (jax.nn.log_softmax((q @ v.T + b)[:, 1:]) for q, v, b in sides)
    return jnp.sum(weights * jnp.sum(jnp.exp(theirs) * (theirs - own), -1))


def problem(mesh, num_tokens, num_rows=NUM_ROWS):
    keys = jax.random.split(jax.random.key(1), 6)
    table = init_table(TableSpec(num_rows=num_rows, dim=DIM, init_scale=1.0), jax.random.key(0), mesh)
    shapes = ((num_rows,), (num_tokens, DIM), (num_tokens, TAUGHT_DIM), (num_rows, TAUGHT_DIM), (num_rows,))
    bias, queries, *taught = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False))
    weights = jnp.round(jax.random.uniform(keys[5], (num_tokens,)) * 2)
    return table, bias, queries, weights, tuple(taught)


@pytest.mark.parametrize("chunk_logits", [1, 300, 10**9])
def test_value_and_gradients_equal_the_dense_twin(mesh, chunk_logits, sharded_rows):
    table, bias, queries, weights, taught = problem(mesh, 32)
    split, asked = jax.device_put((weights, taught[0]), sharding(mesh, "batch"))
    sizes = {"num_rows": NUM_ROWS, "chunk_logits": chunk_logits}
    sharded_rows.assert_equal_to_twin(
        lambda q, v, b: 3.0 * full_divergence(q, split, v, b, (asked, *taught[1:]), **sizes),
        lambda q, v, b: 3.0 * dense_twin(q, v, b, weights, taught),
        queries,
        table,
        bias,
        mesh,
    )


@settings(max_examples=12, deadline=None)  # each compiles programs of its own
@given(st.integers(1, 40), st.integers(3, 60), st.integers(1, 3000))
def test_any_number_of_tokens_and_items(sharded_rows, tokens, items, chunk_logits):
    mesh = make_mesh((1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        table, bias, queries, weights, taught = problem(mesh, tokens, items)
        sizes = {"num_rows": items, "chunk_logits": chunk_logits}
        value = full_divergence(
            queries, weights, table, sharded_rows.in_physical_order(bias), taught, **sizes
        )
        dense = jnp.asarray(np.asarray(to_logical(table, items))[:items])
        expected = dense_twin(queries, dense, bias, weights, taught)
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)


def test_one_belief_twice_has_no_distance_and_no_gradient(mesh, sharded_rows):
    table, bias, queries, weights, _ = problem(mesh, 32)
    known = jax.jit(lambda t: to_logical(t, NUM_ROWS))(table)[:NUM_ROWS]
    loss = lambda q: full_divergence(  # noqa: E731
        q, weights, table, sharded_rows.in_physical_order(bias), (queries, known, bias), num_rows=NUM_ROWS
    )
    value, gradient = jax.jit(jax.value_and_grad(loss))(queries)
    assert abs(float(value)) < 1e-4
    np.testing.assert_allclose(gradient, 0.0, atol=1e-5)
