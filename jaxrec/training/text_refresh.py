"""The text of the catalogue read, and its vectors encoded: when a run starts, every so often, and to be evaluated.

R = physical rows of the item table, T = tokens of a text, E = width of the text encoder.
"""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxrec.core.mesh import ALL_AXES
from jaxrec.core.partition import spec
from jaxrec.core.placement import num_shards
from jaxrec.data.dataset import PreparedDataset
from jaxrec.models.item_text import ItemText
from jaxrec.models.two_tower import ITEM
from jaxrec.nn.huggingface import SIZES, load_bert
from jaxrec.training.rates import by_path, path_name
from jaxrec.training.setup import Setup
from jaxrec.training.state import TrainState
from jaxrec.training.text_cache import ENCODED_AT, HAS_EVENTS, TOKENS, VECTORS, abstract_texts

logger = logging.getLogger(__name__)

TEXTS_AT_ONCE = 64  # that a device encodes at a time


def with_dataset_texts(setup: Setup, state: TrainState, dataset: PreparedDataset) -> TrainState:
    """The state with the text of the data beside its tables; unchanged for a model that reads none.

    Every device gets its own items' alone, read from the file.

    Raises:
      ValueError: no item has a text, or a token is none of the encoder's.
    """
    text = setup.model.text
    if text is None:
        return state
    tokens, name = dataset.item_tokens, dataset.metadata.name
    with_text = int(np.count_nonzero(tokens[:, 0]))
    if not with_text:
        raise ValueError(
            f"model.text is set, but no item of dataset {name!r} has a text; name its columns with "
            "data.columns.text and prepare it again, or set model.text=none."
        )
    if (largest := int(tokens.max())) >= text.encoder.vocab_size:
        raise ValueError(
            f"text.encoder.vocab_size={text.encoder.vocab_size}, but dataset {name!r} has the token {largest}; prepare "
            "it with the encoder's own vocabulary: data.text.vocabulary."
        )
    logger.info("%d of %d items have a text", with_text, dataset.metadata.num_items)
    has_events = (np.asarray(dataset.item_counts) > 0).astype(np.int8)[:, None]
    placed = {
        array: _place_rows(values, state.texts[array])
        for array, values in {TOKENS: tokens, HAS_EVENTS: has_events}.items()
    }
    return dataclasses.replace(state, texts=state.texts | placed)


def _place_rows(values: np.ndarray, like: jax.Array) -> jax.Array:
    """Rows in the order of ids as `like` lies: see `core.placement`."""
    shards = num_shards()
    rows = like.shape[0] // shards

    def of_shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        own = np.asarray(values[(index[0].start or 0) // rows :: shards], like.dtype)
        return np.pad(own, ((0, rows - len(own)), (0, 0)))

    return jax.make_array_from_callback(like.shape, like.sharding, of_shard)


def with_checkpoint_weights(setup: Setup, state: TrainState) -> TrainState:
    """A fresh state whose text encoder starts from the weights of `TextTower.checkpoint`, where there is one.

    Raises:
      ValueError: the directory holds no BERT that ours can be, or one of other sizes.
    """
    text = setup.model.text
    if text is None or not text.checkpoint:
        return state
    bert, found = load_bert(text.checkpoint)
    for name in (*SIZES.values(), "norm_position", "activation", "layer_norm_epsilon"):
        wanted, stored = getattr(text.encoder, name), getattr(found, name)
        if wanted != stored:
            raise ValueError(
                f"text.encoder.{name}={wanted}, but text.checkpoint={text.checkpoint!r} has {stored}; make the tower "
                "with TextTower.of_checkpoint(DIR), which reads it."
            )
    weights = nnx.to_pure_dict(nnx.split(bert, nnx.Param)[1])
    weights.pop("pooler", None)
    stored = by_path(weights)

    def started(dense: dict[str, Any]) -> dict[str, Any]:
        # Copied: a step donates its state, and the averages have the same weights.
        def place(path: Any, old: jax.Array) -> jax.Array:
            new = stored.get(path_name(path))  # none of an adapter, which the checkpoint lacks
            return old if new is None else jnp.copy(jax.device_put(np.asarray(new), old.sharding))

        encoder = jax.tree_util.tree_map_with_path(place, dense["text"]["encoder"])
        return dense | {"text": dense["text"] | {"encoder": encoder}}

    ema = state.ema and state.ema | {"dense": started(state.ema["dense"])}
    return dataclasses.replace(state, dense=started(state.dense), ema=ema)


class TextEncoding:
    """Encodes the text of the whole catalogue on the mesh of `setup`; compiled once."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self._encode = jax.jit(self._vectors, out_shardings=self._where())

    def is_due(self, step: int) -> bool:
        """Whether the vectors are encoded anew before this step."""
        text = self._setup.model.text
        if text is None:
            return False
        return step == 0 or (text.refresh_every_steps > 0 and step % text.refresh_every_steps == 0)

    def refresh(self, state: TrainState) -> TrainState:
        """The state with vectors of its own parameters."""
        vectors = jax.block_until_ready(self.vectors(state.dense, state))  # see `one_by_one` in the loop
        texts = {VECTORS: vectors, ENCODED_AT: jnp.copy(state.step)}
        return dataclasses.replace(state, texts=state.texts | texts)

    def vectors(self, dense: Any, state: TrainState) -> Float[Array, "R E"]:
        """Of every text of `state`, as these parameters encode it."""
        return self._encode(dense, state.texts[TOKENS])

    def _vectors(self, dense: Any, tokens: Int[Array, "R T"]) -> Float[Array, "R E"]:
        return encode_catalogue(self._setup.step.model(dense).text, tokens)

    def _where(self) -> Any:
        setup = self._setup
        if setup.model.text is None:
            return None
        shapes = abstract_texts(
            setup.model.text, setup.tables[ITEM], setup.step.facts.num_text_tokens, setup.mesh
        )
        return shapes[VECTORS].sharding


def encode_catalogue(item_text: ItemText, tokens: Int[Array, "R T"]) -> Float[Array, "R E"]:
    """The vectors of rows that lie over the devices, each device's own in blocks."""
    shards = num_shards()
    rows = tokens.shape[0] // shards
    block = min(TEXTS_AT_ONCE, rows)
    blocks = -(-rows // block)
    parts = jnp.pad(tokens.reshape(shards, rows, -1), ((0, 0), (0, blocks * block - rows), (0, 0)))
    parts = jnp.swapaxes(parts.reshape(shards, blocks, block, -1), 0, 1)
    parts = jax.lax.with_sharding_constraint(parts, PartitionSpec(None, ALL_AXES))

    def encode(part: jax.Array) -> jax.Array:
        flat = jax.lax.with_sharding_constraint(jax.lax.collapse(part, 0, 2), spec("batch"))
        return item_text.encode(flat, key=None).reshape(shards, block, -1)

    found = jnp.swapaxes(jax.lax.map(encode, parts), 0, 1)
    return found.reshape(shards, blocks * block, -1)[:, :rows].reshape(tokens.shape[0], -1)
