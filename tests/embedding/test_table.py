"""Placement, look-up and the checkpoint's order of a sharded table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.core.partition import sharding
from jaxrec.core.placement import physical_rows
from jaxrec.embedding.table import (
    TableSpec,
    file_rows,
    from_logical,
    init_table,
    lookup,
    lookup_shared,
    physical_to_logical_numpy,
    to_logical,
)

SPEC = TableSpec(num_rows=37, dim=4, init_scale=1.0)


def logical(table):
    return np.asarray(jax.jit(lambda t: to_logical(t, SPEC.num_rows))(table))[: SPEC.num_rows]


@given(num_rows=st.integers(1, 500), shards=st.integers(1, 16))
def test_no_two_ids_share_a_physical_row(num_rows, shards):
    per_shard = TableSpec(num_rows=num_rows, dim=1).rows_per_shard(shards)
    rows = np.asarray(physical_rows(np.arange(num_rows), shards, per_shard))
    assert len(np.unique(rows)) == num_rows
    assert rows.max() < shards * per_shard
    # Neighbours in a count-sorted vocabulary lie on different shards.
    owners = rows // per_shard
    assert (owners == np.arange(num_rows) % shards).all()


def test_initial_rows_do_not_depend_on_the_mesh(mesh):
    table = init_table(SPEC, jax.random.key(3), mesh)
    assert table.sharding.is_equivalent_to(sharding(mesh, "row", "embed"), 2)
    expected = np.array(jax.random.normal(jax.random.key(3), (37, 4)))
    expected[0] = 0
    np.testing.assert_array_equal(logical(table), expected)
    np.testing.assert_array_equal(physical_to_logical_numpy(np.asarray(table), 37, mesh.size), expected)


def test_lookup_equals_a_dense_gather(mesh):
    table = init_table(SPEC, jax.random.key(0), mesh)
    ids = np.random.default_rng(0).integers(0, 37, (16, 3)).astype(np.int32)
    split = jax.device_put(ids, sharding(mesh, "batch"))
    np.testing.assert_array_equal(jax.jit(lookup)(table, split), logical(table)[ids])
    np.testing.assert_array_equal(jax.jit(lookup_shared)(table, ids[:, 0]), logical(table)[ids[:, 0]])


def test_lookup_gathers_no_table(mesh):
    big = TableSpec(num_rows=8 * 1024, dim=4)
    table = init_table(big, jax.random.key(0), mesh)
    ids = jax.device_put(np.zeros((16, 3), np.int32), sharding(mesh, "batch"))
    compiled = jax.jit(lookup).lower(table, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < table.nbytes / 8


def test_checkpoint_order_round_trips_and_forgets_the_mesh(mesh):
    table = init_table(SPEC, jax.random.key(0), mesh)
    stored = jax.jit(lambda t: to_logical(t, 37))(table)
    assert stored.shape == (file_rows(37), 4) == (1024, 4)
    back = jax.jit(lambda t: from_logical(t, 37))(stored)
    np.testing.assert_array_equal(back, table)


@pytest.mark.parametrize(("rows", "expected"), [(1, 1024), (1024, 1024), (1025, 2048)])
def test_files_hold_whole_blocks(rows, expected):
    assert file_rows(rows) == expected


def test_ids_out_of_range_give_zero_rows(mesh):
    table = init_table(SPEC, jax.random.key(0), mesh)
    ids = jax.device_put(np.full((8, 1), 10_000, np.int32), sharding(mesh, "batch"))
    assert not np.asarray(jax.jit(lookup)(table, ids)).any()
    assert jnp.asarray(table).dtype == jnp.float32
