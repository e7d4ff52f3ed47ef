"""The engine equals its dense one-device twin, for every skew, on every mesh; and nothing is lost.

Gradients are multiples of 2^-8, so that sums are exact in any order: SGD must agree to the bit.
"""

import functools
import re

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
    look_up,
    lookup,
    lookup_shared,
    squared_norm,
    update,
)
from jaxrec.embedding.row_optimizer import Adam, Momentum, RowAdagrad, Sgd
from jaxrec.embedding.storage import dequantize_rows, quantize_rows
from jaxrec.embedding.table import TableSpec, from_logical, init_table, to_logical

ROWS, DIM, BATCH, LENGTH, STEPS = 203, 4, 16, 24, 10
SPEC = TableSpec(num_rows=ROWS, dim=DIM, init_scale=1.0)
OPTIMIZERS = [
    Sgd(learning_rate=0.25),
    Momentum(learning_rate=0.25, weight_decay=0.01),
    RowAdagrad(learning_rate=0.25),
    Adam(learning_rate=0.25, weight_decay=0.01),
]


def zipf(rng, shape):
    return np.minimum(rng.zipf(1.2, shape), ROWS - 1)


SKEWS = {
    "uniform": lambda rng, shape: rng.integers(0, ROWS, shape),
    "Zipf": zipf,
    "sorted by popularity": lambda rng, shape: np.sort(zipf(rng, shape).reshape(-1)).reshape(shape),
    "one id": lambda rng, shape: np.full(shape, 5),
    "one owner": lambda rng, shape: rng.integers(0, ROWS // 8, shape) * 8,
    "one owner, apart": lambda rng, shape: (
        np.sort(rng.integers(0, ROWS // 8, shape).reshape(-1)).reshape(shape) * 8
    ),
    "padding": lambda rng, shape: np.zeros(shape),
}


def batches(name, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(STEPS):
        ids = np.asarray(SKEWS[name](rng, (BATCH, LENGTH)), np.int32)
        yield ids, (rng.integers(-64, 65, (BATCH, LENGTH, DIM)) / 256).astype(np.float32)


@functools.cache
def to_host(mesh):
    """Whole on every device, so that each of several processes can read it."""
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return (
        jax.jit(functools.partial(to_logical, num_rows=ROWS), out_shardings=everywhere),
        jax.jit(lambda array: array, out_shardings=everywhere),
    )


@functools.cache
def to_physical(mesh):
    return jax.jit(functools.partial(from_logical, num_rows=ROWS), out_shardings=sharding(mesh, "row"))


def logical(array):
    return np.asarray(to_host(jax.sharding.get_mesh())[0](array))[:ROWS]


def whole(array):
    return np.asarray(to_host(jax.sharding.get_mesh())[1](array))


def physical(array):
    padded = np.pad(array, [(0, 1024 - len(array))] + [(0, 0)] * (array.ndim - 1))
    return to_physical(jax.sharding.get_mesh())(padded)


def dense_gradient(ids, gradients):
    dense = np.zeros((ROWS, DIM), np.float32)
    np.add.at(dense, ids.reshape(-1), gradients.reshape(-1, DIM))
    dense[0] = 0
    return dense


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def engine_step(optimizer, exchange, table, slots, ids, gradients):
    rows, route, rounds = look_up({"t": table}, {"x": ids}, exchange=exchange)
    rows_per_shard = table.shape[0] // jax.sharding.get_abstract_mesh().size
    # As in training, where gradients come from the rows: an update ahead of the look-up would need a second table.
    gradients = gradients + 0 * rows["t"]["x"]
    sparse = collect(route, {"x": gradients}, rows_per_shard=rows_per_shard, exchange=exchange)
    norm = squared_norm(sparse)
    table, slots, more = update(optimizer, table, slots, sparse, rate=optimizer.learning_rate)
    return table, slots, rows["t"]["x"], norm, rounds, more


TWIN_UPDATE = jax.jit(lambda optimizer, *arguments: optimizer.update(*arguments), static_argnums=0)


def twin_step(optimizer, table, slots, ids, gradients):
    """The dense one-device twin: the same arithmetic on the touched rows of a whole table."""
    dense = dense_gradient(ids, gradients)
    touched = np.isin(np.arange(ROWS), ids[ids > 0])
    new = TWIN_UPDATE(optimizer, table, slots, dense, np.float32(optimizer.learning_rate))
    keep = lambda new, old: np.where(touched.reshape(-1, *(1,) * (old.ndim - 1)), new, old)  # noqa: E731
    table, slots = jax.tree.map(keep, new, (table, slots))
    return table, slots, float(np.sum(np.square(dense, dtype=np.float64)))


def run(mesh, optimizer, name, exchange=Exchange(), seed=0):
    """Ten steps of both; returns the rounds beyond the first."""
    twin = logical(init_table(SPEC, jax.random.key(0), mesh))
    twin_slots = {key: np.asarray(slot) for key, slot in optimizer.init(jnp.asarray(twin)).items()}
    table, slots = physical(twin), jax.tree.map(physical, twin_slots)
    split, extra = sharding(mesh, "batch"), 0
    for ids, gradients in batches(name, seed):
        placed = jax.device_put((ids, gradients), split)
        table, slots, rows, norm, rounds, more = engine_step(optimizer, exchange, table, slots, *placed)
        rows, expected = whole(rows), np.where(ids[..., None] > 0, twin[ids], 0)
        if isinstance(optimizer, Sgd):
            np.testing.assert_array_equal(rows, expected)
        np.testing.assert_allclose(rows, expected, rtol=1e-6, atol=1e-6)
        twin, twin_slots, twin_norm = twin_step(optimizer, twin, twin_slots, ids, gradients)
        np.testing.assert_allclose(norm, twin_norm, rtol=1e-5)
        extra += int(rounds) + int(more)
    if isinstance(optimizer, Sgd):
        np.testing.assert_array_equal(logical(table), twin)
    np.testing.assert_allclose(logical(table), twin, rtol=1e-6, atol=1e-6)
    for key in slots:
        np.testing.assert_allclose(logical(slots[key]), twin_slots[key], rtol=1e-6, atol=1e-6)
    return extra


@pytest.mark.parametrize("name", SKEWS)
def test_the_ragged_transport_equals_the_dense_twin(mesh, name):
    run(mesh, Adam(learning_rate=0.25), name, Exchange(transport="ragged"))


@pytest.mark.parametrize("name", SKEWS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_ten_steps_equal_the_dense_twin(mesh, optimizer, name):
    run(mesh, optimizer, name)


@pytest.mark.parametrize("transport", ["padded", "ragged"])
@pytest.mark.parametrize("name", ["uniform", "one owner, apart"])
def test_a_small_capacity_takes_more_rounds_and_loses_nothing(mesh, name, transport):
    assert run(mesh, RowAdagrad(learning_rate=0.25), name, Exchange(transport=transport, capacity=3)) > STEPS


@given(data=st.data())
@settings(max_examples=25)
def test_any_ids_and_capacities(data):
    mesh = make_mesh(data.draw(st.sampled_from([(8, 1), (2, 4), (1, 8)])))
    # Static shapes: a small set of buckets.
    transport, capacity = (
        data.draw(st.sampled_from(["padded", "ragged"])),
        data.draw(st.sampled_from([1, 5, 48])),
    )
    exchange = Exchange(transport=transport, capacity=capacity)
    ids = data.draw(st.lists(st.integers(-3, ROWS + 5), min_size=48, max_size=48))
    if data.draw(st.booleans()):
        ids = [data.draw(st.integers(0, ROWS))] * 24 + ids[24:]
    ids = np.asarray(ids, np.int32).reshape(8, 6)
    real = (ids > 0) & (ids < ROWS)
    gradients = np.asarray(np.random.default_rng(0).integers(-64, 65, (8, 6, DIM)) / 256, np.float32)
    with jax.set_mesh(mesh):
        before = init_table(SPEC, jax.random.key(0), mesh)
        expected = logical(before)
        placed = jax.device_put((ids, gradients), sharding(mesh, "batch"))
        table, _, rows, *_ = engine_step(Sgd(learning_rate=0.25), exchange, before, {}, *placed)
        after = logical(table)
    np.testing.assert_array_equal(rows, np.where(real[..., None], expected[np.where(real, ids, 0)], 0))
    dense = dense_gradient(np.where(real, ids, 0), gradients)
    np.testing.assert_array_equal(after, expected - np.float32(0.25) * dense)


def test_one_device_needs_no_exchange():
    mesh = make_mesh((1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        for optimizer in OPTIMIZERS:
            assert run(mesh, optimizer, "Zipf") == 0


def test_tables_with_the_same_ids_share_an_exchange(mesh):
    ids = jax.device_put(next(batches("uniform"))[0], sharding(mesh, "batch"))
    one = init_table(SPEC, jax.random.key(0), mesh)
    two = init_table(TableSpec(num_rows=ROWS, dim=1), jax.random.key(1), mesh)
    rows, _, _ = jax.jit(lambda a, b, i: look_up({"a": a, "b": b}, {"x": i, "y": i[:, :2]}))(one, two, ids)
    for name, table in {"a": one, "b": two}.items():
        expected = logical(table)[np.asarray(ids)] * (np.asarray(ids) > 0)[..., None]
        np.testing.assert_array_equal(rows[name]["x"], expected)
        np.testing.assert_array_equal(rows[name]["y"], expected[:, :2])


def test_microbatches_are_collected_as_one(mesh):
    ids, gradients = next(batches("Zipf"))
    table = init_table(SPEC, jax.random.key(0), mesh)
    per_shard = table.shape[0] // mesh.size
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, ("data", "model")))
    stacked = jax.device_put((ids.reshape(2, 8, LENGTH), gradients.reshape(2, 8, LENGTH, DIM)), where)
    zeros = jax.device_put(np.zeros(table.shape, np.float32), sharding(mesh, "row"))
    add = jax.jit(
        lambda z, i, g: add_to(z, collect({"x": i}, {"x": g}, rows_per_shard=per_shard, stacked=True))
    )
    np.testing.assert_array_equal(logical(add(zeros, *stacked)), dense_gradient(ids, gradients))


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_a_refused_update_changes_no_bit(mesh, optimizer):
    ids, gradients = jax.device_put(next(batches("uniform")), sharding(mesh, "batch"))
    table = init_table(SPEC, jax.random.key(0), mesh)
    slots = jax.tree.map(lambda s: s + 1, optimizer.init(table))
    per_shard = table.shape[0] // mesh.size

    def refuse(table, slots, ids, gradients):
        sparse = collect({"x": ids}, {"x": gradients}, rows_per_shard=per_shard)
        return update(optimizer, table, slots, sparse, rate=0.1, apply=jnp.bool_(False))[:2]

    after = jax.jit(refuse)(table, slots, ids, gradients)
    jax.tree.map(np.testing.assert_array_equal, after, (table, slots))


@pytest.mark.parametrize("size", [1, 8, 11])
def test_shared_look_ups_reach_every_device(mesh, size):
    table = init_table(SPEC, jax.random.key(0), mesh)
    ids = np.arange(1, size + 1, dtype=np.int32)
    rows = jax.jit(lookup_shared)(table, ids)
    assert rows.sharding.is_fully_replicated
    np.testing.assert_array_equal(rows, logical(table)[ids])


def test_no_table_is_gathered_and_memory_does_not_see_its_rows(mesh):
    def temporaries(rows):
        table = init_table(TableSpec(num_rows=rows, dim=4), jax.random.key(0), mesh)
        ids = jax.device_put(np.zeros((16, 3), np.int32), sharding(mesh, "batch"))
        gradients = jax.device_put(np.zeros((16, 3, 4), np.float32), sharding(mesh, "batch"))
        optimizer = RowAdagrad()
        lowered = engine_step.lower(optimizer, Exchange(), table, optimizer.init(table), ids, gradients)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8 * 1024) == temporaries(8 * 4096)


def test_more_rows_than_32_bits_number_compile(mesh):
    """Five billion rows of 16 floats, 320 GB: a row is (owner, row there), so a device numbers its own alone."""
    per_shard, optimizer = 625_000_000, RowAdagrad()
    num_rows = per_shard * mesh.size
    assert num_rows > 2**32
    row, batch = sharding(mesh, "row"), sharding(mesh, "batch")
    table = jax.ShapeDtypeStruct((num_rows, 16), jnp.float32, sharding=row)
    slots = {"accumulator": jax.ShapeDtypeStruct((num_rows,), jnp.float32, sharding=row)}
    where = Located(*(jax.ShapeDtypeStruct((16, 4), jnp.int32, sharding=batch) for _ in range(2)))

    def step(table, slots, where):
        rows, route, _ = look_up({"t": table}, {"x": where})
        sparse = collect(route, {"x": rows["t"]["x"]}, rows_per_shard=per_shard)
        return update(optimizer, table, slots, sparse, rate=0.5)[:2]

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(table, slots, where).compile()
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes > per_shard * 4 * 17
    assert memory.temp_size_in_bytes < 1e6
    assert gathered_rows(compiled.as_text()) < 2**16


def gathered_rows(text):
    """Rows of the largest array that is gathered from all devices."""
    return max((int(rows) for rows in re.findall(r"= \w+\[(\d+)[\d,]*\]\S* all-gather\(", text)), default=0)


def test_ids_that_do_not_divide_are_refused(mesh):
    table = init_table(SPEC, jax.random.key(0), mesh)
    with pytest.raises(ValueError, match=r"shape \(9,\) do not divide over 8 devices; pad dim 0 to 16"):
        lookup(table, jnp.zeros(9, jnp.int32))


def test_bfloat16_rows_are_rounded_alike_on_every_mesh_and_keep_small_updates(mesh):
    spec = TableSpec(num_rows=ROWS, dim=DIM, init_scale=1.0, dtype="bfloat16")
    table = init_table(spec, jax.random.key(0), mesh)
    assert table.dtype == jnp.bfloat16
    ids = np.arange(8, dtype=np.int32).reshape(8, 1) + 1
    placed = jax.device_put((ids, np.ones((8, 1, DIM), np.float32)), sharding(mesh, "batch"))
    per_shard = table.shape[0] // mesh.size

    @jax.jit
    def step(table, ids, gradients, key):
        sparse = collect({"x": ids}, {"x": gradients}, rows_per_shard=per_shard)
        return update(Sgd(), table, {}, sparse, rate=2.0**-14, key=key)[0]

    before = logical(table).astype(np.float32)
    for count in range(256):
        # XLA's collectives of CPU devices may wait for ever where many runs are queued.
        table = jax.block_until_ready(step(table, *placed, jax.random.fold_in(jax.random.key(1), count)))
    moved = before - logical(table).astype(np.float32)
    # Nearest rounding would not move a row entry of 1 by a step of 2^-14 at all.
    assert abs(moved[1:9].mean() / (256 * 2.0**-14) - 1) < 0.25
    assert not moved[9:].any()
    twin = before.copy()
    with jax.set_mesh(make_mesh((8, 1))):
        other = init_table(spec, jax.random.key(0), make_mesh((8, 1)))
        placed = jax.device_put((ids, np.ones((8, 1, DIM), np.float32)), sharding(make_mesh((8, 1)), "batch"))
        for count in range(3):
            other = step(other, *placed, jax.random.fold_in(jax.random.key(1), count))
        twin = logical(other)
    table = init_table(spec, jax.random.key(0), mesh)
    placed = jax.device_put((ids, np.ones((8, 1, DIM), np.float32)), sharding(mesh, "batch"))
    for count in range(3):
        table = step(table, *placed, jax.random.fold_in(jax.random.key(1), count))
    np.testing.assert_array_equal(logical(table), twin)


def test_bfloat16_rows_need_a_key(mesh):
    table = init_table(TableSpec(num_rows=ROWS, dim=DIM, dtype="bfloat16"), jax.random.key(0), mesh)
    sparse = collect(
        {"x": jnp.zeros(8, jnp.int32)}, {"x": jnp.zeros((8, DIM))}, rows_per_shard=table.shape[0] // mesh.size
    )
    with pytest.raises(ValueError, match="bfloat16 rows is rounded stochastically; pass the step's key"):
        update(Sgd(), table, {}, sparse, rate=0.1)


def test_int8_rows_travel_as_two_tables_of_the_same_ids(mesh):
    table = init_table(SPEC, jax.random.key(0), mesh)
    ids = jax.device_put(next(batches("uniform"))[0], sharding(mesh, "batch"))
    frozen = jax.jit(quantize_rows)(table)
    found = jax.jit(lambda t, i: look_up(t, {"x": i})[0])(frozen, ids)
    rows = dequantize_rows({name: found[name]["x"] for name in found})
    exact = logical(table)[np.asarray(ids)] * (np.asarray(ids) > 0)[..., None]
    assert np.all(np.abs(rows - exact) <= np.abs(exact).max(-1, keepdims=True) / 254 + 1e-7)
    assert found["values"]["x"].dtype == jnp.int8
