"""The arrays that hold the text of the catalogue beside the tables, by rows as the items lie.

R = physical rows of the item table, T = tokens of a text, E = width of the text encoder.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrec.core.partition import row_major, sharding
from jaxrec.core.precision import compute_dtype
from jaxrec.embedding.table import TableSpec
from jaxrec.models.item_text import TextTower

# By name. The tokens, and which items have training events, are read from the data when a run starts; the vectors,
# and the step whose parameters they were encoded with, are in its checkpoints.
TOKENS, HAS_EVENTS, VECTORS, ENCODED_AT = "tokens", "has_events", "vectors", "encoded_at"
OF_THE_DATA = (TOKENS, HAS_EVENTS)
NEVER = -1  # `ENCODED_AT` before the first time


def abstract_texts(config: TextTower | None, items: TableSpec, num_tokens: int, mesh: Mesh) -> dict[str, Any]:
    """Shapes and shardings: `[R, T]`, `[R, 1]`, `[R, E]` and a scalar; {} for a model that reads no text."""
    if config is None:
        return {}
    rows = items.physical_shape(mesh.size)[0]
    widths = {
        TOKENS: (num_tokens, jnp.dtype(jnp.int32)),
        HAS_EVENTS: (1, jnp.dtype(jnp.int8)),
        VECTORS: (config.encoder.embed_dim, compute_dtype(config.encoder.dtype)),
    }
    texts = {
        name: jax.ShapeDtypeStruct((rows, width), dtype, sharding=_where((rows, width), mesh))
        for name, (width, dtype) in widths.items()
    }
    texts[ENCODED_AT] = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    return texts


def empty_texts(
    config: TextTower | None, items: TableSpec, num_tokens: int, mesh: Mesh
) -> dict[str, jax.Array]:
    """No item has a text, and none was encoded."""
    texts = {}
    for name, leaf in abstract_texts(config, items, num_tokens, mesh).items():
        value = NEVER if name == ENCODED_AT else 0
        texts[name] = jax.jit(jnp.full, static_argnums=(0, 1, 2), out_shardings=leaf.sharding)(
            leaf.shape, value, leaf.dtype
        )
    return texts


def _where(shape: tuple[int, int], mesh: Mesh) -> Any:
    return row_major(sharding(mesh, "row"), shape)
