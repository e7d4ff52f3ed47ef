"""The train state: dense parameters, tables, their optimizers' slots, one step counter.

Tables stand beside the dense parameters because they are trained otherwise: by rows, where the rows lie.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Shaped

from jaxrec.core.partition import Layout, row_major, sharding
from jaxrec.embedding.host_table import empty_layout, init_host_rows
from jaxrec.embedding.placement import Placement, Rows
from jaxrec.embedding.row_optimizer import RowOptimizer, Slots
from jaxrec.embedding.table import TableSpec, file_rows, from_logical, init_table, to_logical
from jaxrec.models.two_tower import ITEM, Outputs, TwoTower, TwoTowerConfig
from jaxrec.nn.layers import parameter_shardings
from jaxrec.training.memory import abstract_memory, empty_memory
from jaxrec.training.text_cache import OF_THE_DATA, VECTORS, abstract_texts, empty_texts

# `failure[0]` is the step that found a number that is not finite, or this.
NO_FAILURE = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: updates applied.
      dense: parameters of the model as a plain nested dict of arrays.
      tables: sharded tables in physical row order, by name.
      memory: the frozen memory of transitions (`training.memory`), or {} without one.
      texts: the text of the catalogue and its vectors (`training.text_cache`), or {} for a model that reads none.
      ema: averages of `dense` and of the tables that a full softmax moves whole, or {} when off.
      caches: who lies where in the caches of tables that live on the host; {} in a step. See `cached_tables`.
      failure: `[2]` int32: the step of the first non-finite number (or -1), and the bit mask of the tasks whose
        loss it was. Once set, the steps that are already under way change nothing.
    """

    step: jax.Array
    dense: dict[str, Any]
    dense_slots: Any
    tables: dict[str, jax.Array]
    table_slots: dict[str, Slots]
    memory: dict[str, jax.Array]
    texts: dict[str, jax.Array]
    ema: dict[str, Any]
    caches: dict[str, dict[str, np.ndarray]]
    failure: jax.Array


def make_model(config: TwoTowerConfig, outputs: Outputs, seed: int) -> TwoTower:
    """The towers, seeded."""
    return TwoTower(
        config,
        outputs=outputs,
        rngs=nnx.Rngs(params=jax.random.fold_in(jax.random.key(seed), 0)),
    )


def split_model(config: TwoTowerConfig, outputs: Outputs) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's structure and its abstract parameters (shapes and logical axes), without computing them."""
    return nnx.split(nnx.eval_shape(lambda: make_model(config, outputs, 0)), nnx.Param)


def merge_model(graphdef: nnx.GraphDef, abstract: nnx.State, dense: dict[str, Any]) -> TwoTower:
    """The model with these parameters."""
    state = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(state, dense)
    return nnx.merge(graphdef, state)


def dense_shardings(abstract: nnx.State, mesh: Mesh, layout: Layout = "replicated") -> dict[str, Any]:
    """Where each dense parameter lies, by the logical axes that it bears."""
    return nnx.to_pure_dict(parameter_shardings(abstract, mesh, layout))


def init_state(
    model: TwoTowerConfig,
    tables: dict[str, TableSpec],
    *,
    outputs: Outputs,
    seed: int,
    optimizer: optax.GradientTransformation,
    row_optimizer: RowOptimizer,
    averaged: Sequence[str] | None,
    cache_rows: Mapping[str, int],
    num_text_tokens: int,
    mesh: Mesh,
) -> TrainState:
    """A fresh state, placed on the mesh; the same numbers on every mesh.

    Args:
      averaged: the tables that are averaged beside the dense parameters; None = nothing is. An average touches every
        row, so only tables are worth it whose every row moves in every step.
      cache_rows: the tables that live on the host, whose rows and slots are NumPy arrays in logical order here.
    """
    _, abstract = split_model(model, outputs)
    shardings = dense_shardings(abstract, mesh, model.encoder.layout)

    def create() -> dict[str, Any]:
        return nnx.to_pure_dict(nnx.split(make_model(model, outputs, seed), nnx.Param)[1])

    dense = jax.jit(create, out_shardings=shardings)()
    replicated = NamedSharding(mesh, PartitionSpec())
    slots = jax.jit(optimizer.init, out_shardings=slot_shardings(optimizer, dense, shardings, mesh))(dense)
    keys = {
        name: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), i)
        for i, name in enumerate(sorted(tables))
    }
    arrays = {
        name: init_table(table, keys[name], mesh) for name, table in tables.items() if name not in cache_rows
    }
    table_slots = {
        name: init_slots(row_optimizer, tables[name], array, mesh) for name, array in arrays.items()
    }
    caches = {}
    for name, count in cache_rows.items():
        host = init_host_rows(tables[name], row_optimizer, keys[name])
        arrays[name], table_slots[name] = host.pop("rows"), host
        caches[name] = empty_layout(count)
    ema: dict[str, Any] = {}
    if averaged is not None:
        ema = jax.tree.map(jnp.copy, {"dense": dense, "tables": {name: arrays[name] for name in averaged}})
    return TrainState(
        step=jax.device_put(jnp.int32(0), replicated),
        dense=dense,
        dense_slots=slots,
        tables=arrays,
        table_slots=table_slots,
        memory=empty_memory(model.memory, tables[ITEM], mesh),
        texts=empty_texts(model.text, tables[ITEM], num_text_tokens, mesh),
        ema=ema,
        caches=caches,
        failure=jax.device_put(jnp.array([NO_FAILURE, 0], jnp.int32), replicated),
    )


def abstract_state(
    model: TwoTowerConfig,
    tables: dict[str, TableSpec],
    *,
    abstract: nnx.State,
    optimizer: optax.GradientTransformation,
    row_optimizer: RowOptimizer,
    averaged: Sequence[str] | None,
    cache_rows: Mapping[str, int],
    num_text_tokens: int,
    mesh: Mesh,
) -> TrainState:
    """Shapes and shardings of the state that a step sees; nothing is computed and the devices need not be there."""

    def place(shapes: Any, where: Any) -> Any:
        put = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)  # noqa: E731
        return jax.tree.map(put, shapes, where)

    def place_rows(leaf: Any, where: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=row_major(where, leaf.shape))

    shardings = dense_shardings(abstract, mesh, model.encoder.layout)
    dense = place(nnx.to_pure_dict(abstract), shardings)
    slots = place(jax.eval_shape(optimizer.init, dense), slot_shardings(optimizer, dense, shardings, mesh))
    replicated = NamedSharding(mesh, PartitionSpec())
    arrays, table_slots = {}, {}
    for name, table in tables.items():
        rows, width = table.physical_shape(mesh.size)
        shape, where = (cache_rows.get(name, rows), width), table.sharding(mesh)
        arrays[name] = place_rows(jax.ShapeDtypeStruct(shape, jnp.dtype(table.dtype)), where)
        slots_of_table = jax.eval_shape(row_optimizer.init, arrays[name])
        table_slots[name] = {slot: place_rows(leaf, where) for slot, leaf in slots_of_table.items()}
    scalars = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    fields: dict[str, Any] = {
        "step": place(scalars[0], replicated),
        "dense": dense,
        "dense_slots": slots,
        "tables": arrays,
        "table_slots": table_slots,
        "memory": abstract_memory(model.memory, tables[ITEM], mesh),
        "texts": abstract_texts(model.text, tables[ITEM], num_text_tokens, mesh),
        "ema": {},
        "caches": {},
        "failure": place(scalars[1], replicated),
    }
    if averaged is not None:
        fields["ema"] = {"dense": dense, "tables": {name: arrays[name] for name in averaged}}
    return TrainState(**fields)


def init_slots(row_optimizer: RowOptimizer, table: TableSpec, rows: jax.Array, mesh: Mesh) -> Slots:
    """Fresh slots beside the rows."""
    shapes = jax.eval_shape(row_optimizer.init, rows)
    where = {name: row_major(table.sharding(mesh), leaf.shape) for name, leaf in shapes.items()}
    slots: Slots = jax.jit(row_optimizer.init, out_shardings=where)(rows)
    return slots


def slot_shardings(optimizer: optax.GradientTransformation, dense: Any, shardings: Any, mesh: Mesh) -> Any:
    """Moments lie where their parameter lies, everything else is replicated."""
    replicated = NamedSharding(mesh, PartitionSpec())
    abstract = jax.eval_shape(optimizer.init, dense)
    return optax.tree_map_params(
        optimizer, lambda _, where: where, abstract, shardings, transform_non_params=lambda _: replicated
    )


def to_checkpoint(state: TrainState, tables: dict[str, TableSpec], mesh: Mesh) -> dict[str, Any]:
    """The state as a plain tree in logical row order: its files depend neither on the shards nor on the placements."""
    logical = lambda name: lambda rows: to_logical(rows, tables[name].num_rows, tables[name].placement)  # noqa: E731
    # The copy is meant: a table on the host goes on changing while the checkpoint is written.
    on_host = lambda name: lambda rows: _with_rows(rows, file_rows(tables[name].num_rows))  # noqa: E731
    where = lambda name: lambda rows: file_sharding(tables[name], mesh)  # noqa: E731
    return _convert(_as_dict(state), logical, where, on_host)


def from_checkpoint(
    tree: dict[str, Any], tables: dict[str, TableSpec], mesh: Mesh, like: TrainState
) -> TrainState:
    """Inverse of `to_checkpoint` on the mesh in use; `like` gives the optimizer's tree and the text of the data."""
    physical = lambda name: lambda rows: from_logical(rows, tables[name].num_rows, tables[name].placement)  # noqa: E731
    on_host = lambda name: lambda rows: _with_rows(rows, tables[name].num_rows)  # noqa: E731
    place = lambda name: lambda rows: row_major(tables[name].sharding(mesh), rows.shape)  # noqa: E731
    fields = _convert(tree, physical, place, on_host)
    fields["dense_slots"] = jax.tree.unflatten(
        jax.tree.structure(like.dense_slots), fields["dense_slots"].values()
    )
    fields["texts"] = like.texts | fields.get("texts", {})
    return TrainState(**({"memory": {}} | fields))


def abstract_checkpoint(state: TrainState, tables: dict[str, TableSpec], mesh: Mesh) -> dict[str, Any]:
    """Shapes and shardings of `to_checkpoint(state)`, for the restore."""

    def abstract(x: Any) -> Any:
        return x if isinstance(x, np.ndarray) else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    tree = jax.tree.map(abstract, _as_dict(state))

    def stored(name: str) -> Any:
        table = tables[name]
        where, parts = file_sharding(table, mesh), table.placement.num_parts

        def stored_array(x: Any) -> Any:
            shape = (file_rows(table.num_rows), *(size * parts for size in x.shape[1:]))
            if isinstance(x, np.ndarray):
                return np.empty(shape, x.dtype)
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=where)

        return stored_array

    return _map_tables(tree, stored)


def in_id_order(rows: jax.Array, num_rows: int, placement: Placement = Rows()) -> Shaped[np.ndarray, "n *d"]:
    """The rows of a table, or of what lies as one does, on the host in the order of the ids, without padding."""
    ordered = jax.jit(to_logical, static_argnums=(1, 2))(rows, num_rows, placement)
    return np.asarray(ordered)[:num_rows]


def logical_rows(table: TableSpec, rows: jax.Array | np.ndarray) -> np.ndarray:
    """The rows of a table on the host, in float32, in the order of the ids, without padding; for tables that fit.

    Args:
      rows: of a state; NumPy where the table lives on the host, in that order already.
    """
    if not isinstance(rows, np.ndarray):
        rows = in_id_order(rows, table.num_rows, table.placement)
    return np.asarray(rows, np.float32)[: table.num_rows]


def file_sharding(table: TableSpec, mesh: Mesh) -> NamedSharding:
    """Rows over every device, or whole on each where the devices do not divide a file's rows."""
    divides = file_rows(table.num_rows) % mesh.size == 0
    return sharding(mesh, "row") if divides else NamedSharding(mesh, PartitionSpec())


def _as_dict(state: TrainState) -> dict[str, Any]:
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    # Named tuples of optax become a dict in the order of their leaves: a tree that any reader can open.
    leaves = jax.tree.leaves(state.dense_slots)
    fields["dense_slots"] = {f"{i:04d}": leaf for i, leaf in enumerate(leaves)}
    fields["texts"] = {name: array for name, array in state.texts.items() if name not in OF_THE_DATA}
    for name in ("memory", "texts"):
        if not fields[name]:
            del fields[name]
    return fields


def _map_tables(tree: dict[str, Any], function: Any) -> dict[str, Any]:
    """Applies `function(name)` to every array of a table: rows, slots, averages, the memory and the texts."""
    mapped = dict(tree)
    mapped["tables"] = {name: function(name)(rows) for name, rows in tree["tables"].items()}
    mapped["table_slots"] = {
        name: {slot: function(name)(rows) for slot, rows in slots.items()}
        for name, slots in tree["table_slots"].items()
    }
    if "memory" in tree:  # lies as the rows of the items do
        mapped["memory"] = {name: function(ITEM)(rows) for name, rows in tree["memory"].items()}
    if "texts" in tree:  # so do these
        mapped["texts"] = tree["texts"] | {VECTORS: function(ITEM)(tree["texts"][VECTORS])}
    if tree["ema"]:
        averages = {name: function(name)(rows) for name, rows in tree["ema"]["tables"].items()}
        mapped["ema"] = {"dense": tree["ema"]["dense"], "tables": averages}
    return mapped


def _with_rows(rows: np.ndarray, total: int) -> np.ndarray:
    """A copy that is filled up with zeros, or cut."""
    copy = np.zeros((total, *rows.shape[1:]), rows.dtype)
    copy[: len(rows)] = rows[:total]
    return copy


def _convert(tree: dict[str, Any], function: Any, where: Any, on_host: Any) -> dict[str, Any]:
    def converted(name: str) -> Any:
        def run(array: jax.Array | np.ndarray) -> Any:
            if isinstance(array, np.ndarray):
                return on_host(name)(array)
            made = jax.eval_shape(function(name), array)
            return jax.jit(function(name), out_shardings=where(name)(made))(array)

        return run

    return _map_tables(tree, converted)
