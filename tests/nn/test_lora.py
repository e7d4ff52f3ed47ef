"""Adapters: nothing at the start, and merged the same function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.nn.encoder import Encoder, EncoderConfig
from jaxrec.nn.lora import merge_adapters

PLAIN = EncoderConfig(embed_dim=8, num_layers=4, num_heads=2, mlp_dim=16, max_positions=6)
ADAPTED = dataclasses.replace(PLAIN, lora_rank=2, lora_alpha=3.0)


def split(config, seed):
    graphdef, state = nnx.split(Encoder(config, rngs=nnx.Rngs(params=seed)), nnx.Param)
    return graphdef, state, nnx.to_pure_dict(state)


def with_base(adapted, plain):
    """The adapters of one tree over the parameters of another."""
    return {
        name: with_base(value, plain[name])
        if isinstance(value, dict) and name in plain
        else plain.get(name, value)
        for name, value in adapted.items()
    }


def encode(config, dense, dtype, last_positions=None):
    graphdef, state, _ = split(config, 0)
    nnx.replace_by_pure_dict(state, dense)
    x = jax.random.normal(jax.random.key(5), (2, 6, 8)).astype(dtype)
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    positions = jnp.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    return nnx.merge(graphdef, state)(
        x, segment_ids=segment_ids, positions=positions, causal=True, key=None, last_positions=last_positions
    )


@pytest.mark.parametrize(
    "changes", [{}, {"scan_layers": True, "norm_position": "pre"}, {"dtype": "bfloat16"}], ids=str
)
def test_an_adapter_is_nothing_at_first_and_merges_into_its_kernel(changes):
    plain, adapted = (dataclasses.replace(config, **changes) for config in (PLAIN, ADAPTED))
    base = split(plain, 1)[2]
    dense = with_base(split(adapted, 2)[2], base)
    last = jnp.array([[2, 4], [5, 0]])
    for columns in (None, last):
        np.testing.assert_array_equal(
            encode(adapted, dense, plain.dtype, columns), encode(plain, base, plain.dtype, columns)
        )
    shaken = jax.tree_util.tree_map_with_path(
        lambda path, x: (
            0.2 * jax.random.normal(jax.random.key(len(path)), x.shape)
            if path[-1].key == "b" and "lora" in path[-2].key
            else x
        ),
        dense,
    )
    merged = merge_adapters(shaken, adapted.lora)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    tolerance = 0.25 if plain.dtype == "bfloat16" else 1e-5  # 0.16 = how far bfloat16 alone is off
    for columns in (None, last):
        found = np.asarray(encode(adapted, shaken, plain.dtype, columns), np.float32)
        np.testing.assert_allclose(
            found, np.asarray(encode(plain, merged, plain.dtype, columns), np.float32), atol=tolerance
        )
        assert np.abs(found - np.asarray(encode(plain, base, plain.dtype, columns), np.float32)).max() > 0.5


@pytest.mark.parametrize(
    "values", [{"lora_rank": -1}, {"lora_alpha": 2.0}, {"lora_rank": 2, "lora_alpha": -1.0}]
)
def test_bad_sizes_are_refused(values):
    with pytest.raises(ValueError, match="without adapters"):
        dataclasses.replace(PLAIN, **values)
