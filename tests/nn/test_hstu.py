"""HSTU's weights in chunks, against the path that holds them all. `test_encoder.py` holds the layer to its formula."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from jax.sharding import PartitionSpec as P

from jaxrec.core.partition import spec
from jaxrec.nn.chunked_attention import mix_in_chunks
from jaxrec.nn.hstu import mix
from jaxrec.nn.positions import NUM_DISTANCES, score_bias
from jaxrec.nn.visibility import Visibility

B, H, L, K, V, CHUNK = 2, 3, 21, 4, 5, 8
KEY = jax.random.key(7)
RANDOM = np.random.default_rng(0)


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RANDOM.normal(size=shape), dtype)


def random_arrays(rows, queries, dtype=jnp.float32):
    shapes = (rows, H, queries, K), (rows, H, L, K), (rows, H, L, V)
    return *(normal(*shape, dtype=dtype) for shape in shapes), {
        "distance": normal(rows, H, 2 * NUM_DISTANCES)
    }


def by_full(query, key, value, tables, *, seen, rate):
    return mix(query, key, value, seen.mask, KEY, rate, score_bias(tables, seen.queries, seen.keys))


def by_chunks(query, key, value, tables, *, seen, rate):
    return mix_in_chunks(query, key, value, seen, KEY, rate, CHUNK, tables)


def output_and_gradients(mix_by, arrays, seen, rate):
    output, pull = jax.vjp(functools.partial(mix_by, seen=seen, rate=rate), *arrays)
    return output, pull(jnp.sin(jnp.arange(output.size)).reshape(output.shape).astype(output.dtype))


@functools.partial(jax.jit, static_argnames=("causal", "rate"))
def by_both(arrays, segment_ids, query_positions, *, causal, rate):
    look = functools.partial(Visibility.of, segment_ids, causal=causal, query_positions=query_positions)
    return (
        output_and_gradients(by_full, arrays, look(), rate),
        output_and_gradients(by_chunks, arrays, look(path="chunked"), rate),
    )


@pytest.mark.parametrize(
    ("num_queries", "causal", "rate"), [(None, True, 0.4), (None, False, 0.0), (10, False, 0.4)]
)
@settings(max_examples=5)
@given(data=st.data())
def test_chunks_have_the_automatic_gradients(num_queries, causal, rate, data):
    segment_ids = data.draw(arrays_of.arrays(np.int32, (B, L), elements=st.integers(0, 3)), "segments")
    query_positions = None
    if num_queries:
        columns = arrays_of.arrays(np.int32, (B, num_queries), elements=st.integers(0, L - 1))
        query_positions = data.draw(columns, "query_positions")
    arrays = random_arrays(B, num_queries or L)
    wanted, got = by_both(arrays, segment_ids, query_positions, causal=causal, rate=rate)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


def test_bfloat16_stays_near_float32():
    segment_ids = jnp.ones((B, L), jnp.int32)
    arrays = random_arrays(B, L)
    narrow = (*(x.astype(jnp.bfloat16) for x in arrays[:3]), arrays[3])
    (exact, _), found = (by_both(each, segment_ids, None, causal=True, rate=0.0) for each in (arrays, narrow))
    for got in found:
        assert [x.dtype for x in (got[0], *got[1][:3])] == [jnp.bfloat16] * 4
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
            one, other = np.asarray(one, np.float32), np.asarray(other)
            assert np.abs(one - other).max() < 0.03 * np.abs(other).max()


def test_chunks_are_the_same_on_every_mesh_and_move_nothing(mesh):
    arrays, segment_ids = random_arrays(8, L), jnp.ones((8, L), jnp.int32)

    def run(arrays, segment_ids):
        seen = Visibility.of(segment_ids, causal=True, path="chunked")
        return output_and_gradients(by_chunks, arrays, seen, 0.3)

    wanted = jax.jit(run)(arrays, segment_ids)
    placed = jax.device_put((arrays, segment_ids), jax.NamedSharding(mesh, P(*spec("batch"))))
    compiled = jax.jit(run).lower(*placed).compile()
    for one, other in zip(jax.tree.leaves(compiled(*placed)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)
    assert not re.search("all-|collective-permute", compiled.as_text())
