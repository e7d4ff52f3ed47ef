"""One table that trains when asked, on the device or with its rows on the host, for `host_table.py`.

    python benchmarks/host_table_worker.py --rows=4000000 --where=memory --hit-rate=0.9
    {"count": 4} -> {"milliseconds": [...], "missed": ..., "hit_rate": ..., "major_faults": ..., "peak_bytes": ...}
    {"count": 0, "digest": true} -> ... "digest": SHA-256 of rows and slots in logical order

A step wants 20,000 distinct rows of 64 floats: a share of them is the same at every step, hence in the cache; the
others come from a long round through the table, so that the cache, which starts full, has put them out long since.
Steps of a turn are dispatched one after another, as the training loop does it, and timed together: the host's work
for a step may hide behind the step before it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import mmap
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import record
from table_worker import OPTIMIZERS, engine_step, say

from jaxrec.core.mesh import make_mesh
from jaxrec.core.partition import sharding
from jaxrec.embedding.host_table import HostTable, empty_layout, init_host_rows
from jaxrec.embedding.table import TableSpec, init_table

DIM, IDS, CACHE_ROWS = 64, 20_000, 200_000
WHERE = ("device", "memory", "disk", "cold disk")
OPTIMIZER = OPTIMIZERS["row_adagrad"]


class Ids:
    """What the steps want: `hot` at every one, and the next of `cold`, round and round."""

    def __init__(self, rows: int, hit_rate: float):
        order = np.random.default_rng(0).permutation(rows).astype(np.int32) + 1
        hot = round(IDS * hit_rate)
        self.hot, self.cold = order[:hot], order[hot:]

    def at(self, step: int) -> np.ndarray:
        """IDS distinct ids."""
        fresh = IDS - len(self.hot)
        return np.concatenate(
            [self.hot, self.cold.take(range(step * fresh, (step + 1) * fresh), mode="wrap")]
        )

    def layout(self) -> dict[str, np.ndarray]:
        """A full cache: what is hot, and what the steps before the first would have wanted."""
        layout = empty_layout(CACHE_ROWS)
        layout["ids"][1:] = np.concatenate([self.hot, self.cold[::-1]])[: CACHE_ROWS - 1]
        layout["last_use"][1:] = 0
        return layout


class OnDevice:
    """The whole table is the device's."""

    def __init__(self, spec: TableSpec, mesh: jax.sharding.Mesh):
        self.rows = {"rows": init_table(spec, jax.random.key(0), mesh)}
        self.rows |= jax.jit(OPTIMIZER.init)(self.rows["rows"])
        self.num_rows, self.missed = spec.num_rows, 0

    def bring(self, ids: np.ndarray) -> np.ndarray:
        """The places of the ids' rows."""
        return ids

    def chill(self) -> None:
        """Nothing lies on a disk."""

    def whole(self) -> dict[str, np.ndarray]:
        """Rows and slots in logical order."""
        return {name: np.asarray(array)[: self.num_rows] for name, array in self.rows.items()}


class OnHost:
    """The host has the rows, in memory or mapped from files; the device a cache."""

    def __init__(
        self, spec: TableSpec, mesh: jax.sharding.Mesh, ids: Ids, directory: Path | None, cold: bool
    ):
        host = init_host_rows(spec, OPTIMIZER, jax.random.key(0))
        self._files: dict[str, np.memmap] = {}
        if directory is not None:
            for name, array in host.items():
                path = directory / name
                self._files[name] = np.memmap(path, array.dtype, "w+", shape=array.shape)
                self._files[name][:] = array
            host = dict(self._files)
        self._cold = cold
        self.table = HostTable(host, CACHE_ROWS, mesh, ids.layout())
        self.rows, self.missed = self.table.cache(), 0

    def bring(self, ids: np.ndarray) -> np.ndarray:
        """The places of the ids' rows, which come in."""
        self.rows, statistics = self.table.prefetch(self.rows, ids)
        self.missed += statistics.missed
        return self.table.places(ids)

    def chill(self) -> None:
        """Makes the system forget what it holds of the files, so that the next read is the disk's."""
        if not self._cold:
            return
        for array in self._files.values():
            array.flush()
            mapped: mmap.mmap = array._mmap  # type: ignore[attr-defined]
            mapped.madvise(mmap.MADV_DONTNEED)
            with open(str(array.filename), "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def whole(self) -> dict[str, np.ndarray]:
        """Rows and slots in logical order."""
        self.table.flush(self.rows)
        return self.table.host


def digest(rows: Mapping[str, np.ndarray]) -> str:
    """Of all bits."""
    found = hashlib.sha256()
    for name in sorted(rows):
        found.update(np.ascontiguousarray(rows[name]).data)
    return found.hexdigest()


@contextlib.contextmanager
def placed(
    where: str, spec: TableSpec, mesh: jax.sharding.Mesh, ids: Ids, directory: str | None
) -> Iterator[OnDevice | OnHost]:
    """The table, and its files for as long as it is used."""
    if where == "device":
        yield OnDevice(spec, mesh)
    elif where == "memory":
        yield OnHost(spec, mesh, ids, None, False)
    else:
        with tempfile.TemporaryDirectory(prefix="host-table-", dir=directory) as made:
            yield OnHost(spec, mesh, ids, Path(made), where == "cold disk")


def main() -> int:
    """Compiles, says so, and serves requests until its input ends."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--where", choices=WHERE, required=True)
    parser.add_argument("--hit-rate", type=float, required=True)
    parser.add_argument("--directory", help="for the files; default: the system's for temporary ones")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    mesh = make_mesh()
    spec = TableSpec(num_rows=arguments.rows + 1, dim=DIM, init_scale=0.01)
    ids = Ids(arguments.rows, arguments.hit_rate)
    with jax.set_mesh(mesh), placed(arguments.where, spec, mesh, ids, arguments.directory) as table:
        batch = sharding(mesh, "batch")
        targets = jax.device_put(np.random.default_rng(0).normal(size=(IDS, DIM)).astype(np.float32), batch)
        step = jax.jit(engine_step(OPTIMIZER, table.rows["rows"].shape[0]), donate_argnums=0)
        say(rows=arguments.rows, where=arguments.where, hit_rate=arguments.hit_rate)
        done = 0
        for line in sys.stdin:
            request: dict[str, Any] = json.loads(line)
            table.chill()
            table.missed = 0
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
            begin = time.perf_counter()
            for _ in range(request["count"]):
                places = jax.device_put(table.bring(ids.at(done)), batch)
                (rows, slots), _ = step((table.rows.pop("rows"), table.rows), places, targets)
                table.rows = {"rows": rows, **slots}
                done += 1
            jax.block_until_ready(table.rows)
            each = 1e3 * (time.perf_counter() - begin) / max(1, request["count"])
            answer = {"digest": digest(table.whole())} if request.get("digest") else {}
            say(
                milliseconds=[each],
                missed=table.missed / max(1, request["count"]),
                major_faults=resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults,
                peak_bytes=record.peak_bytes(),
                **answer,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
