"""The memory of transitions on the devices: counted once from the training events, frozen from then on.

R = physical rows of the item table, K = successors of an item.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrec.core.partition import sharding
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.transitions import count_transitions, top_successors
from jaxrec.embedding.table import TableSpec, from_logical
from jaxrec.models.memory import COUNTS, SUCCESSORS, TransitionMemory

Arrays = dict[str, jax.Array]


def abstract_memory(config: TransitionMemory | None, items: TableSpec, mesh: Mesh) -> dict[str, Any]:
    """Shapes and shardings: `[R, K]` ids, `[R, K + 1]` counts, the last one of the whole row; {} without a memory."""
    if config is None:
        return {}
    rows, where = items.physical_shape(mesh.size)[0], sharding(mesh, "row")
    widths = {
        SUCCESSORS: (config.num_successors, jnp.int32),
        COUNTS: (config.num_successors + 1, jnp.float32),
    }
    return {
        name: jax.ShapeDtypeStruct((rows, width), dtype, sharding=where)
        for name, (width, dtype) in widths.items()
    }


def empty_memory(config: TransitionMemory | None, items: TableSpec, mesh: Mesh) -> Arrays:
    """A memory that knows nothing."""
    return {
        name: jax.jit(lambda leaf=leaf: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)()
        for name, leaf in abstract_memory(config, items, mesh).items()
    }


def count_memory(config: TransitionMemory, items: TableSpec, dataset: PreparedDataset, mesh: Mesh) -> Arrays:
    """The transitions of the training part of `dataset`, the same on every process."""
    train = dataset.prefixes(np.arange(len(dataset.train_end)), dataset.train_end)
    counts = count_transitions(train, dataset.metadata.num_items, window=config.window, decay=config.decay)
    place = jax.jit(lambda rows: from_logical(rows, items.num_rows), out_shardings=sharding(mesh, "row"))
    found = top_successors(counts, config.num_successors)
    return {name: place(rows) for name, rows in zip((SUCCESSORS, COUNTS), found, strict=True)}
