"""Row optimizers: sparse updates equal the dense twin on every mesh, and `apply=False` changes no bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.core.partition import sharding
from jaxrec.embedding.row_optimizer import (
    Adam,
    RowAdagrad,
    RowOptimizer,
    Sgd,
    SparseRows,
    add_sparse,
    apply_dense,
    apply_sparse,
    sum_by_row,
)
from jaxrec.embedding.table import TableSpec, init_table, to_logical

SPEC = TableSpec(num_rows=37, dim=4, init_scale=1.0)
OPTIMIZERS = [
    Sgd(learning_rate=0.1),
    RowAdagrad(learning_rate=0.1),
    Adam(learning_rate=0.1, weight_decay=0.01),
]
RATE, COUNT = jnp.float32(0.1), jnp.float32(1)


def logical(array):
    return np.asarray(jax.jit(lambda t: to_logical(t, SPEC.num_rows))(array))[: SPEC.num_rows]


def sparse_rows(mesh, ids):
    gradients = np.random.default_rng(1).normal(size=(len(ids), 4)).astype(np.float32)
    where = sharding(mesh, "batch")
    return SparseRows(jax.device_put(np.asarray(ids, np.int32), where), jax.device_put(gradients, where))


IDS = {
    "mixed": np.random.default_rng(0).integers(0, 37, 64),
    "one id everywhere": np.full(64, 5),
    "all on one shard": np.random.default_rng(0).integers(0, 4, 64) * 8,
    "padding only": np.zeros(64, int),
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_sparse_update_equals_the_dense_twin(mesh, optimizer, ids):
    table = init_table(SPEC, jax.random.key(0), mesh)
    slots = optimizer.init(table)
    sparse = sparse_rows(mesh, ids)
    update = jax.jit(
        lambda t, s, g: apply_sparse(optimizer, t, s, g, rate=RATE, count=COUNT, apply=jnp.bool_(True))
    )
    new, new_slots = update(table, slots, sparse)

    dense = np.zeros((37, 4), np.float32)
    np.add.at(dense, ids, np.asarray(sparse.gradients))
    touched = np.unique(ids[ids > 0])
    rows = {name: logical(slot)[touched] for name, slot in slots.items()}
    expected = logical(table).copy()
    expected[touched], expected_slots = optimizer.update(expected[touched], rows, dense[touched], RATE, COUNT)
    np.testing.assert_allclose(logical(new), expected, rtol=1e-5, atol=1e-6)
    for name, slot in new_slots.items():
        np.testing.assert_allclose(logical(slot)[touched], expected_slots[name], rtol=1e-5, atol=1e-6)
        untouched = np.setdiff1d(np.arange(37), touched)
        np.testing.assert_array_equal(logical(slot)[untouched], logical(slots[name])[untouched])


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_a_refused_update_changes_no_bit(mesh, optimizer):
    table = init_table(SPEC, jax.random.key(0), mesh)
    slots = jax.tree.map(lambda s: s + 1, optimizer.init(table))
    refused = {"rate": RATE, "count": COUNT, "apply": jnp.bool_(False)}
    sparse = sparse_rows(mesh, IDS["mixed"])
    after_sparse = jax.jit(lambda t, s, g: apply_sparse(optimizer, t, s, g, **refused))(table, slots, sparse)
    after_dense = jax.jit(lambda t, s, g: apply_dense(optimizer, t, s, g, **refused))(table, slots, table)
    for after in (after_sparse, after_dense):
        jax.tree.map(np.testing.assert_array_equal, after, (table, slots))


def test_dense_adam_is_optax_adam(mesh):
    table = init_table(SPEC, jax.random.key(0), mesh)
    optimizer, reference = Adam(learning_rate=0.1), optax.adam(0.1)
    slots, state, twin = optimizer.init(table), reference.init(table), table
    for count in range(1, 4):
        gradient = table * count
        table, slots = apply_dense(
            optimizer, table, slots, gradient, rate=RATE, count=jnp.float32(count), apply=jnp.bool_(True)
        )
        updates, state = reference.update(gradient, state)
        twin = optax.apply_updates(twin, updates)
    np.testing.assert_allclose(table, twin, rtol=1e-5, atol=1e-6)


def test_look_ups_are_added_to_a_shard_local_gradient(mesh):
    zeros = jax.device_put(np.zeros((40, 4), np.float32), sharding(mesh, "row", "embed"))
    sparse = sparse_rows(mesh, IDS["mixed"])
    expected = np.zeros((37, 4), np.float32)
    np.add.at(expected, IDS["mixed"], np.asarray(sparse.gradients))
    expected[0] = 0
    np.testing.assert_allclose(logical(jax.jit(add_sparse)(zeros, sparse)), expected, rtol=1e-5, atol=1e-6)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_sums_by_row_rise_strictly_and_lose_nothing(index):
    gradients = np.random.default_rng(0).normal(size=(len(index), 2)).astype(np.float32)
    rows, sums = sum_by_row(jnp.array(index), jnp.array(gradients), 8)
    assert (np.diff(rows) > 0).all()
    expected = np.zeros((8, 2), np.float32)
    for row, gradient in zip(index, gradients, strict=True):
        if row < 8:
            expected[row] += gradient
    found = np.zeros((8, 2), np.float32)
    for row, total in zip(np.asarray(rows), np.asarray(sums), strict=True):
        if row < 8:
            found[row] = total
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_base_class_says_what_is_missing():
    with pytest.raises(TypeError, match="RowOptimizer must define init"):
        RowOptimizer().init(jnp.zeros((2, 2)))
    with pytest.raises(TypeError, match="RowOptimizer must define update"):
        RowOptimizer().update(jnp.zeros((2, 2)), {}, jnp.zeros((2, 2)), RATE, COUNT)
