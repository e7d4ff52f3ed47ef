"""Drawing distinct ids: every mesh draws the same, and each id is as likely as another."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.core.mesh import make_mesh
from jaxrec.embedding.distinct import draw_distinct
from jaxrec.embedding.exchange import NO_KEY

COUNT = 5
MESHES = [make_mesh((1, 1), jax.devices()[:1]), make_mesh((2, 4))]
DRAWS = [jax.jit(lambda ids, key: draw_distinct(ids, COUNT, key)) for _ in MESHES]


@settings(max_examples=20)
@given(st.lists(st.integers(0, 9), min_size=24, max_size=24), st.integers(0, 2**31 - 1))
def test_every_mesh_draws_the_same_distinct_ids(ids, seed):
    array, found = jnp.array(ids, jnp.int32).reshape(8, 3), []
    for mesh, draw in zip(MESHES, DRAWS, strict=True):
        with jax.set_mesh(mesh):
            found.append(np.asarray(draw(array, jax.random.key(seed))))
    np.testing.assert_array_equal(*found)
    drawn = [i for i in found[0] if i < NO_KEY]
    assert len(set(drawn)) == len(drawn) == min(COUNT, len(set(ids) - {0}))
    assert set(drawn) <= set(ids) - {0}
    assert sorted(found[0]) == list(found[0])


def test_ids_are_drawn_alike_however_often_they_occur():
    ids = jnp.array([1] * 15 + list(range(2, 11)), jnp.int32).reshape(8, 3)
    with jax.set_mesh(MESHES[0]):
        draws = [np.asarray(DRAWS[0](ids, jax.random.key(seed))) for seed in range(400)]
    shares = np.bincount(np.concatenate(draws), minlength=11)[1:] / 400
    assert np.abs(shares - 0.5).max() < 0.12
