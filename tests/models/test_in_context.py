"""Rows of an event's context, added to its query."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.models.two_tower import TwoTower, TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig

ENCODER = EncoderConfig(embed_dim=4, num_layers=1, num_heads=1, mlp_dim=4, max_positions=4)


def model_of(context_rows):
    config = TwoTowerConfig(encoder=ENCODER, item_dim=4, context_rows=context_rows, init_scale=1.0)
    return TwoTower(config, rngs=nnx.Rngs(params=jax.random.key(0)))


def test_hashes_are_folded_into_the_rows_and_the_unknown_adds_nothing():
    model = model_of(5)
    table = np.asarray(model.context_table[...])
    queries = np.ones((2, 4), np.float32)
    found = model.in_context(jnp.asarray(queries), jnp.array([[12, 3, 0], [0, 0, 0]]))
    np.testing.assert_allclose(found[0], 1 + table[2] + table[3], rtol=1e-6)
    np.testing.assert_array_equal(found[1], queries[1])


def test_a_model_without_rows_reads_no_context():
    queries = jnp.ones((1, 4))
    assert model_of(0).in_context(queries, jnp.array([[7]])) is queries


def test_one_row_tells_nothing():
    with pytest.raises(ValueError, match="context_rows=1 must be at least 2"):
        TwoTowerConfig(context_rows=1)
