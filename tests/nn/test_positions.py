"""Rotation and biases: differences alone count, and every path's gradients are those of a naive twin."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from jax.sharding import PartitionSpec as P

from jaxrec.core.batch import NUM_TIME_GAPS
from jaxrec.core.partition import spec
from jaxrec.nn.attention import attend
from jaxrec.nn.chunked_attention import attend_in_chunks
from jaxrec.nn.dropout import dropout
from jaxrec.nn.encoder import Encoder, EncoderConfig
from jaxrec.nn.positions import NUM_DISTANCES, distance_buckets, rotate, score_bias, time_buckets
from jaxrec.nn.visibility import MASKED, Places, Visibility

B, H, L, K, CHUNK = 2, 3, 21, 4, 8
KEY = jax.random.key(7)
RANDOM = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


def random_tables(rows):
    return {"distance": normal(rows, H, 2 * NUM_DISTANCES), "time": normal(rows, H, 2 * NUM_TIME_GAPS)}


def one_place(column, seconds):
    """A row with one position."""
    one = lambda value: jnp.full((1, 1), value, jnp.int32)  # noqa: E731
    return Places(segments=one(1), columns=one(column), times=one(seconds))


@settings(max_examples=20)
@given(columns=st.tuples(*[st.integers(0, 8192)] * 2), shift=st.integers(0, 50))
def test_rotated_products_see_the_difference_alone(columns, shift):
    query, key = (jax.random.normal(jax.random.fold_in(KEY, i), (1, 1, 1, 6)) for i in range(2))

    def product(a, b):
        turned = [rotate(x, jnp.full((1, 1), at, jnp.int32)) for x, at in ((query, a), (key, b))]
        return float(jnp.sum(turned[0] * turned[1]))

    assert product(*columns) == pytest.approx(product(columns[0] + shift, columns[1] + shift), abs=2e-2)
    assert product(columns[0], columns[0]) == pytest.approx(float(jnp.sum(query * key)), abs=1e-5)


@given(query=st.integers(0, 10_000), key=st.integers(0, 10_000))
def test_distances_have_a_bucket_each_then_four_an_octave(query, key):
    bucket = int(distance_buckets(one_place(query, 0), one_place(key, 0))[0, 0, 0])
    distance = abs(query - key)
    wanted = distance if distance < 16 else min(16 + math.floor(4 * (distance.bit_length() - 5)), 47)
    side = NUM_DISTANCES * (key > query)
    assert 0 <= bucket - side - wanted < (4 if 16 <= distance < 4096 else 1)
    octave = 1 << (distance.bit_length() - 1) if distance else 1
    if 16 <= distance < 4096:
        assert bucket - side == wanted + 4 * (distance - octave) // octave


@given(query=st.integers(-1, 2**31 - 1), key=st.integers(-1, 2**31 - 1))
def test_times_have_a_bucket_a_bit(query, key):
    bucket = int(time_buckets(one_place(0, query), one_place(0, key))[0, 0, 0])
    wanted = min(abs(query - key).bit_length() + 1, NUM_TIME_GAPS - 1) + NUM_TIME_GAPS * (key > query)
    assert bucket == (0 if min(query, key) < 0 else wanted)


def naive_attend(query, key, value, tables, seen, rate):
    """Written as the formula, with the bias looked up by loops over the buckets; for the automatic derivative."""
    mask = Visibility.of(seen.segment_ids, causal=seen.causal, query_positions=seen.query_positions).mask
    scores = jnp.einsum("bhqk,bhlk->bhql", query, key) / math.sqrt(K)
    for name, buckets in (("distance", distance_buckets), ("time", time_buckets)):
        found = buckets(seen.queries, seen.keys)[:, None]
        for bucket in range(tables[name].shape[-1]):
            scores += jnp.where(found == bucket, tables[name][:, :, bucket, None, None], 0.0)
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, MASKED), axis=-1)
    return jnp.einsum("bhql,bhlk->bhqk", dropout(weights, rate, KEY), value)


def by_full(query, key, value, tables, seen, rate):
    bias = score_bias(tables, seen.queries, seen.keys)
    return attend(query, key, value, seen.mask, KEY, rate, bias)


def by_chunks(query, key, value, tables, seen, rate):
    tables = {name: jnp.broadcast_to(table, (len(query), *table.shape[1:])) for name, table in tables.items()}
    return attend_in_chunks(query, key, value, seen, KEY, rate, CHUNK, tables)


def output_and_gradients(attend_by, arrays, seen, rate):
    output, pull = jax.vjp(functools.partial(attend_by, seen=seen, rate=rate), *arrays)
    return output, pull(jnp.sin(jnp.arange(output.size)).reshape(output.shape))


@functools.partial(jax.jit, static_argnames=("causal", "rate"))
def by_all_paths(arrays, segment_ids, query_positions, times, *, causal, rate):
    options = {"causal": causal, "query_positions": query_positions, "times": times}
    full, chunked = (Visibility.of(segment_ids, path=path, **options) for path in ("full", "chunked"))
    return (
        output_and_gradients(naive_attend, arrays, full, rate),
        output_and_gradients(by_full, arrays, full, rate),
        output_and_gradients(by_chunks, arrays, chunked, rate),
    )


@pytest.mark.parametrize(
    ("num_queries", "causal", "rate"), [(None, True, 0.4), (None, False, 0.0), (10, False, 0.4)]
)
@settings(max_examples=5)
@given(data=st.data())
def test_every_path_has_the_gradients_of_the_naive_twin(num_queries, causal, rate, data):
    integers = lambda low, high: arrays_of.arrays(np.int32, (B, L), elements=st.integers(low, high))  # noqa: E731
    segment_ids, times = data.draw(integers(0, 3), "segments"), data.draw(integers(-1, 2**31 - 1), "times")
    query_positions = None
    if num_queries:
        columns = arrays_of.arrays(np.int32, (B, num_queries), elements=st.integers(0, L - 1))
        query_positions = data.draw(columns, "query_positions")
    arrays = (normal(B, H, num_queries or L, K), normal(B, H, L, K), normal(B, H, L, K), random_tables(1))
    wanted, *found = by_all_paths(arrays, segment_ids, query_positions, times, causal=causal, rate=rate)
    for got in found:
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


def test_the_biases_of_chunks_move_nothing_between_devices(mesh):
    """A row's tables are its own until the loop over the tiles has ended."""
    arrays = (*(normal(8, H, L, K) for _ in range(3)), random_tables(8))
    segment_ids, times = (
        jnp.ones((8, L), jnp.int32),
        jnp.asarray(RANDOM.integers(-1, 9999, (8, L)), jnp.int32),
    )

    def run(arrays, segment_ids, times):
        seen = Visibility.of(segment_ids, causal=True, times=times, path="chunked")
        return output_and_gradients(by_chunks, arrays, seen, 0.3)

    wanted = jax.jit(run)(arrays, segment_ids, times)
    placed = jax.device_put((arrays, segment_ids, times), jax.NamedSharding(mesh, P(*spec("batch"))))
    compiled = jax.jit(run).lower(*placed).compile()
    for one, other in zip(jax.tree.leaves(compiled(*placed)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)
    assert not re.search("all-|collective-permute", compiled.as_text())


@pytest.mark.parametrize("block", ["transformer", "hstu"])
def test_a_long_row_never_meets_its_square(block):
    options = {"block": block, "activation": "silu", "positions": "relative", "time_bias": True}
    config = EncoderConfig(embed_dim=16, num_heads=2, mlp_dim=8, **options)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0))))

    def loss(state, x, integers):
        model = nnx.merge(graphdef, state)
        options = {"segment_ids": integers, "positions": integers, "times": integers}
        return jnp.sum(model(x, causal=True, key=KEY, **options))

    x, integers = (jax.ShapeDtypeStruct((1, 1024, *wide), kind) for wide, kind in (((16,), "f4"), ((), "i4")))
    assert "1024,1024" not in str(jax.make_jaxpr(jax.grad(loss))(state, x, integers))


def test_times_are_asked_for_by_name():
    config = EncoderConfig(embed_dim=4, num_layers=1, mlp_dim=4, time_bias=True)
    ones = jnp.ones((1, 3), jnp.int32)
    with pytest.raises(ValueError, match="time_bias=True needs the times of the events"):
        Encoder(config, rngs=nnx.Rngs(0))(
            jnp.ones((1, 3, 4)), segment_ids=ones, positions=ones, causal=True, key=None
        )
