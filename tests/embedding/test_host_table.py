"""A table four times its cache trains to the bits of a table in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.core.mesh import make_mesh
from jaxrec.core.partition import sharding
from jaxrec.embedding.engine import collect, look_up, update
from jaxrec.embedding.host_table import HostTable, _swap_on
from jaxrec.embedding.row_optimizer import Adam, RowAdagrad, Sgd

ROWS, CACHE, DIM = 256, 64, 4


def step_of(optimizer):
    @jax.jit
    def step(cache, ids, gradients):
        rows, route, _ = look_up({"t": cache["rows"]}, {"x": ids})
        per_shard = cache["rows"].shape[0] // jax.sharding.get_abstract_mesh().size
        sparse = collect(route, {"x": gradients}, rows_per_shard=per_shard)
        slots = {name: array for name, array in cache.items() if name != "rows"}
        table, slots, _ = update(optimizer, cache["rows"], slots, sparse, rate=0.25)
        return {"rows": table, **slots}, rows["t"]["x"]

    return step


def host_rows(optimizer, seed=0):
    rows = np.random.default_rng(seed).normal(size=(ROWS, DIM)).astype(np.float32)
    rows[0] = 0
    return {"rows": rows} | {name: np.array(slot) for name, slot in optimizer.init(jnp.asarray(rows)).items()}


def batches(rng, count):
    for _ in range(count):
        ids = np.minimum(rng.zipf(1.2, (8, 6)), ROWS - 1).astype(np.int32)
        ids = (ids * 37) % ROWS  # popular ids anywhere
        ids[rng.random(ids.shape) < 0.1] = 0
        yield ids, (rng.integers(-64, 65, (8, 6, DIM)) / 256).astype(np.float32)


@pytest.mark.parametrize("optimizer", [Sgd(), RowAdagrad(), Adam()], ids=lambda o: type(o).__name__)
def test_training_from_the_host_equals_training_in_memory(mesh, optimizer, tmp_path):
    split, step = sharding(mesh, "batch"), step_of(optimizer)
    in_memory = host_rows(optimizer)
    shards, per_shard = mesh.size, ROWS // mesh.size
    order = np.arange(ROWS)
    physical = order % shards * per_shard + order // shards
    whole = {name: np.empty_like(array) for name, array in in_memory.items()}
    for name, array in in_memory.items():
        whole[name][physical] = array
    whole = jax.device_put(whole, sharding(mesh, "row"))

    on_disk = np.memmap(tmp_path / "rows", np.float32, "w+", shape=(ROWS, DIM))
    on_disk[:] = in_memory["rows"]
    host = HostTable({**in_memory, "rows": on_disk}, CACHE, mesh)
    cache = host.cache()
    assert cache["rows"].shape == (CACHE, DIM) and host.host["rows"].shape == (4 * CACHE, DIM)
    missed = 0
    for ids, gradients in batches(np.random.default_rng(1), 12):
        cache, statistics = host.prefetch(cache, ids)
        missed += statistics.missed
        placed = jax.device_put((host.places(ids), gradients), split)
        cache, rows = step(cache, *placed)
        whole, expected = step(whole, *jax.device_put((ids, gradients), split))
        np.testing.assert_array_equal(rows, expected)
    assert missed > CACHE  # rows have left and come back
    host.flush(cache)
    for name, array in whole.items():
        np.testing.assert_array_equal(host.host[name], np.asarray(array)[physical])


@given(st.lists(st.lists(st.integers(-2, ROWS + 3), max_size=CACHE - 1), max_size=8))
@settings(max_examples=20)
def test_every_wanted_row_is_there_and_none_is_lost(steps):
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        before = host_rows(Sgd())
        expected = before["rows"].copy()
        host = HostTable(before, CACHE, mesh)
        cache = host.cache()
        for wanted in steps:
            ids = np.array(wanted, np.int64)
            real = (ids > 0) & (ids < ROWS)
            cache, statistics = host.prefetch(cache, np.where(real, ids, 0))
            assert 0 <= statistics.missed <= statistics.wanted == len(np.unique(ids[real]))
            places = host.places(ids)
            physical = places % mesh.size * (CACHE // mesh.size) + places // mesh.size
            found = np.asarray(cache["rows"])[physical]
            np.testing.assert_array_equal(found[real], expected[ids[real]])
            assert not places[~real].any()
        host.flush(cache)
    np.testing.assert_array_equal(host.host["rows"], expected)


def test_what_cannot_be_is_said(mesh):
    rows = host_rows(Sgd())
    with pytest.raises(ValueError, match="cache_rows=63 does not divide over 8 devices; use 64"):
        HostTable(rows, 63, mesh)
    with pytest.raises(ValueError, match="cache_rows=256 must be at least 2 and below the table's 256 rows"):
        HostTable(rows, 256, mesh)
    host = HostTable(rows, CACHE, mesh)
    with pytest.raises(ValueError, match="wants 100 distinct rows, and the cache holds 63"):
        host.prefetch(host.cache(), np.arange(1, 101))


def test_a_hit_costs_no_exchange(mesh):
    host = HostTable(host_rows(Sgd()), CACHE, mesh)
    cache, first = host.prefetch(host.cache(), np.array([3, 4, 3]))
    again, second = host.prefetch(cache, np.array([4]))
    assert (first.wanted, first.missed, second.missed) == (2, 2, 0)
    assert again is cache and second.hit_rate == 1.0 and first.hit_rate == 0.0


def test_what_comes_in_and_goes_out_costs_nothing_for_the_rest_of_the_cache(mesh):
    def temporaries(rows):
        cache = {"rows": jax.ShapeDtypeStruct((rows, DIM), jnp.float32, sharding=sharding(mesh, "row"))}
        incoming = {"rows": jnp.zeros((64, DIM))}
        compiled = (
            _swap_on(mesh, (("rows", (rows, DIM)),))
            .lower(cache, jnp.zeros(64, jnp.int32), incoming)
            .compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8 * 1024) == temporaries(8 * 4096)
