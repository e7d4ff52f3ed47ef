"""Tables larger than device memory: rows on the host or on disk, the rows in use in a cache on the devices.

The host holds every row and its optimizer slots in NumPy arrays (a memory map serves). The devices hold a table of
`cache_rows` rows, which the engine looks up and updates as it does any table, by cache row in place of id. Before a
step the cache takes in the rows that the step wants and lacks, in place of those that were not wanted for longest;
what it puts out goes back to the host. Every row lives in one place at a time, with its slots, so that training gives
the bits of a table that was in memory throughout.

`prefetch` for step k + 1 is called while step k runs: the host rows are read and put on their way to the devices
then; the exchange itself waits for step k on the device, in order, and nothing waits on the host.

R = rows on the host, C = rows of the cache, K = rows that one prefetch brings in, D = dim.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxrec.core.mesh import ALL_AXES
from jaxrec.core.partition import row_major, sharding, spec
from jaxrec.core.placement import local_index, physical_rows
from jaxrec.embedding.row_optimizer import RowOptimizer
from jaxrec.embedding.table import TableSpec, fresh_rows

ROWS_AT_ONCE = 2**16  # of a table that is made on the devices for the host
Rows = dict[str, Any]  # "rows" and the optimizer's slots, by name; the leading dims are the same


@dataclasses.dataclass(frozen=True)
class CacheStatistics:
    """Of one prefetch: distinct rows that the step wants, and those of them that the cache lacked."""

    wanted: int
    missed: int

    @property
    def hit_rate(self) -> float:
        """Share of the wanted rows that were there."""
        return 1.0 - self.missed / max(1, self.wanted)


class HostTable:
    """The host's side of a cached table; one process.

    Args:
      rows: `[R, D]` and the slots `[R, ...]`, NumPy arrays or memory maps that this object changes. Row 0 is
        padding.
      cache_rows: rows that the devices hold, padding's included.
      layout: which row lies where in the cache, as `layout` gave it; None = the cache starts empty.

    Raises:
      ValueError: the cache is not smaller than the table, or cannot be split over the devices.
    """

    def __init__(
        self,
        rows: Mapping[str, np.ndarray],
        cache_rows: int,
        mesh: jax.sharding.Mesh,
        layout: Mapping[str, np.ndarray] | None = None,
    ):
        total = len(rows["rows"])
        if cache_rows % mesh.size:
            raise ValueError(
                f"cache_rows={cache_rows} does not divide over {mesh.size} devices; "
                f"use {-(-cache_rows // mesh.size) * mesh.size}."
            )
        if not 1 < cache_rows < total:
            raise ValueError(
                f"cache_rows={cache_rows} must be at least 2 and below the table's {total} rows; a table that fits "
                "the devices needs no cache."
            )
        self.host, self.cache_rows, self._mesh = dict(rows), cache_rows, mesh
        layout = empty_layout(cache_rows) if layout is None else layout
        self._id = np.array(layout["ids"])  # id in each cache row; 0 = empty
        self._last_use = np.array(layout["last_use"])
        self._place = np.zeros(total, np.int32)  # cache row of each id; 0 = not there
        self._place[self._id] = np.arange(cache_rows)
        self._place[0] = 0
        self._clock = int(self._last_use[1:].max())
        self._returning: tuple[np.ndarray, Rows] | None = None

    def layout(self) -> dict[str, np.ndarray]:
        """Which row lies where; a cache made with it sums in the same order, so that a run resumes to the bit."""
        return {"ids": self._id.copy(), "last_use": self._last_use.copy()}

    def cache(self) -> Rows:
        """The device arrays of the cache, rows split over the devices."""
        there, physical = self._cached()
        cache = {}
        for name, array in self.host.items():
            rows = np.zeros((self.cache_rows, *array.shape[1:]), array.dtype)
            rows[physical] = array[self._id[there]]
            cache[name] = jax.device_put(rows, row_major(sharding(self._mesh, "row"), rows.shape))
        return cache

    def prefetch(self, cache: Rows, ids: Int[np.ndarray, "*b"]) -> tuple[Rows, CacheStatistics]:
        """The cache with the rows of `ids` in it; `cache` is donated.

        Raises:
          ValueError: the step wants more distinct rows than the cache has.
        """
        wanted = np.unique(ids)
        wanted = wanted[wanted > 0]
        if len(wanted) >= self.cache_rows:
            raise ValueError(
                f"a step wants {len(wanted)} distinct rows, and the cache holds {self.cache_rows - 1}; raise "
                "cache_rows or make the batch smaller."
            )
        self._clock += 1
        missing = wanted[self._place[wanted] == 0]
        present = self._place[wanted[self._place[wanted] > 0]]
        self._last_use[present] = self._clock
        statistics = CacheStatistics(len(wanted), len(missing))
        if not len(missing):
            return cache, statistics
        self._finish_return()
        # The least recently wanted; a partial sort, since what leaves is a small part of the cache.
        victims = np.argpartition(self._last_use, len(missing) - 1)[: len(missing)]
        victims = np.sort(victims)
        leaving = self._id[victims]
        self._place[leaving] = 0
        self._place[0] = 0
        self._place[missing], self._id[victims] = victims, missing
        self._last_use[victims] = self._clock
        incoming = {name: array[missing] for name, array in self.host.items()}
        cache, outgoing = _swap_padded(cache, victims.astype(np.int32), incoming, self._mesh)
        self._returning = (leaving, outgoing)
        return cache, statistics

    def places(self, ids: Int[np.ndarray, "*b"]) -> Int[np.ndarray, "*b"]:
        """The cache rows of ids that the last `prefetch` brought in; padding's for ids outside of the table."""
        inside = (ids > 0) & (ids < len(self._place))
        return np.where(inside, self._place[np.where(inside, ids, 0)], 0)

    def flush(self, cache: Rows) -> None:
        """Writes every cached row back: afterwards the host's arrays are the whole table."""
        self._finish_return()
        there, physical = self._cached()
        for name, array in cache.items():
            self.host[name][self._id[there]] = np.asarray(array)[physical]

    def _cached(self) -> tuple[np.ndarray, np.ndarray]:
        """The cache rows that are in use, and where they lie in the device's array."""
        there = np.flatnonzero(self._id)
        return there, physical_rows(there, self._mesh.size, self.cache_rows // self._mesh.size)

    def _finish_return(self) -> None:
        """Takes in what the last exchange put out. It has left the devices long since, as a rule."""
        if self._returning is None:
            return
        leaving, outgoing = self._returning
        real = leaving > 0
        for name, array in outgoing.items():
            self.host[name][leaving[real]] = np.asarray(array)[: len(leaving)][real]
        self._returning = None


def init_host_rows(table: TableSpec, optimizer: RowOptimizer, key: jax.Array) -> Rows:
    """The rows and slots of a fresh table in logical order, on the host: the numbers of `table.init_table`."""
    host: Rows = {}

    @jax.jit
    def fresh(first: jax.Array) -> Rows:
        rows = fresh_rows(table, key, first + jnp.arange(ROWS_AT_ONCE, dtype=jnp.uint32))
        return {"rows": rows} | optimizer.init(rows)

    for first in range(0, table.num_rows, ROWS_AT_ONCE):
        for name, part in fresh(jnp.uint32(first)).items():
            array = host.setdefault(name, np.empty((table.num_rows, *part.shape[1:]), part.dtype))
            array[first : first + ROWS_AT_ONCE] = np.asarray(part)[: table.num_rows - first]
    return host


def empty_layout(cache_rows: int) -> dict[str, np.ndarray]:
    """The layout of a cache in which nothing is."""
    last_use = np.full(cache_rows, -1, np.int64)
    last_use[0] = np.iinfo(np.int64).max  # padding never leaves
    return {"ids": np.zeros(cache_rows, np.int64), "last_use": last_use}


def _swap_padded(
    cache: Rows, places: Int[np.ndarray, "k"], incoming: Rows, mesh: jax.sharding.Mesh
) -> tuple[Rows, Rows]:
    """`_swap` for a size of a few static ones: powers of two, so that few programs are compiled."""
    size = 1 << max(6, int(len(places) - 1).bit_length())
    missing = size - len(places)
    places = np.pad(places, (0, missing), constant_values=-1)
    incoming = {
        name: np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) for name, array in incoming.items()
    }
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = tuple((name, array.shape) for name, array in cache.items())
    return _swap_on(mesh, shapes)(cache, *jax.device_put((places, incoming), everywhere))


@functools.cache
def _swap_on(
    mesh: jax.sharding.Mesh, shapes: tuple[tuple[str, tuple[int, ...]], ...]
) -> Callable[..., tuple[Rows, Rows]]:
    where = {name: row_major(sharding(mesh, "row"), shape) for name, shape in shapes}
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(_swap, donate_argnums=0, out_shardings=(where, everywhere))


def _swap(cache: Rows, places: Int[Array, "k"], incoming: Rows) -> tuple[Rows, Rows]:
    """Puts rows into the cache and gives those that lay there."""
    whole = jax.sharding.PartitionSpec()

    def local(cache: Rows, places: jax.Array, incoming: Rows) -> tuple[Rows, Rows]:
        index = local_index(places, jax.tree.leaves(cache)[0].shape[0])
        take = lambda array: array.at[index].get(mode="fill", fill_value=0)  # noqa: E731
        old = jax.tree.map(take, cache)
        here = index < jax.tree.leaves(cache)[0].shape[0]

        def put(array: jax.Array, rows: jax.Array, old: jax.Array) -> jax.Array:
            # What is written hangs on what was read, else the compiler would copy the cache to do the two at once.
            rows = jnp.where(here.reshape(-1, *(1,) * (rows.ndim - 1)), rows, old)
            return array.at[index].set(rows, mode="drop")

        # Each row comes from the one device that has it.
        out = jax.tree.map(lambda rows: jax.lax.psum(rows, ALL_AXES), old)
        return jax.tree.map(put, cache, incoming, old), out

    row = spec("row")
    return jax.shard_map(local, in_specs=(row, whole, whole), out_specs=(row, whole), check_vma=False)(
        cache, places, incoming
    )
