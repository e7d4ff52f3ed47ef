"""The arrays of a run by name, on the host and in the order of the ids; and a state of them on a mesh.

Names are `dense.<path>`, `table.<name>` and `memory.<name>`.

R = physical rows.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxrec.config import TrainConfig
from jaxrec.core.partition import sharding
from jaxrec.data.dataset import PreparedDataset
from jaxrec.embedding.table import from_logical
from jaxrec.models.two_tower import ITEM
from jaxrec.runs import setup_run
from jaxrec.training.memory import abstract_memory
from jaxrec.training.rates import by_path
from jaxrec.training.setup import Setup, evaluation_parameters
from jaxrec.training.state import NO_FAILURE, TrainState, dense_shardings, in_id_order, logical_rows

DENSE, TABLE, MEMORY = "dense", "table", "memory"
Arrays = dict[str, np.ndarray]


def check_compressible(config: TrainConfig) -> None:
    """Raises ValueError where a run has parts that compression does not know."""
    if config.model.text is not None:
        raise ValueError(
            "model.text is set: the text of items lies beside the tables and is not compressed yet; compress a run "
            "without it."
        )
    if jax.process_count() > 1:
        raise ValueError(f"{jax.process_count()} processes: compression reads whole tables; start one.")


def serving_setup(config: TrainConfig, dataset: PreparedDataset, mesh: jax.sharding.Mesh) -> Setup:
    """The static parts of a run that is asked and not trained: its batch fits any mesh, its tables the devices."""
    config = dataclasses.replace(
        config, global_batch_size=mesh.size * config.accumulation_steps, cache_rows={}, mesh_shape=(-1, 1)
    )
    return setup_run(config, dataset, mesh, to_train=False)


def parameters_of(setup: Setup, state: TrainState) -> Arrays:
    """Every array that evaluation reads, the averages where the run keeps them; tables without padding rows."""
    dense, tables = evaluation_parameters(state)
    found = {f"{DENSE}.{name}": np.asarray(value) for name, value in by_path(dense).items()}
    found |= {f"{TABLE}.{name}": logical_rows(setup.tables[name], rows) for name, rows in tables.items()}
    items = setup.tables[ITEM].num_rows
    for name, rows in state.memory.items():
        found[f"{MEMORY}.{name}"] = in_id_order(rows, items)
    return found


def abstract_parameters(setup: Setup) -> dict[str, tuple[int, ...]]:
    """The shapes of `parameters_of`, of the config alone."""
    dense = nnx.to_pure_dict(setup.step.abstract)
    shapes = {f"{DENSE}.{name}": tuple(leaf.shape) for name, leaf in by_path(dense).items()}
    shapes |= {f"{TABLE}.{name}": (spec.num_rows, spec.dim) for name, spec in setup.tables.items()}
    memory = abstract_memory(setup.model.memory, setup.tables[ITEM], setup.mesh)
    items = setup.tables[ITEM].num_rows
    return shapes | {f"{MEMORY}.{name}": (items, *leaf.shape[1:]) for name, leaf in memory.items()}


def state_of(setup: Setup, arrays: Mapping[str, Any], step: int) -> TrainState:
    """A state to evaluate with, on the mesh of `setup`; call it under that mesh. It has no optimizer's slots."""
    mesh, tree = setup.mesh, nnx.to_pure_dict(setup.step.abstract)
    leaves = [jnp.asarray(arrays[f"{DENSE}.{name}"]) for name in by_path(tree)]
    dense = jax.tree.unflatten(jax.tree.structure(tree), leaves)
    where = dense_shardings(setup.step.abstract, mesh, setup.step.layout)
    tables = {}
    for name, spec in setup.tables.items():
        place = jax.jit(from_logical, static_argnums=(1, 2), out_shardings=spec.row_format(mesh))
        tables[name] = place(jnp.asarray(arrays[f"{TABLE}.{name}"]), spec.num_rows, spec.placement)
    items = setup.tables[ITEM].num_rows
    spread = jax.jit(from_logical, static_argnums=1, out_shardings=sharding(mesh, "row"))
    memory = {
        name.removeprefix(f"{MEMORY}."): spread(jnp.asarray(rows), items)
        for name, rows in arrays.items()
        if name.startswith(f"{MEMORY}.")
    }
    replicated = NamedSharding(mesh, PartitionSpec())
    return TrainState(
        step=jax.device_put(jnp.int32(step), replicated),
        dense=jax.device_put(dense, where),
        dense_slots=(),
        tables=tables,
        table_slots={},
        memory=memory,
        texts={},
        ema={},
        caches={},
        failure=jax.device_put(jnp.array([NO_FAILURE, 0], jnp.int32), replicated),
    )
