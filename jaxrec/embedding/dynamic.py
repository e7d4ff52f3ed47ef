"""Dynamic ids: rows for unbounded 64-bit ids, admitted after some sightings, evicted when idle.

An id is hashed to a bucket of `ways` rows, and lives in one of them; so no two live ids share a row, whatever the
hash does. Beside its rows a bucket remembers `waiting` ids that are not admitted yet, with their counts. All of it is
arrays `[buckets, ...]` that lie over the devices as the rows of a table do (bucket b on device b mod N), are part of
the train state, and restore onto any number of devices.

`translate` is a step of its own before the look-up: ids go to the owners of their buckets, which count them, admit,
evict and answer with rows; new rows are set to their initial values there and then. What comes back are pairs (owner,
row), `engine.Located`, which `engine.look_up` takes in place of ids. Device integers have 32 bits, so an id is two
uint32 words.

B = buckets, W = ways, V = waiting places, N = devices, T = ids of a device, K = distinct ids received by a device.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from jaxrec.core.hashing import mixed
from jaxrec.core.mesh import ALL_AXES
from jaxrec.core.partition import spec
from jaxrec.core.placement import num_shards
from jaxrec.embedding.engine import Exchange, Located
from jaxrec.embedding.exchange import (
    NO_KEY,
    Lanes,
    Route,
    further_rounds,
    make_route,
    open_round,
    run_starts,
    sort_keys,
)

NEVER = np.iinfo(np.int32).min // 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicIds:
    """Rules of a dynamic id space.

    Attributes:
      buckets, ways: there are `buckets * ways` rows; a bucket is what must not be split over devices.
      waiting: ids per bucket that are remembered before they have a row.
      admit_after: sightings until an id gets a row.
      evict_after_steps: a row may be taken from an id that was not seen for so many steps; the least seen goes
        first, then the oldest. A younger one is never evicted: newcomers wait.
    """

    buckets: int
    ways: int = 16
    waiting: int = 16
    admit_after: int = 1
    evict_after_steps: int = 1000

    def __post_init__(self) -> None:
        for name in ("buckets", "ways", "waiting", "admit_after", "evict_after_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"DynamicIds.{name}={getattr(self, name)} must be at least 1.")

    @property
    def num_rows(self) -> int:
        """Rows in all."""
        return self.buckets * self.ways


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IdState:
    """Who lives where, and who waits; the first dim is split over the devices. Count 0 = an empty place.

    Attributes:
      high, low: words of the ids.
      counts: sightings.
      seen: step of the last sighting.
    """

    high: UInt32[Array, "b v"]
    low: UInt32[Array, "b v"]
    counts: Int[Array, "b v"]
    seen: Int[Array, "b v"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IdMetrics:
    """Of one step, over all devices: distinct ids that have a row, that were given one, that lost theirs, and that
    were neither live nor could be remembered; and the exchange's rounds beyond the first."""

    live: jax.Array
    admitted: jax.Array
    evicted: jax.Array
    forgotten: jax.Array
    extra_rounds: jax.Array


def split_ids(ids: Int[np.ndarray, "*b"]) -> tuple[UInt32[np.ndarray, "*b"], UInt32[np.ndarray, "*b"]]:
    """64-bit ids (signed or unsigned) as (high, low) words, on the host; id 0 is padding."""
    words = np.asarray(ids).astype(np.uint64, casting="unsafe")
    return (words >> np.uint64(32)).astype(np.uint32), (words & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def init_ids(config: DynamicIds) -> tuple[IdState, IdState]:
    """Empty (live, waiting); the caller places the buckets by `spec("row")`."""

    def empty(places: int) -> IdState:
        shape = (padded_buckets(config), places)
        words = jnp.zeros(shape, jnp.uint32)
        return IdState(words, words, jnp.zeros(shape, jnp.int32), jnp.full(shape, NEVER, jnp.int32))

    return empty(config.ways), empty(config.waiting)


def padded_buckets(config: DynamicIds) -> int:
    """Buckets, filled up to a multiple of the devices."""
    return -(-config.buckets // num_shards()) * num_shards()


def bucket_of(high: UInt32[Array, "*b"], low: UInt32[Array, "*b"], buckets: int) -> Int[Array, "*b"]:
    """The bucket of an id."""
    return (mixed(mixed(low) ^ high) % jnp.uint32(buckets)).astype(jnp.int32)


def translate(
    config: DynamicIds,
    live: IdState,
    waiting: IdState,
    high: UInt32[Array, "b *l"],
    low: UInt32[Array, "b *l"],
    *,
    step: Int[Array, ""],
    on_admission: Callable[[Any, Int[Array, "k"], UInt32[Array, "k"], UInt32[Array, "k"]], Any] | None = None,
    tables: Any = (),
    exchange: Exchange = Exchange(),
) -> tuple[Located, IdState, IdState, Any, IdMetrics]:
    """Counts the ids, admits and evicts, and says where each one lives.

    Args:
      high, low: words of ids whose leading dim is split over the devices; (0, 0) is padding.
      step: of training; must not fall.
      on_admission: `(shards, rows, high, low) -> shards`, inside `shard_map`: gives rows their initial values.
        Rows past the end of the shard are to be dropped.
      tables: what it changes: a tree of arrays whose rows lie over the devices.

    Returns:
      Where each id lives (owner N = nowhere), the new (live, waiting), the changed tables, metrics.
    """
    lanes = exchange.lanes(high.size // num_shards())

    def local(
        live: IdState, waiting: IdState, tables: Any, high: jax.Array, low: jax.Array, step: jax.Array
    ) -> Any:
        route, sightings = _route(config, high.reshape(-1), low.reshape(-1))

        def serve(state: Any, keys: Any, counts: Any) -> Any:
            live, waiting, tables, metrics = state
            rows, live, waiting, admitted, more = _serve(config, live, waiting, keys, counts, step)
            if on_admission is not None:
                tables = on_admission(tables, admitted, keys[1].view(jnp.uint32), keys[2].view(jnp.uint32))
            return rows, (live, waiting, tables, jax.tree.map(jnp.add, metrics, more))

        zero = jnp.int32(0)
        state = (live, waiting, tables, IdMetrics(zero, zero, zero, zero, zero))
        rows, state, rounds = _exchange(route, sightings, serve, state, lanes)
        live, waiting, tables, metrics = state
        metrics = jax.tree.map(lambda x: jax.lax.psum(x, ALL_AXES), metrics)
        metrics = dataclasses.replace(metrics, extra_rounds=rounds)
        owner = bucket_of(high, low, config.buckets) % num_shards()
        rows = rows.reshape(high.shape)
        found = Located(jnp.where(rows >= 0, owner, num_shards()), jnp.maximum(rows, 0))
        return found, live, waiting, tables, metrics

    row, batch, whole = spec("row"), spec("batch"), jax.sharding.PartitionSpec()
    return jax.shard_map(
        local,
        in_specs=(row, row, row, batch, batch, whole),
        out_specs=(batch, row, row, row, whole),
        check_vma=False,
    )(live, waiting, tables, high, low, step)


def _route(config: DynamicIds, high: jax.Array, low: jax.Array) -> tuple[Route, Int[Array, "t"]]:
    """The route of the ids, told apart by (bucket, high, low), and the sightings of each distinct one."""
    shards = num_shards()
    bucket = bucket_of(high, low, config.buckets)
    owners = jnp.where((high | low) != 0, bucket % shards, shards)
    words = (bucket // shards, high.view(jnp.int32), low.view(jnp.int32))
    route = make_route(owners, words, padded_buckets(config) // shards)
    ones = jnp.ones(route.size, jnp.int32)
    return route, jax.ops.segment_sum(ones, route.groups, num_segments=route.size, indices_are_sorted=True)


def _exchange(
    route: Route, sightings: jax.Array, serve: Any, state: Any, lanes: Lanes
) -> tuple[Int[Array, "t"], Any, Int[Array, ""]]:
    """Sends distinct ids to their owners, round by round; the row of every id, or -1."""
    if num_shards() == 1:
        rows, state = serve(state, route.keys, jnp.where(route.keys[0] != NO_KEY, sightings, 0))
        return rows[route.places], state, jnp.int32(0)

    def one_round(begins: jax.Array, state: Any) -> Any:
        this = open_round(route, begins, lanes, aligned=True)
        rows, state = serve(state, this.keys, this.send(sightings))
        return begins + this.sizes, (this.reply(rows + 1, route.places), state)

    def more(begins: jax.Array, carry: Any) -> Any:
        found, state = carry
        begins, (answers, state) = one_round(begins, state)
        return begins, (found + answers, state)

    begins, first = one_round(route.starts[:-1], state)
    (found, state), rounds = further_rounds(route, begins, first, more)
    return found - 1, state, rounds


def _serve(
    config: DynamicIds, live: IdState, waiting: IdState, keys: Any, counts: jax.Array, step: jax.Array
) -> tuple[Int[Array, "k"], IdState, IdState, Int[Array, "k"], IdMetrics]:
    """One owner's work on the ids that it received (the same id from several devices among them).

    Returns rows (-1 = none), the new state, the rows that were just given away (past the end = none), metrics.
    """
    num_buckets = live.counts.shape[0]
    size = counts.size
    ordered, order = sort_keys(keys)
    new = run_starts(ordered)
    group = jnp.cumsum(new) - 1
    total = jax.ops.segment_sum(counts[order], group, num_segments=size, indices_are_sorted=True)
    # One entry per distinct id, in order; the rest has no bucket.
    bucket, high, low = (
        jnp.full(size, NO_KEY, jnp.int32).at[group].set(word, indices_are_sorted=True) for word in ordered
    )
    bucket = jnp.where(bucket < num_buckets, bucket, num_buckets)
    ids = (high.view(jnp.uint32), low.view(jnp.uint32))

    # 1. The living are counted and marked as seen, before anyone may be evicted.
    home, is_live = _find(live, bucket, *ids)
    at = (jnp.where(is_live, bucket, num_buckets), home)
    live = dataclasses.replace(
        live,
        counts=live.counts.at[at].add(total, mode="drop"),
        seen=live.seen.at[at].set(step, mode="drop"),
    )
    # 2. So are those who wait; the others start with what was seen of them now.
    place, is_waiting = _find(waiting, bucket, *ids)
    before = waiting.counts.at[bucket, place].get(mode="fill", fill_value=0)
    sightings = total + jnp.where(is_waiting, before, 0)
    newcomer = ~is_live & (bucket < num_buckets)
    # 3. Those seen often enough take the ways that their bucket can spare, in the order of their ids.
    wants = newcomer & (sightings >= config.admit_after)
    idle = (live.counts == 0) | (live.seen <= step - config.evict_after_steps)
    way, gets = _assign(wants, bucket, live, idle)
    taken = (jnp.where(gets, bucket, num_buckets), way)
    evicted = gets & (live.counts.at[taken].get(mode="fill", fill_value=0) > 0)
    live = _put(live, taken, *ids, sightings, step)
    gone = (jnp.where(gets & is_waiting, bucket, num_buckets), place)
    waiting = dataclasses.replace(waiting, counts=waiting.counts.at[gone].set(0, mode="drop"))
    # 4. The others are remembered: where they were, or in an empty or the stalest waiting place.
    stays = newcomer & ~gets
    known = (jnp.where(stays & is_waiting, bucket, num_buckets), place)
    waiting = _put(waiting, known, *ids, sightings, step)
    place, remembered = _assign(stays & ~is_waiting, bucket, waiting, waiting.seen < step)
    waiting = _put(waiting, (jnp.where(remembered, bucket, num_buckets), place), *ids, sightings, step)

    has_row = is_live | gets
    row = jnp.where(has_row, bucket * config.ways + jnp.where(gets, way, home), -1)
    answers = jnp.zeros(size, jnp.int32).at[order].set(row[group], unique_indices=True)
    none = num_buckets * config.ways
    admitted = jnp.where(gets, row, none)
    count = lambda there: jnp.sum(there, dtype=jnp.int32)  # noqa: E731
    forgotten = count(stays & ~is_waiting & ~remembered)
    metrics = IdMetrics(count(has_row), count(gets), count(evicted), forgotten, jnp.int32(0))
    # The caller sees ids in its own order; of repeated ones the first stands for all.
    leader = jnp.zeros(size, bool).at[order].set(new, unique_indices=True)
    admitted = jnp.zeros(size, jnp.int32).at[order].set(admitted[group], unique_indices=True)
    return answers, live, waiting, jnp.where(leader, admitted, none), metrics


def _find(
    state: IdState, bucket: Int[Array, "k"], high: UInt32[Array, "k"], low: UInt32[Array, "k"]
) -> tuple[Int[Array, "k"], Bool[Array, "k"]]:
    """The place of each id in its bucket, and whether it is there."""
    get = lambda array: array.at[bucket].get(mode="fill", fill_value=0)  # noqa: E731
    match = (get(state.counts) > 0) & (get(state.high) == high[:, None]) & (get(state.low) == low[:, None])
    return jnp.argmax(match, 1).astype(jnp.int32), match.any(1)


def _put(
    state: IdState, at: Any, high: jax.Array, low: jax.Array, counts: jax.Array, step: jax.Array
) -> IdState:
    put = lambda array, value: array.at[at].set(value, mode="drop")  # noqa: E731
    return IdState(
        put(state.high, high), put(state.low, low), put(state.counts, counts), put(state.seen, step)
    )


def _assign(
    wants: Bool[Array, "k"], bucket: Int[Array, "k"], state: IdState, free: Bool[Array, "b v"]
) -> tuple[Int[Array, "k"], Bool[Array, "k"]]:
    """Gives those who want one a free place of their bucket: empty ones first, then the least counted, the oldest.

    `bucket` is sorted; the first of a bucket chooses first. Returns places, and who got one.
    """
    rank = jnp.cumsum(wants) - wants
    starts = jnp.searchsorted(bucket, bucket, side="left")
    rank = (rank - rank[starts]).astype(jnp.int32)
    get = lambda array: array.at[bucket].get(mode="fill", fill_value=0)  # noqa: E731
    free, counts, seen = get(free), get(state.counts), get(state.seen)
    places = state.counts.shape[1]
    columns = jnp.broadcast_to(jnp.arange(places, dtype=jnp.int32), counts.shape)
    # Places that are not free sort last. Four keys over a few places a bucket.
    *_, choice = jax.lax.sort((~free, counts, seen, columns), dimension=1, num_keys=3, is_stable=True)
    gets = wants & (rank < jnp.sum(free, 1))
    return jnp.take_along_axis(choice, jnp.minimum(rank, places - 1)[:, None], 1)[:, 0], gets
