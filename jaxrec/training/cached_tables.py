"""Tables that live on the host, as the training loop sees them.

A state has two forms. Outside of the loop it is *whole*: such a table's rows and slots are NumPy arrays in logical
order, and `caches` says which of them lay where on the devices. Inside, its arrays are the cache; before a step the
rows of the step's ids come into it, and the ids in the batch become places in the cache. The step itself is the same.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrec.core.batch import Batch
from jaxrec.core.partition import sharding
from jaxrec.embedding.host_table import CacheStatistics, HostTable
from jaxrec.embedding.table import TableSpec
from jaxrec.models.two_tower import USER
from jaxrec.training.state import TrainState


def check_cache_rows(cache_rows: Mapping[str, int], tables: Mapping[str, TableSpec], mesh: Mesh) -> None:
    """Raises ValueError where one of the tables cannot live on the host."""
    for name, count in cache_rows.items():
        if name != USER:
            raise ValueError(
                f"cache_rows[{name!r}]={count}: only the table {USER!r} can live on the host, where the ids of a "
                "batch are known before its step; items are sampled on the devices."
            )
        if name not in tables:
            raise ValueError(
                f"cache_rows[{name!r}]={count}: the model has no such table; set model.user_dim or leave it out."
            )
        if jax.process_count() > 1:
            raise ValueError(
                f"cache_rows[{name!r}]={count} needs a run of one process, and this one has {jax.process_count()}; "
                "leave it out, so that the table lies over the devices of all of them."
            )
        if count % mesh.size or not 1 < count < tables[name].num_rows:
            raise ValueError(
                f"cache_rows[{name!r}]={count} must be a multiple of the {mesh.size} devices, at least 2 and below the "
                f"table's {tables[name].num_rows} rows."
            )


class CachedTables:
    """The host's side of a run's cached tables; without any, everything passes through.

    Args:
      cache_rows: rows that the devices hold, by table.
      state: whole; its arrays on the host are taken over and changed.
    """

    def __init__(self, cache_rows: Mapping[str, int], state: TrainState, mesh: Mesh):
        self._mesh = mesh
        self._tables = {}
        for name, count in cache_rows.items():
            rows = {"rows": state.tables[name], **state.table_slots[name]}
            host = {key: np.asarray(array) for key, array in rows.items()}
            self._tables[name] = HostTable(host, count, mesh, state.caches[name])
        self._statistics: dict[str, CacheStatistics] = {}

    def enter(self, state: TrainState) -> TrainState:
        """The state with caches in place of the tables."""
        return self._with_caches(
            dataclasses.replace(state, caches={}),
            {name: table.cache() for name, table in self._tables.items()},
        )

    def bring(self, state: TrainState, batch: Batch, placed: Batch) -> tuple[TrainState, Batch]:
        """Brings the rows of a batch into the caches, whose state is donated.

        Args:
          batch: on the host.
          placed: the same on the devices.

        Returns:
          The state, and the batch with places in the cache for ids.

        Raises:
          ValueError: the batch has more distinct ids than the cache has rows.
        """
        ids = np.asarray(batch.user_ids)
        for name, table in self._tables.items():
            cache = {"rows": state.tables[name], **state.table_slots[name]}
            cache, self._statistics[name] = table.prefetch(cache, ids)
            state = self._with_caches(state, {name: cache})
            places = jax.device_put(table.places(ids), sharding(self._mesh, "batch"))
            placed = dataclasses.replace(placed, user_ids=places)
        return state, placed

    def metrics(self) -> dict[str, float]:
        """Share of the last batch's distinct ids whose rows the cache held."""
        return {f"cache_hit_rate/{name}": found.hit_rate for name, found in self._statistics.items()}

    def whole(self, state: TrainState) -> TrainState:
        """The whole state, for a checkpoint or an evaluation; its host arrays are those that training goes on with."""
        if not self._tables:
            return state
        tables: dict[str, Any] = dict(state.tables)
        slots: dict[str, Any] = dict(state.table_slots)
        for name, table in self._tables.items():
            table.flush({"rows": tables[name], **slots[name]})
            tables[name], slots[name] = table.host["rows"], {key: table.host[key] for key in slots[name]}
        layouts = {name: table.layout() for name, table in self._tables.items()}
        return dataclasses.replace(state, tables=tables, table_slots=slots, caches=layouts)

    @staticmethod
    def _with_caches(state: TrainState, caches: Mapping[str, Mapping[str, jax.Array]]) -> TrainState:
        tables = {name: cache["rows"] for name, cache in caches.items()}
        slots = {
            name: {key: array for key, array in cache.items() if key != "rows"}
            for name, cache in caches.items()
        }
        return dataclasses.replace(state, tables=state.tables | tables, table_slots=state.table_slots | slots)
