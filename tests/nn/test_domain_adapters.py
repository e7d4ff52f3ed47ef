"""Adapters of domains: nothing at the start, by hand afterwards, and each is trained by its own domain alone."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.nn.domain_adapters import DomainAdapters

DIM, RANK, DOMAINS = 6, 3, 4
IDS = np.array([[1, 1, 3, 0], [3, 0, 1, 1]], np.int32)  # nobody of domains 2 and 4; 0 = padding
X = np.random.default_rng(0).normal(size=(2, 4, DIM)).astype(np.float32)


def adapters(random):
    made = DomainAdapters(DOMAINS, DIM, RANK, rngs=nnx.Rngs(0))
    if random:
        for number, name in enumerate(("up", "up_bias", "down_bias")):
            parameter = getattr(made, name)
            parameter[...] = jax.random.normal(jax.random.key(number), parameter.shape)
    return made


def test_they_start_as_the_identity():
    np.testing.assert_array_equal(adapters(random=False)(jnp.asarray(X), IDS), X)


def test_each_position_has_the_map_of_its_domain():
    made = adapters(random=True)
    found = np.asarray(made(jnp.asarray(X), IDS))
    for place in np.ndindex(IDS.shape):
        x, own = X[place], IDS[place] - 1
        wanted = x
        if own >= 0:
            inner = jax.nn.gelu(x @ made.down[...][own] + made.down_bias[...][own])
            wanted = x + inner @ made.up[...][own] + made.up_bias[...][own]
        np.testing.assert_allclose(found[place], wanted, rtol=1e-5, atol=1e-5)


def test_only_the_domains_that_are_there_get_a_gradient():
    graphdef, state = nnx.split(adapters(random=True))
    weights = np.random.default_rng(1).normal(size=X.shape)
    gradients = jax.grad(lambda s: jnp.sum(nnx.merge(graphdef, s)(jnp.asarray(X), IDS) * weights))(state)
    for name, value in nnx.to_pure_dict(gradients).items():
        moved = np.abs(np.asarray(value)).reshape(DOMAINS, -1).max(axis=1) > 0
        assert moved.tolist() == [True, False, True, False], name
