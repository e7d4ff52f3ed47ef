"""Dynamic ids against a plain Python model of the rules, step by step, on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.core.hashing import hashed_normal
from jaxrec.core.mesh import make_mesh
from jaxrec.core.partition import sharding
from jaxrec.embedding.dynamic import DynamicIds, bucket_of, init_ids, padded_buckets, split_ids, translate
from jaxrec.embedding.engine import Exchange, collect, look_up, update
from jaxrec.embedding.row_optimizer import Sgd
from jaxrec.embedding.table import from_logical, to_logical

CONFIG = DynamicIds(buckets=6, ways=2, waiting=2, admit_after=2, evict_after_steps=2)
DIM, KEY = 3, jax.random.key(0)


class Model:
    """The rules in words of one syllable: buckets of dicts."""

    def __init__(self, config):
        self.config = config
        self.live = [{} for _ in range(config.buckets)]  # id -> [way, count, seen]
        self.waiting = [{} for _ in range(config.buckets)]  # id -> [place, count, seen]

    def step(self, ids, step):
        found = {}
        admitted = []
        distinct, counts = np.unique(ids[ids != 0], return_counts=True)
        high, low = split_ids(distinct)
        buckets = np.asarray(bucket_of(jnp.asarray(high), jnp.asarray(low), self.config.buckets))
        order = np.lexsort((low.view(np.int32), high.view(np.int32), buckets))
        entries = [(int(buckets[i]), int(distinct[i]), int(counts[i])) for i in order]
        for bucket, id, count in entries:  # the living first, before anyone is evicted
            if id in self.live[bucket]:
                self.live[bucket][id][1:] = [self.live[bucket][id][1] + count, step]
        for bucket in range(self.config.buckets):
            mine = [(id, count) for b, id, count in entries if b == bucket and id not in self.live[bucket]]
            self._newcomers(bucket, mine, step, admitted)
        for bucket, id, _ in entries:
            found[id] = (bucket, self.live[bucket][id][0]) if id in self.live[bucket] else None
        return found, admitted

    def _newcomers(self, bucket, mine, step, admitted):
        config, live, waiting = self.config, self.live[bucket], self.waiting[bucket]
        total = {id: count + (waiting[id][1] if id in waiting else 0) for id, count in mine}
        wants = [id for id, _ in mine if total[id] >= config.admit_after]
        free = self._free(live, config.ways, lambda entry: entry[2] <= step - config.evict_after_steps)
        gets = dict(zip(wants, free, strict=False))
        freed = {waiting[id][0] for id in gets if id in waiting}
        for id, way in gets.items():
            for other in [o for o, entry in live.items() if entry[0] == way]:
                del live[other]
            live[id] = [way, total[id], step]
            waiting.pop(id, None)
            admitted.append(id)
        stays = [id for id, _ in mine if id not in gets]
        for id in stays:
            if id in waiting:
                waiting[id][1:] = [total[id], step]
        new = [id for id in stays if id not in waiting]
        seen_now = {place for place in freed if self._place_seen(bucket, place) == step}
        free = [
            place
            for place in self._free(waiting, config.waiting, lambda entry: entry[2] < step)
            if place not in seen_now
        ]
        for id, place in zip(new, free, strict=False):
            for other in [o for o, entry in waiting.items() if entry[0] == place]:
                del waiting[other]
            waiting[id] = [place, total[id], step]

    def _place_seen(self, bucket, place):
        return -1  # a place that was freed was last seen before this step

    @staticmethod
    def _free(entries, places, evictable):
        by_place = {entry[0]: entry for entry in entries.values()}
        free = []
        for place in range(places):
            if place not in by_place:
                free.append((0, -(10**9), place))
            elif evictable(by_place[place]):
                free.append((by_place[place][1], by_place[place][2], place))
        return [place for *_, place in sorted(free)]


def reset(table, rows, high, low):
    """First values of admitted rows: a function of the id."""
    values = hashed_normal(KEY, high ^ (low * jnp.uint32(31)), (DIM,))
    return table.at[rows].set(values, mode="drop")


def first_values(id):
    high, low = split_ids(np.array([id], np.int64))
    return np.asarray(hashed_normal(KEY, jnp.asarray(high ^ (low * np.uint32(31))), (DIM,)))[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def dynamic_step(config, exchange, live, waiting, table, high, low, step):
    return translate(
        config, live, waiting, high, low, step=step, on_admission=reset, tables=table, exchange=exchange
    )


class Engine:
    """The device side of the same: state on a mesh."""

    def __init__(self, config, mesh, exchange):
        self.config, self.mesh, self.exchange = config, mesh, exchange
        row = sharding(mesh, "row")
        self.live, self.waiting = jax.device_put(init_ids(config), row)
        self.table = jax.device_put(np.zeros((padded_buckets(config) * config.ways, DIM), np.float32), row)

    def step(self, ids, step):
        high, low = jax.device_put(split_ids(ids), sharding(self.mesh, "batch"))
        found, self.live, self.waiting, self.table, metrics = dynamic_step(
            self.config, self.exchange, self.live, self.waiting, self.table, high, low, np.int32(step)
        )
        return found, metrics

    def row(self, bucket, way):
        """Physical row of a bucket's way."""
        shards = self.mesh.size
        local = padded_buckets(self.config) // shards
        return (bucket % shards * local + bucket // shards) * self.config.ways + way


def check(engine, model, ids, step):
    found, metrics = engine.step(ids, step)
    expected, admitted = model.step(ids.reshape(-1), step)
    shards = engine.mesh.size
    local_rows = padded_buckets(engine.config) // shards * engine.config.ways
    owners, rows = np.asarray(found.owners).reshape(-1), np.asarray(found.rows).reshape(-1)
    table = np.asarray(engine.table)
    for id, owner, row in zip(ids.reshape(-1).tolist(), owners, rows, strict=True):
        home = expected.get(id)
        if home is None:
            assert owner == shards
        else:
            assert owner * local_rows + row == engine.row(*home)
    for id in admitted:
        np.testing.assert_allclose(table[engine.row(*expected[id])], first_values(id), rtol=1e-6)
    assert int(metrics.admitted) == len(admitted)
    assert int(metrics.live) == sum(home is not None for home in expected.values())
    # No two live ids share a row, and what is live is what the model says.
    live = jax.tree.map(np.asarray, engine.live)
    there = live.counts > 0
    words = (live.high.astype(np.uint64) << np.uint64(32) | live.low)[there]
    assert len(np.unique(words)) == len(words)
    counts = {id: entry[1] for bucket in model.live for id, entry in bucket.items()}
    assert dict(zip(words.view(np.int64).tolist(), live.counts[there].tolist(), strict=True)) == counts
    return metrics


@pytest.mark.parametrize("transport", ["padded", "ragged"])
def test_the_rules_hold_on_every_mesh(mesh, transport):
    rng = np.random.default_rng(0)
    universe = rng.integers(-(2**62), 2**62, 40)
    engine, model = Engine(CONFIG, mesh, Exchange(transport=transport)), Model(CONFIG)
    evicted = forgotten = 0
    for step in range(12):
        ids = universe[np.minimum(rng.zipf(1.3, (8, 4)) - 1, 39)]
        ids[rng.random(ids.shape) < 0.1] = 0
        metrics = check(engine, model, ids, step)
        evicted += int(metrics.evicted)
        forgotten += int(metrics.forgotten)
    assert evicted and forgotten


@given(data=st.data())
@settings(max_examples=15)
def test_any_stream_follows_the_rules(data):
    mesh = make_mesh(data.draw(st.sampled_from([(8, 1), (2, 4)])))
    ids = st.one_of(st.integers(0, 12), st.integers(-(2**63), 2**63 - 1))
    with jax.set_mesh(mesh):
        engine, model = Engine(CONFIG, mesh, Exchange()), Model(CONFIG)
        step = 0
        for batch in data.draw(st.lists(st.lists(ids, min_size=16, max_size=16), min_size=1, max_size=6)):
            check(engine, model, np.array(batch, np.int64).reshape(8, 2), step)
            step += data.draw(st.integers(0, 3))


def test_small_lanes_take_more_rounds_and_give_the_same(mesh):
    # Without evictions even a bucket that is cut over several rounds ends as the rules say.
    config = DynamicIds(buckets=16, ways=4, waiting=4, admit_after=1, evict_after_steps=100)
    engine, model = Engine(config, mesh, Exchange(capacity=1)), Model(config)
    rng = np.random.default_rng(1)
    rounds = sum(int(check(engine, model, rng.integers(1, 60, (8, 6)), 2 * k).extra_rounds) for k in range(4))
    assert rounds > 0


def test_state_moves_to_another_number_of_devices():
    config = DynamicIds(buckets=10, ways=2, waiting=2, admit_after=1, evict_after_steps=5)
    rng, model = np.random.default_rng(2), Model(config)
    engine = None
    for step, devices in enumerate([8, 8, 2, 2, 4, 8]):
        mesh = make_mesh((devices, 1), jax.devices()[:devices])
        with jax.set_mesh(mesh):
            fresh = Engine(config, mesh, Exchange())
            if engine is not None:
                move(engine, fresh, config)
            engine = fresh
            check(engine, model, rng.integers(1, 30, (8, 4)), step)


def move(old, new, config):
    """Through the checkpoint's order, as `training.state` does with every table."""

    def logical(array):
        with jax.set_mesh(old.mesh):
            wide = jax.jit(lambda x: to_logical(x.reshape(padded_buckets(config), -1), config.buckets))
            return np.asarray(wide(array))

    def physical(stored, like):
        restore = jax.jit(
            lambda x: from_logical(x, config.buckets).reshape(like.shape),
            out_shardings=sharding(new.mesh, "row"),
        )
        return restore(stored)

    stored = jax.tree.map(logical, (old.live, old.waiting, old.table))
    new.live, new.waiting, new.table = jax.tree.map(physical, stored, (new.live, new.waiting, new.table))


def test_translated_ids_train(mesh):
    config = DynamicIds(buckets=64, ways=4)
    engine = Engine(config, mesh, Exchange())
    ids = np.random.default_rng(0).integers(1, 2**62, (8, 4))
    ids[:, 0] = 7
    found, _ = engine.step(ids, 0)
    per_shard = engine.table.shape[0] // mesh.size

    def train(table, found):
        rows, route, _ = look_up({"t": table}, {"x": found})
        sparse = collect(route, {"x": jnp.ones_like(rows["t"]["x"])}, rows_per_shard=per_shard)
        return rows["t"]["x"], update(Sgd(), table, {}, sparse, rate=0.5)[0]

    before, table = jax.jit(train)(engine.table, found)
    after = jax.jit(lambda t, f: look_up({"t": t}, {"x": f})[0]["t"]["x"])(table, found)
    moved = np.where(ids == 7, 8 * 0.5, 0.5)[..., None]  # one id has eight gradients of one
    np.testing.assert_allclose(before - after, np.broadcast_to(moved, before.shape), rtol=1e-5)


@pytest.mark.parametrize("field", ["buckets", "ways", "waiting", "admit_after", "evict_after_steps"])
def test_bad_rules_are_refused(field):
    with pytest.raises(ValueError, match=f"DynamicIds.{field}=0 must be at least 1"):
        DynamicIds(**{"buckets": 1, field: 0})
