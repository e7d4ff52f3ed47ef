"""The start of a run from the parameters of another one.

Dense parameters are matched by path and shape, rows of tables by the keys of their items and users, so that the other
run may have had other data. Everything else (the optimizers' slots, the step, the memory of transitions) starts fresh.

T = rows of a table, F = rows of the file of the other run's table, D = dim.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxrec.embedding.engine import lookup
from jaxrec.embedding.placement import Rows
from jaxrec.embedding.table import TableSpec, from_logical
from jaxrec.nn.lora import adapter_of
from jaxrec.training.checkpoint import Checkpoints
from jaxrec.training.manifest import Manifest
from jaxrec.training.rates import by_path, matching, path_name, shown
from jaxrec.training.setup import Setup
from jaxrec.training.state import TrainState, file_sharding

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """Ids of this run beside those of the other one.

    Attributes:
      known_ids: for each id the other run's id of the same key, or 0.
      num_known: ids of the other run, without padding.
    """

    known_ids: Int[np.ndarray, " T"]
    num_known: int


class Start:
    """What a fresh state takes over; call it with that state, under `jax.set_mesh(setup.mesh)`.

    Args:
      checkpoints: of the other run; its newest step counts, and in it the averages where it keeps them.
      matches: by what a table is keyed by.
      without: glob patterns of the parameters and tables that start fresh all the same.

    Raises:
      DamagedCheckpointError: no step is whole.
      ValueError: a parameter has another shape there, nothing matches, or a pattern of `without` is of nothing.
    """

    def __init__(
        self, setup: Setup, checkpoints: Checkpoints, matches: Mapping[str, Match], without: Sequence[str]
    ):
        found = checkpoints.latest_manifest()
        assert found is not None, "the caller has seen a step"
        self._setup, self._checkpoints, self._matches = setup, checkpoints, matches
        self._found: Manifest = found
        wanted = by_path(nnx.to_pure_dict(setup.step.abstract))
        skipped = {
            path
            for pattern in without
            for path in matching(pattern, [*wanted, *setup.tables], f"init_without={pattern!r}")
        }
        self._dense = [path for path in wanted if self._stored("dense", path) and path not in skipped]
        self._tables = [name for name in setup.tables if self._stored("tables", name) and name not in skipped]
        problems = [
            *self._problems("dense", {path: wanted[path].shape for path in self._dense}),
            *self._problems("tables", {name: (..., setup.tables[name].dim) for name in self._tables}),
            *(
                f"{path} has an adapter there and none here"
                for path in self._dense
                if self._stored("dense", adapter_of(path)) and adapter_of(path) not in wanted
            ),
        ]
        if problems:
            raise ValueError(
                f"init_from={self._where}: {'; '.join(problems)}. Give this run the model of that one, or let these "
                "start fresh: init_without."
            )
        if not self._dense and not any(self._taken_ids(name).size for name in self._tables):
            raise ValueError(
                f"init_from={self._where}: nothing there has the path of a parameter or the key of a row of this run; "
                "leave it out to start fresh."
            )

    def __call__(self, state: TrainState) -> TrainState:
        """The state with the other run's parameters in the place of its own; the tables' arrays are donated."""
        for line in self.summary():
            logger.info("%s", line)
        dense = by_path(state.dense)
        wanted = {
            self._stored("dense", path): self._template("dense", path, dense[path].sharding)
            for path in self._dense
        }
        for name in self._tables:
            on_host = isinstance(state.tables[name], np.ndarray)
            place = None if on_host else file_sharding(self._source_table(name), self._setup.mesh)
            wanted[self._stored("tables", name)] = self._template("tables", name, place)
        restored = self._checkpoints.restore_latest(wanted, partial=True)
        assert restored is not None, "its manifest has been read"
        arrays: dict[str, Any] = restored[1]

        def taken(path: Any, fresh: jax.Array) -> jax.Array:
            name = path_name(path)
            return arrays[self._stored("dense", name)].astype(fresh.dtype) if name in self._dense else fresh

        tables = dict(state.tables)
        for name in self._tables:
            tables[name] = self._with_rows(name, tables[name], arrays[self._stored("tables", name)])
        fields: dict[str, Any] = {
            "dense": jax.tree_util.tree_map_with_path(taken, state.dense),
            "tables": tables,
        }
        if state.ema:  # the averages start as the parameters themselves
            averaged = {name: tables[name] for name in state.ema["tables"]}
            fields["ema"] = jax.tree.map(jnp.copy, {"dense": fields["dense"], "tables": averaged})
        return dataclasses.replace(state, **fields)

    def summary(self) -> list[str]:
        """What is taken, what starts fresh and why, and what is left behind: a line each."""
        wanted = list(by_path(nnx.to_pure_dict(self._setup.step.abstract)))
        there = {path for kind in ("dense.", "ema.dense.") for path in self._below(kind)}
        averages = " (averages)" if self._below("ema.dense.") else ""
        lines = [
            f"starting from {self._where}{averages}: {len(self._dense)} of {len(wanted)} dense parameters"
        ]
        for name, table in self._setup.tables.items():
            total = table.num_rows - 1
            known = self._taken_ids(name).size if name in self._tables else 0
            why = f"no such {table.keyed_by} there"
            if name not in self._tables:
                why = "init_without" if self._stored("tables", name) else "no such table there"
            fresh = f"{total - known:,} fresh ({why})" if known < total else "none fresh"
            lines.append(f"  table {name}: {known:,} rows by key, {fresh}")
        groups = {
            "fresh, not there": [path for path in wanted if path not in there],
            "fresh, init_without": [path for path in wanted if path in there and path not in self._dense],
            "left behind, not here": sorted(there.difference(wanted)),
        }
        return lines + [f"  {why}: {shown(paths)}" for why, paths in groups.items() if paths]

    @property
    def _where(self) -> str:
        return f"{self._checkpoints.directory / str(self._found.step)}"

    def _below(self, prefix: str) -> list[str]:
        return [path.removeprefix(prefix) for path in self._found.arrays if path.startswith(prefix)]

    def _stored(self, kind: str, name: str) -> str:
        """The path of an array in the checkpoint, of its average where there is one; "" where it has neither."""
        paths = (f"ema.{kind}.{name}", f"{kind}.{name}")
        return next((path for path in paths if path in self._found.arrays), "")

    def _problems(self, kind: str, shapes: Mapping[str, tuple[Any, ...]]) -> Iterator[str]:
        for name, shape in shapes.items():
            found, _ = self._found.arrays[self._stored(kind, name)]
            if len(found) != len(shape) or any(
                size not in (..., there) for size, there in zip(shape, found, strict=True)
            ):
                here = ", ".join("rows" if size is ... else str(size) for size in shape)
                yield f"{name} is {list(found)} there and [{here}] here"

    def _template(self, kind: str, name: str, place: Any) -> Any:
        shape, dtype = self._found.arrays[self._stored(kind, name)]
        if place is None:
            return np.empty(shape, dtype)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def _source_table(self, name: str) -> TableSpec:
        table = self._setup.tables[name]
        return dataclasses.replace(
            table, num_rows=self._matches[table.keyed_by].num_known + 1, placement=Rows()
        )

    def _taken_ids(self, name: str) -> Int[np.ndarray, " t"]:
        return np.flatnonzero(self._matches[self._setup.tables[name].keyed_by].known_ids)

    def _with_rows(self, name: str, fresh: Any, stored: Any) -> Any:
        table, source, mesh = self._setup.tables[name], self._source_table(name), self._setup.mesh
        known_ids = self._matches[table.keyed_by].known_ids
        if isinstance(fresh, np.ndarray):
            ids = self._taken_ids(name)
            fresh[ids] = stored[known_ids[ids]]
            return fresh
        rows = jax.jit(
            lambda stored: from_logical(stored, source.num_rows), out_shardings=source.row_format(mesh)
        )(stored)
        return overlay(table, fresh, rows, known_ids, mesh)


def overlay(
    table: TableSpec,
    fresh: Float[Array, "R W"],
    known: Float[Array, "r D"],
    known_ids: Int[np.ndarray, " T"],
    mesh: Mesh,
) -> Float[Array, "R W"]:
    """A table with the rows of another one where `known_ids` names one, and its own (donated) elsewhere.

    Args:
      known: lies by `Rows`. No device ever holds it whole: its rows come by the look-up of a step.
    """
    ids = np.zeros(-(-table.num_rows // mesh.size) * mesh.size, np.int32)
    ids[: table.num_rows] = known_ids

    def laid_over(fresh: jax.Array, known: jax.Array, ids: jax.Array) -> jax.Array:
        rows, ids = (from_logical(x, table.num_rows, table.placement) for x in (lookup(known, ids), ids))
        return jnp.where(ids[:, None] > 0, rows.astype(fresh.dtype), fresh)

    run = jax.jit(laid_over, out_shardings=table.row_format(mesh), donate_argnums=0)
    return run(fresh, known, ids)
