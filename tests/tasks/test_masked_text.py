"""Masked words: which are hidden and behind what, and a loss that equals the dense one on every mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.core.partition import spec
from jaxrec.models.item_text import ItemText, TextTower
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.masked_text import MaskedText

WORDS, MASK = 30, 29
ENCODER = EncoderConfig(
    embed_dim=8, num_layers=1, mlp_dim=8, max_positions=16, vocab_size=WORDS, type_vocab_size=1, dropout_rate=0.0,
    attention_dropout_rate=0.0, embedding_dropout_rate=0.0,
)  # fmt: skip
TASK = MaskedText(mask_token=MASK)


def texts(lengths, width=12, seed=0):
    """`[CLS] words [SEP]` of these numbers of tokens; 0 = no text."""
    tokens = np.random.default_rng(seed).integers(4, MASK, (len(lengths), width)).astype(np.int32)
    return jnp.asarray(np.where(np.arange(width) < np.array(lengths)[:, None], tokens, 0))


@settings(max_examples=15)
@given(st.lists(st.sampled_from([0, 3, 4, 7, 12]), min_size=6, max_size=6), st.sampled_from([0.15, 0.5, 1.0]))
def test_a_share_of_the_inner_words_is_hidden_and_nothing_else(lengths, rate):
    task, tokens = dataclasses.replace(TASK, mask_rate=rate, keep_rate=0.0, replace_rate=0.0), texts(lengths)
    columns, weights = task.hidden(tokens, jax.random.key(1))
    shown = np.asarray(task.shown(tokens, columns, weights > 0, WORDS, jax.random.key(2)))
    assert columns.shape == (6, task.masked_tokens(12))
    for row, length in enumerate(lengths):
        hidden = set(np.asarray(columns)[row][np.asarray(weights)[row] > 0])
        assert hidden <= set(range(1, length - 1))
        assert len(hidden) == (max(1, round(rate * (length - 2))) if length else 0)
        expected = np.where(np.isin(np.arange(12), list(hidden)), MASK, tokens[row])
        np.testing.assert_array_equal(shown[row], expected)


def test_of_the_hidden_words_ten_percent_stay_and_ten_are_others():
    tokens = texts([12] * 2000)
    task = dataclasses.replace(TASK, mask_rate=1.0)
    columns, weights = task.hidden(tokens, jax.random.key(1))
    shown = np.asarray(task.shown(tokens, columns, weights > 0, WORDS, jax.random.key(2)))[:, 1:-1]
    own = np.asarray(tokens)[:, 1:-1]
    assert abs((shown == MASK).mean() - 0.8 - 0.1 / WORDS) < 0.01
    assert abs((shown == own).mean() - 0.1 - 0.1 / WORDS) < 0.01
    assert shown.min() >= 1 and shown.max() < WORDS


@dataclasses.dataclass
class Given:
    """What the loss asks of a forward pass."""

    model: object
    text_tokens: jax.Array


def test_the_loss_is_the_dense_one_on_every_mesh(mesh):
    model = ItemText(TextTower(encoder=ENCODER, masked_head=True), 4, 1.0, rngs=nnx.Rngs(0))
    model.word_bias[...] = jnp.linspace(-1.0, 1.0, WORDS)
    graphdef, state = nnx.split(model)
    tokens = texts([12, 5, 0, 3, 9, 12, 4, 0])

    @jax.jit
    def loss(state, tokens):
        tokens = jax.lax.with_sharding_constraint(tokens, spec("batch"))
        text = nnx.merge(graphdef, state)
        forward = Given(type("Model", (), {"text": text}), tokens)
        return TASK.loss(forward, TASK.plan(None, None, None), jax.random.key(3)).total

    @jax.jit
    def dense(state, tokens):
        text, key = nnx.merge(graphdef, state), jax.random.key(3)
        columns, weights = TASK.hidden(tokens, jax.random.fold_in(key, 0))
        shown = TASK.shown(tokens, columns, weights > 0, WORDS, key)
        states = text.word_states(text.encoder(shown, tokens > 0, key=None))
        logits = (states @ text.encoder.token_table[...].T + text.word_bias[...]).at[..., 0].set(-jnp.inf)
        rows = jnp.arange(len(tokens))[:, None]
        losses = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
        return jnp.sum(jnp.where(weights > 0, losses[rows, columns], 0.0)) / jnp.sum(weights)

    found, wanted = (jax.value_and_grad(f)(state, tokens) for f in (loss, dense))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found[1], wanted[1])


@pytest.mark.parametrize(
    ("field", "value"), [("mask_rate", 0.0), ("keep_rate", -0.1), ("replace_rate", 0.95), ("mask_token", 0)]
)
def test_bad_settings_name_themselves(field, value):
    with pytest.raises(ValueError, match=rf"{field}={value}"):
        MaskedText(**{field: value})
