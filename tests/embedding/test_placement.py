"""Whatever the placement: the dense one-device twin's numbers, on every mesh.

Gradients are multiples of 2^-8, so that sums are exact in any order: SGD must agree to the bit.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.core.mesh import make_mesh
from jaxrec.core.partition import sharding
from jaxrec.embedding.engine import (
    Exchange,
    Located,
    add_to,
    collect,
    in_rows,
    look_up,
    lookup_shared,
    squared_norm,
    update,
)
from jaxrec.embedding.placement import Columns, Replicated, Rows
from jaxrec.embedding.row_optimizer import Adam, Sgd
from jaxrec.embedding.table import TableSpec, file_rows, from_logical, grow, init_table, to_logical

ROWS, DIM, BATCH, LENGTH, STEPS = 53, 8, 16, 6, 4
PLACEMENTS = [Replicated(), Columns(parts=4)]
PAIRS = [
    (Replicated(), Sgd(learning_rate=0.25)),
    (Replicated(), Adam(learning_rate=0.25, weight_decay=0.01)),
    (Columns(parts=2), Sgd(learning_rate=0.25)),
    (Columns(parts=8), Adam(learning_rate=0.25, weight_decay=0.01)),
]


def spec_of(placement, **changes):
    return TableSpec(**({"num_rows": ROWS, "dim": DIM, "init_scale": 1.0, "placement": placement} | changes))


def logical(array, placement, num_rows=ROWS):
    return np.asarray(jax.jit(to_logical, static_argnums=(1, 2))(array, num_rows, placement))[:num_rows]


def batches(seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(STEPS):
        ids = np.minimum(rng.zipf(1.3, (BATCH, LENGTH)) - 1, ROWS - 1).astype(np.int32)
        yield ids, (rng.integers(-64, 65, (BATCH, LENGTH, DIM)) / 256).astype(np.float32)


def dense_gradient(ids, gradients):
    dense = np.zeros((ROWS, DIM), np.float32)
    np.add.at(dense, ids.reshape(-1), gradients.reshape(-1, DIM))
    dense[0] = 0
    return dense


def rows_a_shard(table, placement):
    return table.shape[0] // placement.shards(jax.sharding.get_abstract_mesh().size)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def engine_step(optimizer, placement, exchange, table, slots, ids, gradients):
    rows, route, _ = look_up({"t": table}, {"x": ids}, placement=placement, exchange=exchange)
    gradients = gradients + 0 * rows["t"]["x"]
    rows_per_shard = rows_a_shard(table, placement)
    sparse = collect(
        route, {"x": gradients}, rows_per_shard=rows_per_shard, placement=placement, exchange=exchange
    )
    norm = squared_norm(sparse)
    table, slots, _ = update(optimizer, table, slots, sparse, rate=optimizer.learning_rate)
    return table, slots, rows["t"]["x"], norm


@pytest.mark.parametrize(("placement", "optimizer"), PAIRS, ids=str)
def test_steps_equal_the_dense_twin(mesh, placement, optimizer):
    spec = spec_of(placement)
    table = init_table(spec, jax.random.key(0), mesh)
    slots = jax.jit(optimizer.init, out_shardings=spec.sharding(mesh))(table)
    twin = logical(table, placement)
    twin_slots = jax.tree.map(np.asarray, optimizer.init(jnp.asarray(twin)))
    twin_update = jax.jit(optimizer.update)
    exact = isinstance(optimizer, Sgd)
    close = np.testing.assert_array_equal if exact else functools.partial(
        np.testing.assert_allclose, rtol=1e-6, atol=1e-6
    )  # fmt: skip
    for ids, gradients in batches():
        placed = jax.device_put((ids, gradients), sharding(mesh, "batch"))
        table, slots, rows, norm = engine_step(optimizer, placement, Exchange(), table, slots, *placed)
        close(rows, np.where(ids[..., None] > 0, twin[ids], 0))
        dense = dense_gradient(ids, gradients)
        np.testing.assert_allclose(norm, np.sum(np.square(dense, dtype=np.float64)), rtol=1e-5)
        touched = np.isin(np.arange(ROWS), ids[ids > 0])
        new = twin_update(twin, twin_slots, dense, np.float32(optimizer.learning_rate))
        keep = lambda new, old: np.where(touched.reshape(-1, *(1,) * (old.ndim - 1)), new, old)  # noqa: B023, E731
        twin, twin_slots = jax.tree.map(keep, new, (twin, twin_slots))
    assert table.sharding.is_equivalent_to(spec.sharding(mesh), 2)
    assert table.shape == spec.physical_shape(mesh.size)
    close(logical(table, placement), twin)
    for name, slot in slots.items():
        close(logical(slot, placement), twin_slots[name])


@functools.cache
def fresh(mesh, placement, num_rows):
    table = init_table(spec_of(placement, num_rows=num_rows), jax.random.key(0), mesh)
    return table, logical(table, placement, num_rows)


@given(data=st.data())
@settings(max_examples=12)
def test_any_ids_and_sizes(data):
    mesh = make_mesh((2, 4))
    # Static shapes: a small set.
    placement, exchange = data.draw(
        st.sampled_from([(Replicated(), Exchange()), (Columns(parts=4), Exchange(capacity=1))])
    )
    num_rows = data.draw(st.sampled_from([2, ROWS]))
    ids = data.draw(st.lists(st.integers(-3, num_rows + 70), min_size=48, max_size=48))
    ids[0] = data.draw(st.sampled_from([ids[0], 2**31 - 1, 2**30 + 1]))
    ids = np.asarray(ids, np.int32).reshape(8, 6)
    # Ids that the table lacks only because it was padded are the caller's to avoid, as with Rows.
    ids = np.where((ids >= num_rows) & (ids < num_rows + 9), 0, ids)
    real = (ids > 0) & (ids < num_rows)
    gradients = np.asarray(np.random.default_rng(0).integers(-64, 65, (8, 6, DIM)) / 256, np.float32)
    with jax.set_mesh(mesh):
        before, expected = fresh(mesh, placement, num_rows)
        placed = jax.device_put((ids, gradients), sharding(mesh, "batch"))
        table, _, rows, _ = engine_step(
            Sgd(learning_rate=0.25), placement, exchange, jnp.copy(before), {}, *placed
        )
        after = logical(table, placement, num_rows)
    np.testing.assert_array_equal(rows, np.where(real[..., None], expected[np.where(real, ids, 0)], 0))
    dense = dense_gradient(np.where(real, ids, 0), gradients)[:num_rows]
    np.testing.assert_array_equal(after, expected - np.float32(0.25) * dense)


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_first_rows_and_the_files_order_are_those_of_rows(mesh, placement):
    found, expected = (init_table(spec_of(one), jax.random.key(3), mesh) for one in (placement, Rows()))
    np.testing.assert_array_equal(logical(found, placement), logical(expected, Rows()))
    np.testing.assert_array_equal(in_rows(found, ROWS, placement), expected)
    file = np.pad(logical(expected, Rows()), [(0, file_rows(ROWS) - ROWS), (0, 0)])
    back = jax.jit(from_logical, static_argnums=(1, 2))
    np.testing.assert_array_equal(back(file, ROWS, placement), found)
    # One float a row, alike in all parts.
    counts = np.arange(file_rows(ROWS), dtype=np.float32)
    np.testing.assert_array_equal(
        logical(back(counts, ROWS, placement), placement), np.arange(ROWS, dtype=np.float32)
    )
    grown = spec_of(placement, num_rows=90)
    np.testing.assert_array_equal(
        logical(grow(file, ROWS, grown, jax.random.key(3), mesh), placement, 90),
        logical(init_table(grown, jax.random.key(3), mesh), placement, 90),
    )


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_microbatches_shared_ids_and_refused_updates(mesh, placement):
    ids, gradients = next(batches())
    table = init_table(spec_of(placement), jax.random.key(0), mesh)
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, ("data", "model")))
    stacked = jax.device_put((ids.reshape(2, 8, LENGTH), gradients.reshape(2, 8, LENGTH, DIM)), where)
    optimizer = Adam(weight_decay=0.1)
    slots = jax.tree.map(lambda slot: slot + 1, optimizer.init(table))

    @jax.jit
    def step(table, slots, ids, gradients):
        sparse = collect(
            {"x": ids}, {"x": gradients}, rows_per_shard=rows_a_shard(table, placement), placement=placement,
            stacked=True,
        )  # fmt: skip
        refused = update(optimizer, table, slots, sparse, rate=0.1, apply=jnp.bool_(False))[:2]
        shared = lookup_shared(table, jnp.arange(1, 12, dtype=jnp.int32), placement)
        return add_to(jnp.zeros_like(table), sparse), refused, shared

    added, refused, shared = step(table, slots, *stacked)
    np.testing.assert_array_equal(logical(added, placement), dense_gradient(ids, gradients))
    jax.tree.map(np.testing.assert_array_equal, refused, (table, slots))
    np.testing.assert_array_equal(shared, logical(table, placement)[1:12])


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_bfloat16_rows_are_rounded_as_those_of_rows(placement):
    ids, gradients = next(batches())
    found = []
    for one, shape in ((placement, (2, 4)), (Rows(), (8, 1))):
        mesh = make_mesh(shape)
        with jax.set_mesh(mesh):
            table = init_table(spec_of(one, dtype="bfloat16"), jax.random.key(0), mesh)
            placed = jax.device_put((ids, gradients), sharding(mesh, "batch"))

            @jax.jit
            def step(table, ids, gradients, one=one):
                sparse = collect(
                    {"x": ids}, {"x": gradients}, rows_per_shard=rows_a_shard(table, one), placement=one
                )
                return update(Sgd(), table, {}, sparse, rate=0.01, key=jax.random.key(5))[0]

            found.append(logical(step(table, *placed), one).astype(np.float32))
    np.testing.assert_array_equal(*found)


def test_a_replicated_table_is_not_exchanged(mesh):
    table = init_table(spec_of(Replicated()), jax.random.key(0), mesh)
    placed = jax.device_put(next(batches()), sharding(mesh, "batch"))
    text = engine_step.lower(Sgd(), Replicated(), Exchange(), table, {}, *placed).compile().as_text()
    assert "all-to-all" not in text
    assert text.count(" all-reduce(") == 1


def test_few_rows_in_parts_lie_on_every_device(mesh):
    spec = spec_of(Columns(parts=4), num_rows=3)
    table = init_table(spec, jax.random.key(0), mesh)
    held = [np.any(np.asarray(shard.data)) for shard in table.addressable_shards]
    assert sum(held) == 8  # two rows that are not padding, four parts each


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_located_ids_need_rows(mesh, placement):
    table = init_table(spec_of(placement), jax.random.key(0), mesh)
    places = Located(jnp.zeros(8, jnp.int32), jnp.zeros(8, jnp.int32))
    with pytest.raises(ValueError, match="name a device and its row, and the tables lie as .*; use Rows"):
        look_up({"t": table}, {"x": places}, placement=placement)


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match=r"parts=1 must be at least 2"):
        Columns(parts=1)
    with pytest.raises(ValueError, match=r"Columns\(parts=3\) does not divide dim=8.*2, 4, 8"):
        spec_of(Columns(parts=3))
    with pytest.raises(ValueError, match=r"31 bits; take at most 2 parts"):
        spec_of(Columns(parts=4), num_rows=10**9)
