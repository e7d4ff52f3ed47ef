"""Placement, first rows and the checkpoint's order of a sharded table."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.core.mesh import make_mesh
from jaxrec.core.partition import sharding
from jaxrec.core.placement import physical_rows
from jaxrec.embedding.table import TableSpec, file_rows, from_logical, init_table, to_logical

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
    other = make_mesh((1, 8) if mesh.shape["data"] == 8 else (8, 1))
    with jax.set_mesh(other):
        expected = logical(init_table(SPEC, jax.random.key(3), other))
    np.testing.assert_array_equal(logical(table), expected)
    assert not expected[0].any()


def test_initial_rows_are_normal_and_need_no_second_table():
    mesh = make_mesh()
    spec = TableSpec(num_rows=80_000, dim=16, init_scale=0.5)
    with jax.set_mesh(mesh):
        rows = np.asarray(init_table(spec, jax.random.key(0), mesh), np.float64)[1:]
    size = rows.size
    assert abs(rows.mean()) < 5 * 0.5 / size**0.5
    assert abs(rows.std() / 0.5 - 1) < 5 / (2 * size) ** 0.5
    share = (np.abs(rows) < 0.5).mean()  # within one sigma
    assert abs(share - 0.682689) < 5 * (0.6827 * 0.3173 / size) ** 0.5
    rows /= 0.5
    assert abs((rows[1:] * rows[:-1]).mean()) < 5 / size**0.5  # neighbours are independent
    assert abs((rows[:, 1:] * rows[:, :-1]).mean()) < 5 / size**0.5


def test_initialisation_peaks_at_the_table_itself(mesh):
    spec = TableSpec(num_rows=8 * 4096, dim=16)
    lowered = jax.jit(lambda: init_table(spec, jax.random.key(0), mesh)).lower()
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 0.01 * 8 * 4096 * 16 * 4 / mesh.size


def test_checkpoint_order_round_trips_and_forgets_the_mesh(mesh):
    table = init_table(SPEC, jax.random.key(0), mesh)
    stored = jax.jit(lambda t: to_logical(t, 37))(table)
    assert stored.shape == (file_rows(37), 4) == (1024, 4)
    back = jax.jit(lambda t: from_logical(t, 37))(stored)
    np.testing.assert_array_equal(back, table)


@pytest.mark.parametrize(("rows", "expected"), [(1, 1024), (1024, 1024), (1025, 2048)])
def test_files_hold_whole_blocks(rows, expected):
    assert file_rows(rows) == expected
