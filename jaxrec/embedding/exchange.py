"""Routing of ids to the devices that own their rows, of rows back, and of row gradients to their owners.

Everything here runs inside `shard_map` and sees one device's part.

A device's ids are sorted by (owner, row) and deduplicated once; that order is the route, for the look-up and for
the gradients. Rows travel in rounds, of at most `capacity` rows from one device to one owner. The first round is laid
out so that it nearly always suffices (`round_capacity`) and is straight-line code, which XLA may overlap with other
work; what does not fit goes in further rounds of a `while_loop`, so that no skew loses an id. Gradients travel in
*aligned* rounds: all devices send an owner the same range of its rows, so that an owner has every gradient of a row
in one round, which is what makes nonlinear optimizers exact whatever the number of rounds.

Two transports carry the rows. `padded` is an all-to-all of equal blocks: it runs everywhere, and on N devices it
carries `N * capacity` rows however many are real (3.5 times the ids at 1,024 devices and 8 ids a pair). `ragged`
carries the real ones (TPU and GPU; emulated on a CPU, for tests). Ids always travel padded: they are 4 bytes each.

N = devices, T = ids of this device, U = its distinct rows (U <= T), C = capacity, M = rows received in a round,
R = rows on a device, D = dim.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from jaxrec.core.mesh import ALL_AXES
from jaxrec.core.placement import num_shards

Transport = Literal["padded", "ragged"]
OVERFLOW_PROBABILITY = 0.01
SCOPE = "exchange"  # in the names of a compiled program's operations: profiles and the planner tell them apart by it
NO_KEY = jnp.iinfo(jnp.int32).max


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lanes:
    """The static shape of an exchange.

    Attributes:
      capacity: rows that one device sends one owner in a round, at most.
      received: rows that a device receives in a round, at most; `ragged` only.
    """

    transport: Transport
    capacity: int
    received: int


def make_lanes(num_ids: int, transport: Transport = "padded", capacity: int | None = None) -> Lanes:
    """Lanes for `num_ids` ids a device; `capacity` None = what 99 % of the steps with uniform ids fit into."""
    shards = num_shards()
    capacity = capacity or round_capacity(num_ids, shards)
    received = min(shards * capacity, max(shards, _upper(num_ids, shards)))
    return Lanes(transport=transport, capacity=capacity, received=received)


def round_capacity(num_ids: int, shards: int) -> int:
    """Ids that a device sends one owner in a round: the least that uniform ids overflow in 1 % of the steps.

    The number of a device's ids that one owner holds is close to Poisson with mean `num_ids / shards`; the bound
    is over all `shards`^2 pairs. Duplicates, which travel once, only lower the load.
    """
    if shards == 1:
        return num_ids
    return min(num_ids, -(-_upper(num_ids / shards, shards**2) // 8) * 8)


def _upper(mean: float, draws: int) -> int:
    """The least c that none of `draws` Poisson variables exceeds, but for 1 %: Chernoff's bound, by bisection."""
    target = math.log(OVERFLOW_PROBABILITY / draws)
    low, high = math.ceil(mean), math.ceil(mean) * 2 + 64
    while low < high:
        middle = (low + high) // 2
        exponent = middle - mean - middle * math.log(middle / mean) if middle > mean > 0 else 0.0
        low, high = (low, middle) if exponent <= target else (middle + 1, high)
    return low


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Route:
    """What one device wants, sorted: valid for every table that is asked for the same ids.

    Attributes:
      keys: words of the distinct ids, sorted by (owner, first word, second word, ...); `NO_KEY` past the last. The
        first word of a table's ids is the row as its owner numbers it.
      starts: where each owner's ids begin in `keys`; the last entry is U.
      order: sorts this device's ids.
      groups: for each sorted id, its place in `keys`.
      places: for each id in its own order, its place in `keys`.
    """

    keys: tuple[Int[Array, "t"], ...]
    starts: Int[Array, "n+1"]
    order: Int[Array, "t"]
    groups: Int[Array, "t"]
    places: Int[Array, "t"]

    @property
    def size(self) -> int:
        """T."""
        return self.places.size


@jax.named_scope(SCOPE)
def make_route(owners: Int[Array, "t"], keys: tuple[Int[Array, "t"], ...], first_bound: int) -> Route:
    """The route of ids that are told apart by (owner, *keys).

    Args:
      owners: N = nobody's (padding).
      keys: int32 words; the first lies in [0, first_bound).
    """
    shards = num_shards()
    real = owners < shards
    keys = tuple(jnp.where(real, key, 0) for key in keys)
    if (shards + 1) * first_bound <= 2**32:  # owner and first word fit one, which halves the sort
        joint = owners.astype(jnp.uint32) * first_bound + keys[0].astype(jnp.uint32)
        (joint, *rest), order = sort_keys((joint, *keys[1:]))
        owner = (joint // first_bound).astype(jnp.int32)
        ordered = ((joint - owner.astype(jnp.uint32) * first_bound).astype(jnp.int32), *rest)
    else:
        (owner, *rest), order = sort_keys((owners, *keys))
        ordered = tuple(rest)
    first = run_starts((owner, *ordered))
    groups = jnp.cumsum(first) - 1
    spread = lambda key: (  # noqa: E731
        jnp.full(key.shape, NO_KEY, jnp.int32)
        .at[groups]
        .set(jnp.where(owner < shards, key, NO_KEY), indices_are_sorted=True)
    )
    counts = jnp.zeros(shards + 1, jnp.int32).at[owner].add(first.astype(jnp.int32), indices_are_sorted=True)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts[:shards])])
    places = jnp.zeros(groups.shape, groups.dtype).at[order].set(groups, unique_indices=True)
    return Route(tuple(spread(key) for key in ordered), starts, order, groups, places)


def sort_keys(
    keys: tuple[Integer[Array, "t"], ...],
) -> tuple[tuple[Integer[Array, "t"], ...], Int[Array, "t"]]:
    """Sorts by the first word, then by the next; the sorted words, and the positions that they came from."""
    positions = jnp.arange(keys[0].size, dtype=jnp.int32)
    *ordered, order = jax.lax.sort((*keys, positions), num_keys=len(keys), is_stable=True)
    return tuple(ordered), order


def run_starts(ordered: tuple[Integer[Array, "t"], ...]) -> Bool[Array, "t"]:
    """True where a run of equal keys begins."""
    new = jnp.zeros(max(0, ordered[0].size - 1), bool)
    for key in ordered:
        new |= key[1:] != key[:-1]
    return jnp.concatenate([jnp.ones(min(1, ordered[0].size), bool), new])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Round:
    """One round, seen from one device: what it sends each owner, and what it received as an owner.

    Attributes:
      begins, sizes: the ids `keys[begins : begins + sizes]` go to each owner.
      keys: words of the received ids, `NO_KEY` in empty places; `[N * C]` padded, `[M]` ragged.
      offsets, counts: where each sender's ids lie in `keys`, and how many they are.
      lanes: static.
    """

    begins: Int[Array, "n"]
    sizes: Int[Array, "n"]
    keys: tuple[Int[Array, "m"], ...]
    offsets: Int[Array, "n"]
    counts: Int[Array, "n"]
    lanes: Lanes = dataclasses.field(metadata={"static": True})

    @jax.named_scope(SCOPE)
    def send(self, values: Array) -> Array:
        """Values of this device's ids `[T, ...]`, at the owners: `[m, ...]`, zeros in empty places."""
        if self.lanes.transport == "padded":
            return _swap(_take(values, self._cells()))
        landing = jnp.zeros((self.lanes.received, *values.shape[1:]), values.dtype)
        return _ragged(values, landing, self.begins, self.sizes, _swap(self.offsets), self.counts)

    @jax.named_scope(SCOPE)
    def reply(self, answers: Array, places: Int[Array, "k"]) -> Array:
        """The owners' answers `[m, ...]` to the ids at `places`; zeros for ids that this round did not send."""
        if self.lanes.transport == "ragged":
            landing = jnp.zeros((places.size, *answers.shape[1:]), answers.dtype)
            return _take(
                _ragged(answers, landing, self.offsets, self.counts, _swap(self.begins), self.sizes), places
            )
        owners = jnp.searchsorted(self.begins, places, side="right").astype(jnp.int32) - 1
        ranks = places - self.begins[owners]
        here = (owners >= 0) & (ranks < self.sizes[owners])
        slots = jnp.where(here, owners * self.lanes.capacity + ranks, answers.shape[0])
        return _take(_swap(answers), slots)

    def _cells(self) -> Int[Array, "m"]:
        return _cells(self.begins, self.sizes, self.lanes.capacity)


def _cells(begins: Int[Array, "n"], sizes: Int[Array, "n"], capacity: int) -> Int[Array, "m"]:
    """Places of the ids of a round, an owner's after another's, `capacity` for each; out of range = none."""
    ranks = jnp.arange(capacity, dtype=jnp.int32)
    return jnp.where(ranks < sizes[:, None], begins[:, None] + ranks, NO_KEY).reshape(-1)


@jax.named_scope(SCOPE)
def open_round(route: Route, begins: Int[Array, "n"], lanes: Lanes, *, aligned: bool) -> Round:
    """Sends the next ids from `begins` on to their owners.

    Chooses what to send, within the lanes and (aligned) within the range that all devices can send.
    """
    sizes = jnp.minimum(route.starts[1:] - begins, lanes.capacity)
    if lanes.transport == "ragged":
        # Where the senders' full lanes are more than an owner can take, everyone keeps to its share.
        fits = jax.lax.pmax(jnp.sum(_swap(sizes)), ALL_AXES) <= lanes.received
        sizes = jnp.where(fits, sizes, jnp.minimum(sizes, lanes.received // num_shards()))
    if aligned:
        sizes = _align(route, begins, sizes, lanes.capacity)
    received = tuple(_swap(_take(key, _cells(begins, sizes, lanes.capacity), NO_KEY)) for key in route.keys)
    counts = jnp.sum((received[0] != NO_KEY).reshape(num_shards(), -1), 1, dtype=jnp.int32)
    if lanes.transport == "padded":
        offsets = jnp.arange(num_shards(), dtype=jnp.int32) * lanes.capacity
        return Round(begins, sizes, received, offsets, counts, lanes)
    ends = jnp.cumsum(counts)
    place = jnp.arange(lanes.received, dtype=jnp.int32)
    sender = jnp.searchsorted(ends, place, side="right").astype(jnp.int32)
    slot = sender * lanes.capacity + place - (ends - counts)[sender]
    slot = jnp.where(place < ends[-1], slot, NO_KEY)
    return Round(
        begins, sizes, tuple(_take(key, slot, NO_KEY) for key in received), ends - counts, counts, lanes
    )


def _align(route: Route, begins: Int[Array, "n"], sizes: Int[Array, "n"], capacity: int) -> Int[Array, "n"]:
    """Shortens what is sent to the ids below the first that some device cannot send this round.

    Whole first words (a row, a bucket of ids) stay together, unless one alone is more than a device may send.
    """
    after = begins + sizes
    left = after < route.starts[1:]
    limit = _least(tuple(jnp.where(left, _take(key, after, NO_KEY), NO_KEY) for key in route.keys))
    if len(route.keys) > 1:
        some = begins < route.starts[1:]
        (lowest,) = _least((jnp.where(some, _take(route.keys[0], begins, NO_KEY), NO_KEY),))
        whole = lowest < limit[0]
        limit = (limit[0], *(jnp.where(whole, jnp.iinfo(jnp.int32).min, word) for word in limit[1:]))
    cells = _cells(begins, sizes, capacity)
    below, equal = jnp.zeros((num_shards(), capacity), bool), jnp.ones((num_shards(), capacity), bool)
    for key, word in zip(route.keys, limit, strict=True):
        mine = _take(key, cells, NO_KEY).reshape(below.shape)
        below |= equal & (mine < word[:, None])
        equal &= mine == word[:, None]
    return jnp.sum(below, 1, dtype=jnp.int32)


def _least(words: tuple[Int[Array, "n"], ...]) -> tuple[Int[Array, "n"], ...]:
    """For each owner, the least of all devices' multi-word keys."""
    found: list[jax.Array] = []
    tied = jnp.ones(words[0].shape, bool)
    for word in words:
        found.append(jax.lax.pmin(jnp.where(tied, word, NO_KEY), ALL_AXES))
        tied &= word == found[-1]
    return tuple(found)


def fetch(tables: Any, route: Route, wanted: Int[Array, "t"], lanes: Lanes) -> tuple[Any, Int[Array, ""]]:
    """The rows of every id, `[T, D]` per table, and the rounds that were needed beyond the first.

    Args:
      tables: a tree of this device's shards `[R, D]`, all addressed by the same ids. Padding gets zeros.
      wanted: the ids' rows at their owners, `NO_KEY` for padding; one device that owns everything needs no route.
    """
    if num_shards() == 1:
        return jax.tree.map(lambda table: _take(table, wanted), tables), jnp.int32(0)

    def one_round(begins: jax.Array) -> tuple[Any, jax.Array]:
        this = open_round(route, begins, lanes, aligned=False)
        answer = lambda table: this.reply(_take(table, this.keys[0]), route.places)  # noqa: E731
        return jax.tree.map(answer, tables), begins + this.sizes

    def more(begins: jax.Array, found: Any) -> tuple[jax.Array, Any]:
        # Each id is answered in one round, by zeros in the others.
        answers, begins = one_round(begins)
        return begins, jax.tree.map(jnp.add, found, answers)

    found, begins = one_round(route.starts[:-1])
    return further_rounds(route, begins, found, more)


@jax.named_scope(SCOPE)
def further_rounds(
    route: Route,
    begins: Int[Array, "n"],
    state: Any,
    one_round: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
) -> tuple[Any, Int[Array, ""]]:
    """Runs `one_round(begins, state) -> (begins, state)` until no device has ids left to send.

    Returns the last state and the number of rounds.
    """

    def unfinished(begins: jax.Array) -> jax.Array:
        return jax.lax.pmax(jnp.any(begins < route.starts[1:]), ALL_AXES)

    def more(carry: Any) -> Any:
        begins, rounds, _, state = carry
        begins, state = one_round(begins, state)
        return begins, rounds + 1, unfinished(begins), state

    start = (begins, jnp.int32(0), unfinished(begins), state)
    _, rounds, _, state = jax.lax.while_loop(lambda carry: carry[2], more, start)
    return state, rounds


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OwnedGradients:
    """Gradients of some rows of this device, complete and one a row.

    Attributes:
      rows: strictly rising; fillers from `R` on.
      sums: over all devices' ids; zero for fillers.
    """

    rows: Int[Array, "u"]
    sums: Float[Array, "u D"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PushedGradients:
    """Row gradients on their way: the first round at the owners, the rest still at the senders.

    Attributes:
      owned: what the first round brought this device.
      route: of this device's ids.
      summed: this device's sums, in the order of `route.keys`.
      sent: for each owner, the end of what the first round took.
    """

    owned: OwnedGradients
    route: Route
    summed: Float[Array, "t D"]
    sent: Int[Array, "n"]


@jax.named_scope(SCOPE)
def push(gradients: Float[Array, "t D"], route: Route, lanes: Lanes, rows_per_shard: int) -> PushedGradients:
    """Sums this device's gradients per row and sends the owners the first round of them."""
    summed = jax.ops.segment_sum(
        gradients[route.order], route.groups, num_segments=route.size, indices_are_sorted=True
    )
    if num_shards() == 1:
        # Padding's group is the last; its row is out of range, as are the fillers that follow.
        fillers = rows_per_shard + jnp.arange(route.size, dtype=jnp.int32)
        rows = jnp.where(route.keys[0] < rows_per_shard, route.keys[0], fillers)
        return PushedGradients(OwnedGradients(rows, summed), route, summed, route.starts[1:])
    owned, sent = _push_round(route, summed, route.starts[:-1], lanes, rows_per_shard)
    return PushedGradients(owned, route, summed, sent)


def fold(
    apply: Callable[[Any, OwnedGradients], Any],
    initial: Any,
    pushed: PushedGradients,
    lanes: Lanes,
    rows_per_shard: int,
) -> tuple[Any, Int[Array, ""]]:
    """Folds `apply` over the gradients of this device's rows, round by round; a row occurs in one call alone.

    Returns the last state and the number of rounds beyond the first.
    """
    state = apply(initial, pushed.owned)
    if num_shards() == 1:
        return state, jnp.int32(0)

    def more(begins: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        owned, begins = _push_round(pushed.route, pushed.summed, begins, lanes, rows_per_shard)
        return begins, apply(state, owned)

    return further_rounds(pushed.route, pushed.sent, state, more)


def _push_round(
    route: Route, summed: Float[Array, "t D"], begins: Int[Array, "n"], lanes: Lanes, rows_per_shard: int
) -> tuple[OwnedGradients, Int[Array, "n"]]:
    this = open_round(route, begins, lanes, aligned=True)
    return merge(this.keys[0], this.send(summed), rows_per_shard), begins + this.sizes


@jax.named_scope(SCOPE)
def merge(rows: Int[Array, "m"], gradients: Float[Array, "m D"], rows_per_shard: int) -> OwnedGradients:
    """Sums the gradients of equal rows; rows from `rows_per_shard` on are dropped."""
    (ordered,), order = sort_keys((rows,))
    groups = jnp.cumsum(run_starts((ordered,))) - 1
    fillers = rows_per_shard + jnp.arange(rows.size, dtype=jnp.int32)
    distinct = fillers.at[groups].set(ordered, indices_are_sorted=True)
    # Dropped rows form the last groups; what follows the real ones must keep rising for sorted scatters.
    distinct = jnp.where(distinct >= rows_per_shard, fillers, distinct)
    sums = jax.ops.segment_sum(gradients[order], groups, num_segments=rows.size, indices_are_sorted=True)
    return OwnedGradients(distinct, sums)


def _swap(blocks: Array) -> Array:
    """Of N equal blocks along the first dim, block i to device i; the result's block i is what device i sent."""
    return jax.lax.all_to_all(blocks, ALL_AXES, 0, 0, tiled=True)


def _ragged(  # type: ignore[no-untyped-def]
    values, landing, begins, sizes, landing_begins, counts
) -> Array:
    """`values[begins : begins + sizes]` to each device, into its `landing` from `landing_begins` on."""
    native = lambda *a: jax.lax.ragged_all_to_all(*a, axis_name=ALL_AXES)  # noqa: E731
    arguments = (values, landing, begins, sizes, landing_begins, counts)
    return jax.lax.platform_dependent(*arguments, cpu=_ragged_by_gathering, default=native)


def _ragged_by_gathering(values, landing, begins, sizes, landing_begins, counts) -> Array:  # type: ignore[no-untyped-def]
    """What a CPU has no collective for, at the price of gathering everything: for tests."""
    me = jax.lax.axis_index(ALL_AXES)
    everything = jax.lax.all_gather(values, ALL_AXES)
    begins, sizes, landing_begins = (
        jax.lax.all_gather(x, ALL_AXES)[:, me] for x in (begins, sizes, landing_begins)
    )
    place = jnp.arange(landing.shape[0])[:, None]
    covered = (place >= landing_begins) & (place < landing_begins + sizes)
    sender = jnp.argmax(covered, 1)
    source = place[:, 0] - landing_begins[sender] + begins[sender]
    found = everything[sender, jnp.clip(source, 0, values.shape[0] - 1)]
    return jnp.where(covered.any(1).reshape(-1, *(1,) * (values.ndim - 1)), found, landing)


def _take(array: Array, index: Int[Array, "k"], fill: int = 0) -> Array:
    """Rows of `array`; `fill` where the index is past its end."""
    return array.at[index].get(mode="fill", fill_value=fill)
