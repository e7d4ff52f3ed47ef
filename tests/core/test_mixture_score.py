"""The mixture of products: against its definition, one pair at a time."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.core.mixture_score import MixtureScore


def spelt_out(score, query, item):
    n, d = score.num_vectors, score.dim
    products = query[: n * d].reshape(n, d) @ item[: n * d].reshape(n, d).T
    gates = (query[n * d : -1] + item[n * d : -1]).reshape(n, n) + query[-1] * products
    weights = np.exp(gates - gates.max())
    return np.sum(weights * products) / weights.sum()


@settings(max_examples=12)
@given(
    shape=st.sampled_from([(1, 3), (3, 2)]),
    seed=st.integers(0, 999),
)
def test_pairs_and_all_pairs_are_the_definition(shape, seed):
    score, rng = MixtureScore(*shape), np.random.default_rng(seed)
    queries, items = (rng.normal(size=(size, score.width)).astype(np.float32) for size in (4, 5))
    wanted = [[spelt_out(score, query, item) for item in items] for query in queries]
    got = score.all_pairs(jnp.asarray(queries), jnp.asarray(items))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    repeated = np.repeat(queries[:1], len(items), axis=0)
    np.testing.assert_allclose(
        score.pairs(jnp.asarray(repeated), jnp.asarray(items)), wanted[0], rtol=1e-4, atol=1e-4
    )
