"""Five million 64-bit ids through a table of a million rows, on 8 virtual devices: admission, eviction, resharding.

Each step shows 100,000 ids that were never seen before, the same ones that the step before introduced, and 50,000
regulars. An id gets a row at its second sighting and may lose it when it has not been seen for three steps, so the
table fills up and from then on lives on evictions. After every step everything is read back and checked against what
the host knows of the stream (`check`). At the end the state goes through a checkpoint's order onto 2 and onto 4
devices, and the next step must give there what it gives on 8. Docs: docs/embedding.md.

    python benchmarks/dynamic_ids.py      # about five minutes on 2 cores
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import record

from jaxrec.core.hashing import mixed
from jaxrec.core.mesh import make_mesh
from jaxrec.core.partition import sharding
from jaxrec.embedding.dynamic import DynamicIds, bucket_of, init_ids, padded_buckets, split_ids, translate
from jaxrec.embedding.table import from_logical, to_logical

DEVICES = 8
ROWS = DynamicIds(buckets=62_500, ways=16, waiting=16, admit_after=2, evict_after_steps=3)
MISSES_ALLOWED = (
    0.001  # of the ids that have earned a row: a bucket may be full of ids that are too young to go
)


def id_of(index: np.ndarray) -> np.ndarray:
    """The 64-bit id of a running number: a bijection that spreads over all bits. Source: Steele, Lea and Flood,
    OOPSLA 2014 (SplitMix64)."""
    x = index.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def stamp(high: jax.Array, low: jax.Array) -> jax.Array:
    """What a fresh row holds: a function of the id."""
    return (mixed(mixed(high) ^ low) >> 8).astype(jnp.float32)


def on_admission(table: jax.Array, rows: jax.Array, high: jax.Array, low: jax.Array) -> jax.Array:
    """Stamps the rows that were given away."""
    return table.at[rows].set(stamp(high, low), mode="drop")


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2, 3))
def step_of(
    config: DynamicIds, live: Any, waiting: Any, table: jax.Array, high: Any, low: Any, step: Any
) -> Any:
    """One step on the devices."""
    return translate(config, live, waiting, high, low, step=step, on_admission=on_admission, tables=table)


class Table:
    """The device side: who lives where, who waits, and the rows, on a mesh of so many devices."""

    def __init__(self, config: DynamicIds, devices: int):
        self.config, self.mesh = config, make_mesh((devices, 1), jax.devices()[:devices])
        with jax.set_mesh(self.mesh):
            row = sharding(self.mesh, "row")
            self.live, self.waiting = jax.device_put(init_ids(config), row)
            self.rows = jax.device_put(np.zeros(padded_buckets(config) * config.ways, np.float32), row)

    def step(self, ids: np.ndarray, step: int) -> tuple[np.ndarray, Any]:
        """Where each id lives, as a row of the whole table in the order of the buckets (-1 = nowhere), and metrics."""
        with jax.set_mesh(self.mesh):
            words = jax.device_put(split_ids(ids), sharding(self.mesh, "batch"))
            found, self.live, self.waiting, self.rows, metrics = step_of(
                self.config, self.live, self.waiting, self.rows, *words, np.int32(step)
            )
        owners, local = np.asarray(found.owners).astype(np.int64), np.asarray(found.rows).astype(np.int64)
        bucket, way = np.divmod(local, self.config.ways)
        row = (bucket * self.mesh.size + owners) * self.config.ways + way
        return np.where(owners < self.mesh.size, row, -1), jax.device_get(metrics)

    def logical(self) -> dict[str, Any]:
        """Everything in a checkpoint's order: bucket by bucket."""
        with jax.set_mesh(self.mesh):
            buckets = padded_buckets(self.config)
            order = jax.jit(lambda x: to_logical(x.reshape(buckets, -1), self.config.buckets))
            state = {"live": self.live, "waiting": self.waiting, "rows": self.rows}
            return jax.tree.map(lambda x: np.asarray(order(x)), state)

    def restore(self, stored: dict[str, Any]) -> None:
        """The inverse of `logical`, on this mesh."""
        state = {"live": self.live, "waiting": self.waiting, "rows": self.rows}
        with jax.set_mesh(self.mesh):

            def place(x: np.ndarray, like: jax.Array) -> jax.Array:
                put = jax.jit(
                    lambda x: from_logical(x, self.config.buckets).reshape(like.shape),
                    out_shardings=sharding(self.mesh, "row"),
                )
                return put(x)

            state = jax.tree.map(place, stored, state)
        self.live, self.waiting, self.rows = state["live"], state["waiting"], state["rows"]


@dataclasses.dataclass
class Stream:
    """What the host knows: how often and when each running number was shown.

    Attributes:
      home: the row of each number, -1 = none; as of the step before.
    """

    sightings: np.ndarray
    last_seen: np.ndarray
    home: np.ndarray
    regulars: int
    new: int

    @classmethod
    def make(cls, distinct: int, regulars: int, new: int) -> Stream:
        """Nothing has been shown."""
        never = np.full(distinct, -(10**6), np.int64)
        return cls(np.zeros(distinct, np.int64), never, np.full(distinct, -1, np.int64), regulars, new)

    def batch(self, step: int) -> np.ndarray:
        """Running numbers of a step, in a random order: regulars, newcomers, and the newcomers of the step before."""
        first = self.regulars + step * self.new
        fresh = np.arange(first, min(first + self.new, len(self.sightings)))
        again = np.arange(max(self.regulars, first - self.new), min(first, len(self.sightings)))
        shown = np.concatenate([np.arange(self.regulars), fresh, again])
        np.add.at(self.sightings, shown, 1)
        self.last_seen[shown] = step
        return np.random.default_rng(step).permutation(shown)


def check(
    stream: Stream, shown: np.ndarray, found: np.ndarray, state: dict[str, Any], step: int
) -> dict[str, int]:
    """What must hold after every step; counts what does not."""
    live, config = state["live"], ROWS
    ids = (live.high.astype(np.uint64) << np.uint64(32)) | live.low
    ids, there = ids[: config.buckets].reshape(-1), live.counts[: config.buckets].reshape(-1) > 0
    numbers = stream_numbers(ids[there], len(stream.sightings))
    rows = np.flatnonzero(there)
    home = np.full(len(stream.home), -1, np.int64)
    home[numbers[numbers >= 0]] = rows[numbers >= 0]
    high, low = split_ids(ids[there])
    bucket = np.asarray(bucket_of(jnp.asarray(high), jnp.asarray(low), config.buckets))
    gone = (stream.home >= 0) & (home < 0)
    earned = stream.sightings[shown] >= config.admit_after
    broken = {
        "ids that were never shown": int(np.sum(numbers < 0)),
        "ids on two rows": int(there.sum() - len(np.unique(ids[there]))),
        "ids outside of their bucket": int(np.sum(bucket != rows // config.ways)),
        "answers that are not where the id lives": int(np.sum(found != home[shown])),
        "ids that moved": int(np.sum((stream.home >= 0) & (home >= 0) & (home != stream.home))),
        "ids with a row before they earned it": int(np.sum(stream.sightings[home >= 0] < config.admit_after)),
        "counts above the sightings": int(
            np.sum(live.counts[: config.buckets].reshape(-1)[there] > stream.sightings[numbers])
        ),
        "ids that were evicted too young": int(
            np.sum(stream.last_seen[gone] > step - config.evict_after_steps)
        ),
        "rows that do not hold their id's values": int(
            np.sum(
                state["rows"][: config.buckets].reshape(-1)[there]
                != np.asarray(stamp(jnp.asarray(high), jnp.asarray(low)))
            )
        ),
    }
    stream.home = home
    return broken | {
        "misses": int(np.sum(found[earned] < 0)),
        "earned": int(earned.sum()),
        "live": int(there.sum()),
    }


@functools.cache
def _sorted_ids(distinct: int) -> tuple[np.ndarray, np.ndarray]:
    ids = id_of(np.arange(distinct))
    order = np.argsort(ids)
    return ids[order], order


def stream_numbers(ids: np.ndarray, distinct: int) -> np.ndarray:
    """The running numbers of ids, -1 where there is none."""
    known, order = _sorted_ids(distinct)
    at = np.minimum(np.searchsorted(known, ids), distinct - 1)
    return np.where(known[at] == ids, order[at], -1)


def main() -> int:
    """Streams, checks after every step, moves the state to other meshes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--distinct", type=int, default=5_000_000)
    parser.add_argument("--regulars", type=int, default=50_000)
    parser.add_argument("--new", type=int, default=100_000, help="ids a step that were never seen before")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)

    stream = Stream.make(arguments.distinct, arguments.regulars, arguments.new)
    steps = -(-(arguments.distinct - arguments.regulars) // arguments.new)
    size = -(-(arguments.regulars + 2 * arguments.new) // DEVICES) * DEVICES
    table, seconds = Table(ROWS, DEVICES), []
    broken: dict[str, int] = {}
    last: dict[str, int] = {}
    totals = {"admitted": 0, "evicted": 0, "forgotten": 0, "extra_rounds": 0, "misses": 0, "earned": 0}
    for step in range(steps):
        shown = stream.batch(step)
        ids = np.zeros(size, np.uint64)
        ids[: len(shown)] = id_of(shown)
        started = time.perf_counter()
        found, metrics = table.step(ids, step)
        seconds.append(time.perf_counter() - started)
        last = check(stream, shown, found[: len(shown)], table.logical(), step)
        for name in totals:
            totals[name] += int(last[name] if name in last else getattr(metrics, name))
        for name, count in last.items():
            if name not in ("misses", "earned", "live"):
                broken[name] = broken.get(name, 0) + count
        if step % 10 == 9 or step + 1 == steps:
            print(f"step {step + 1} of {steps}: {last['live']:,} live, {totals}", flush=True)

    stored = table.logical()
    shown = np.arange(arguments.regulars)
    ids = np.zeros(size, np.uint64)
    ids[: len(shown)] = id_of(shown)
    expected, _ = table.step(ids, steps)
    moved = {}
    for devices in (2, 4):
        other = Table(ROWS, devices)
        other.restore(stored)
        moved[devices] = int(np.sum(other.step(ids, steps)[0] != expected))

    bars = [
        record.Bar(name="distinct ids", value=int(np.sum(stream.sightings > 0)), limit=arguments.distinct),
        record.Bar(name="rows of the table", value=ROWS.num_rows, limit=1_000_000, at_most=True),
        record.Bar(name="evictions", value=totals["evicted"], limit=1),
        *(record.Bar(name=name, value=count, limit=0, at_most=True) for name, count in broken.items()),
        record.Bar(
            name="ids that earned a row and got none, share",
            value=totals["misses"] / totals["earned"], limit=MISSES_ALLOWED, at_most=True,
        ),
        *(
            record.Bar(name=f"answers that differ on {devices} devices", value=count, limit=0, at_most=True)
            for devices, count in moved.items()
        ),
    ]  # fmt: skip
    figures = {
        "steps": steps, "ids_a_step": arguments.regulars + 2 * arguments.new, **totals, "live": last["live"],
        "milliseconds_a_step": 1e3 * float(np.median(seconds[1:])), "rules": dataclasses.asdict(ROWS),
    }  # fmt: skip
    return record.finish("dynamic_ids", figures, bars)


if __name__ == "__main__":
    sys.exit(main())
