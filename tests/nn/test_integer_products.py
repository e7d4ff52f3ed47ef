"""Products of whole numbers: near those of floats, by int8 operands, with the gradient of floats."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.nn.encoder import Encoder, EncoderConfig
from jaxrec.nn.integer_products import integer_product, use_products
from jaxrec.nn.layers import affine


@settings(max_examples=10)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 7), st.integers(0, 99))
def test_a_product_is_off_by_at_most_half_a_scale_of_each_side(rows, width, outputs, seed):
    rng = np.random.default_rng(seed)
    x, kernel = rng.normal(size=(rows, width)), rng.normal(size=(width, outputs))
    x, kernel = x.astype(np.float32), kernel.astype(np.float32)
    found = integer_product(jnp.asarray(x), jnp.asarray(kernel))
    of_x, of_kernel = np.abs(x).max(1, keepdims=True) / 254, np.abs(kernel).max(0) / 254
    bound = (
        of_x * np.abs(kernel).sum(0) + np.abs(x).sum(1, keepdims=True) * of_kernel + width * of_x * of_kernel
    )
    assert (np.abs(found - x @ kernel) <= bound * (1 + 1e-4) + 1e-6).all()


def test_the_gradient_is_that_of_floats_and_the_operands_are_int8():
    rng = np.random.default_rng(0)
    arguments = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 8), (8, 3), (3,))]

    def gradients(kind):
        with use_products(kind):
            return jax.grad(lambda *a: jnp.sum(affine(*a)), argnums=(0, 1, 2))(*arguments)

    jax.tree.map(np.testing.assert_array_equal, gradients("int8"), gradients("float"))
    # A program that was traced is kept by its function: each needs one of its own, as each encoder has.
    with use_products("int8"):
        assert "i8[4,8]" in str(jax.make_jaxpr(lambda *a: affine(*a))(*arguments))
    assert "i8" not in str(jax.make_jaxpr(lambda *a: affine(*a))(*arguments))


def test_an_encoder_says_which_products_it_takes():
    config = EncoderConfig(embed_dim=16, num_layers=3, num_heads=2, mlp_dim=32, max_positions=8)
    x = jax.random.normal(jax.random.key(0), (2, 8, 16))
    where = {"segment_ids": jnp.ones((2, 8), int), "positions": jnp.arange(8)[None].repeat(2, 0)}

    def states(**changes):
        graphdef, state = nnx.split(Encoder(dataclasses.replace(config, **changes), rngs=nnx.Rngs(0)))
        ask = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x, causal=True, key=None, **where))
        return ask(state, x)

    exact, coarse = states(), states(products="int8")
    np.testing.assert_allclose(coarse, exact, atol=0.15)
    assert np.abs(coarse - exact).max() > 1e-4
    for options in ({"remat": True}, {"scan_layers": True}):
        np.testing.assert_allclose(states(products="int8", **options), coarse, atol=2e-2)


def test_heads_may_be_narrower_together_than_the_model():
    config = EncoderConfig(embed_dim=16, num_layers=2, num_heads=3, head_dim=4, mlp_dim=32, max_positions=8)
    encoder = Encoder(config, rngs=nnx.Rngs(0))
    assert encoder.blocks[0].attention.qkv_kernel.shape == (16, 3, 3, 4)
    x = jax.random.normal(jax.random.key(0), (2, 8, 16))
    where = {"segment_ids": jnp.ones((2, 8), int), "positions": jnp.arange(8)[None].repeat(2, 0)}
    full = encoder(x, causal=True, key=None, **where)
    some = encoder(x, causal=True, key=None, last_positions=jnp.array([[7], [2]]), **where)
    np.testing.assert_allclose(some[:, 0], full[jnp.arange(2), jnp.array([7, 2])], atol=1e-5)
    chunked = Encoder(dataclasses.replace(config, attention="chunked"), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(chunked(x, causal=True, key=None, **where), full, atol=1e-5)
