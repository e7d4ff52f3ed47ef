"""The text tower's config, and the gate between row and text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.models.item_text import ItemText, ItemTexts, TextTower
from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.training.item_text import kept_texts
from jaxrec.training.text_cache import HAS_EVENTS, VECTORS

ENCODER = EncoderConfig(
    embed_dim=8, num_layers=1, mlp_dim=8, max_positions=6, vocab_size=9, type_vocab_size=1
)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_a_text_is_pooled_over_its_own_tokens_and_an_empty_one_is_zero(pooling):
    text = ItemText(TextTower(encoder=ENCODER, pooling=pooling), 4, 1.0, rngs=nnx.Rngs(0))
    hidden = jax.random.normal(jax.random.key(0), (2, 4, 8))
    tokens = jnp.array([[3, 4, 5, 0], [0, 0, 0, 0]])
    wanted = hidden[0, :3].mean(0) if pooling == "mean" else hidden[0, 0]
    np.testing.assert_allclose(text.pooled(hidden, tokens), jnp.stack([wanted, jnp.zeros(8)]), rtol=1e-6)


def test_the_gate_mixes_and_falls_to_what_there_is():
    text = ItemText(TextTower(encoder=ENCODER), 3, 1.0, rngs=nnx.Rngs(0))
    rows, vectors = jax.random.normal(jax.random.key(0), (2, 4, 3))
    has_text, by_id = jnp.array([1, 1, 0, 0], bool), jnp.array([1, 0, 1, 0], bool)
    found = text(rows, ItemTexts(vectors, has_text, by_id))
    gate = jax.nn.sigmoid(text.gate(jnp.concatenate([rows[0], vectors[0]])))
    np.testing.assert_allclose(found[0], gate * rows[0] + (1 - gate) * vectors[0], rtol=1e-5)
    np.testing.assert_array_equal(found[1:], [vectors[1], rows[2], rows[3]])


@pytest.mark.parametrize(("rate", "wanted"), [(0.9, [True, False, True]), (1.0, [False, False, True])])
def test_text_alone_keeps_the_row_of_an_item_without_a_text(rate, wanted):
    text = ItemText(TextTower(encoder=ENCODER, id_dropout_rate=rate), 3, 1.0, rngs=nnx.Rngs(0))
    rows = {VECTORS: jnp.eye(3, 8).at[2].set(0.0), HAS_EVENTS: jnp.array([[1], [0], [1]], jnp.int8)}
    np.testing.assert_array_equal(kept_texts(text, rows).by_id, wanted)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder": EncoderConfig()}, "text.encoder.vocab_size=0"),
        ({"pooling": "last"}, "text.pooling='last'"),
        ({"trained_items": -1}, "text.trained_items=-1"),
        ({"trained_items": 0}, "text.refresh_every_steps=100: with trained_items=0 the encoder is frozen"),
        ({"refresh_every_steps": 0}, "text.refresh_every_steps=0 must be at least 1"),
        ({"id_dropout_rate": 1.1}, "text.id_dropout_rate=1.1"),
    ],
)
def test_bad_settings_name_themselves(changes, said):
    with pytest.raises(ValueError, match=said):
        TextTower(**changes)


def test_one_layout_for_both_encoders():
    fsdp, tensor = EncoderConfig(layout="fsdp"), EncoderConfig(layout="tensor")
    text = EncoderConfig(layout="tensor", vocab_size=9, type_vocab_size=1)
    with pytest.raises(ValueError, match="text.encoder.layout='replicated' must equal encoder.layout='fsdp'"):
        TwoTowerConfig(encoder=fsdp, text=TextTower())
    with pytest.raises(ValueError, match="text.encoder.layout='tensor': a text encoder is not split"):
        TwoTowerConfig(encoder=tensor, text=TextTower(encoder=text))
