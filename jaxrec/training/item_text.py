"""What a step does with the text of items.

Encoding every text in every step is out of the question. The vectors of the whole catalogue are therefore kept
(`text_cache`) and encoded anew every so often (`text_refresh`). A step looks them up beside the rows, and encodes with
a gradient the texts of a few items of its batch, whose vectors stand for the kept ones wherever these items occur:
among events, targets, negatives, and in the catalogue of a full softmax, which alone grows with the number of items.

R = physical rows, T = tokens of a text, E = width of the text encoder, D = item dim, U = items that are encoded.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxrec.core.hashing import hashed_rows
from jaxrec.core.partition import spec
from jaxrec.core.placement import local_index, logical_ids
from jaxrec.embedding.distinct import draw_distinct
from jaxrec.embedding.engine import Exchange, join_shared, look_up, split_shared
from jaxrec.embedding.exchange import NO_KEY
from jaxrec.models.item_text import ItemText, ItemTexts, TextTower
from jaxrec.models.two_tower import ITEM, ITEM_BIAS, TwoTower
from jaxrec.training.text_cache import HAS_EVENTS, TOKENS, VECTORS


def looked_up_arrays(texts: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The arrays that are looked up with the rows of the items; {} without text."""
    return {name: texts[name] for name in (VECTORS, HAS_EVENTS)} if texts else {}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
    """The items of a step whose text is encoded with a gradient.

    Attributes:
      item_ids: rising; `NO_KEY` where the batch has fewer.
      tokens: of their texts, split over the devices, padded to divide over them.
    """

    item_ids: Int[Array, "u"]
    tokens: Int[Array, "v t"]


def choose_encoded(
    config: TextTower,
    texts: Mapping[str, jax.Array],
    event_ids: Int[Array, "b l"],
    *,
    num_items: int,
    parts: int,
    key: jax.Array,
    exchange: Exchange,
) -> Encoded | None:
    """Draws them from the events of a batch and fetches their tokens; None where the encoder is frozen.

    Args:
      parts: batches of a step: each has its share of `trained_items`.
    """
    if config.frozen:
        return None
    if config.trained_items >= num_items:
        item_ids = jnp.arange(1, num_items + 1, dtype=jnp.int32)
    else:
        item_ids = draw_distinct(event_ids, -(-config.trained_items // parts), key)
    wanted = split_shared(jnp.where(item_ids < NO_KEY, item_ids, 0))
    found, _, _ = look_up({TOKENS: texts[TOKENS]}, {"": wanted}, exchange=exchange)
    return Encoded(item_ids, found[TOKENS][""])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepTexts:
    """What a step knows of the text of the items that it looked up, before the model comes in.

    Attributes:
      ids: of the look-ups.
      found: rows of the cache, by array and look-up.
      whole: the cache.
      encoded: what is encoded in this step.
      id_key: decides whose rows are left out; of the step, so that its batches agree.
      id_dropout_rate: static.
    """

    ids: Mapping[Any, jax.Array]
    found: Mapping[str, Mapping[Any, jax.Array]]
    whole: Mapping[str, jax.Array]
    encoded: Encoded | None
    id_key: jax.Array
    id_dropout_rate: float = dataclasses.field(metadata={"static": True})

    @property
    def tokens(self) -> Int[Array, "v t"] | None:
        """Of the texts that are encoded with a gradient."""
        return None if self.encoded is None else self.encoded.tokens

    def enter(
        self,
        model: TwoTower,
        rows: Mapping[str, Mapping[Any, jax.Array]],
        catalogue: Mapping[str, jax.Array],
        key: jax.Array,
    ) -> tuple[dict[str, dict[Any, jax.Array]], dict[str, jax.Array]]:
        """Rows and catalogue with v(y) for the items' rows.

        Args:
          key: of the text encoder's dropout.
        """
        fresh = None
        if self.encoded is not None:
            vectors = model.text.project(model.text.encode(self.encoded.tokens, key=key))
            fresh = join_shared(vectors, self.encoded.item_ids.size)
        entered = {name: dict(of_table) for name, of_table in rows.items()}
        for where in self.ids:
            of_items = {name: rows[name][where] for name in (ITEM, ITEM_BIAS) if name in rows}
            for name, value in with_texts(model, of_items, self._looked_up(model.text, fresh, where)).items():
                entered[name][where] = value
        whole = dict(catalogue)
        if ITEM in catalogue:
            whole |= with_texts(model, catalogue, self._whole(model.text, fresh))
        return entered, whole

    def _looked_up(self, item_text: ItemText, fresh: jax.Array | None, where: Any) -> ItemTexts:
        ids = self.ids[where]
        texts = kept_texts(item_text, {name: found[where] for name, found in self.found.items()})
        vectors = texts.vectors
        if self.encoded is not None and fresh is not None:
            item_ids = self.encoded.item_ids
            place = jnp.minimum(jnp.searchsorted(item_ids, ids), item_ids.size - 1)
            vectors = jnp.where((item_ids[place] == ids)[..., None], fresh[place], vectors)
        return dataclasses.replace(texts, vectors=vectors, by_id=self._by_id(texts, ids))

    def _whole(self, item_text: ItemText, fresh: jax.Array | None) -> ItemTexts:
        texts = kept_texts(item_text, self.whole)
        vectors = texts.vectors
        if self.encoded is not None and fresh is not None:
            put = jax.shard_map(
                _put_rows, in_specs=(spec("row"), P(), P()), out_specs=spec("row"), check_vma=False
            )
            vectors = put(vectors, fresh, self.encoded.item_ids)
        ids = logical_ids(vectors.shape[0])
        return dataclasses.replace(texts, vectors=vectors, by_id=self._by_id(texts, ids))

    def _by_id(self, texts: ItemTexts, ids: Int[Array, "*b"]) -> Bool[Array, "*b"]:
        """Items without a text keep their row: else nothing would be left of them."""
        if self.id_dropout_rate in (0.0, 1.0):  # of 1 `kept_texts` has told
            return texts.by_id
        bits = hashed_rows(self.id_key, ids.reshape(-1).astype(jnp.uint32), ()).reshape(ids.shape)
        kept = bits >= np.uint32(self.id_dropout_rate * 2**32)
        return texts.by_id & (kept | ~texts.has_text)


def kept_texts(item_text: ItemText, rows: Mapping[str, jax.Array]) -> ItemTexts:
    """What rows of the cache say of their items, as evaluated: no gradient, no item left out."""
    vectors = rows[VECTORS]
    has_text = jnp.any(vectors != 0, -1)
    by_id = (rows[HAS_EVENTS][..., 0] > 0) & (not item_text.config.alone) | ~has_text
    return ItemTexts(item_text.project(vectors), has_text, by_id)


def with_texts(model: TwoTower, of_items: Mapping[str, jax.Array], texts: ItemTexts) -> dict[str, jax.Array]:
    """v(y) for the rows of items, and b_y, which goes with the row: an item that is its text alone has none."""
    found = {ITEM: model.item_vectors(of_items[ITEM], texts)}
    if ITEM_BIAS in of_items:
        found[ITEM_BIAS] = of_items[ITEM_BIAS] * texts.by_id[..., None]
    return found


def _put_rows(
    shard: Float[Array, "r d"], rows: Float[Array, "u d"], ids: Int[Array, "u"]
) -> Float[Array, "r d"]:
    """Inside `shard_map`: the shard with those of `rows` that are its own in their places."""
    place = local_index(ids, shard.shape[0])
    place = jnp.where(place < shard.shape[0], place, shard.shape[0] + jnp.arange(ids.size))
    return shard.at[place].set(rows, mode="drop", unique_indices=True)
