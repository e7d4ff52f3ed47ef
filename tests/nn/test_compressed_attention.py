"""Old events in groups: against a loop that spells the rule out, and against full attention where they must agree."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.core.mesh import make_mesh
from jaxrec.core.partition import spec
from jaxrec.nn.attention import attend
from jaxrec.nn.compressed_attention import Groups, HistoryCompression, attend_compressed
from jaxrec.nn.encoder import Encoder, EncoderConfig
from jaxrec.nn.visibility import Visibility
from jaxrec.training.flops import encoder_flops_per_row

B, H, K, LENGTH = 2, 2, 4, 26


def packed(parts, length=LENGTH):
    """A row of segments of these lengths, then padding."""
    ids = np.repeat(np.arange(1, len(parts) + 1), parts)[:length]
    return np.pad(ids, (0, length - len(ids))).astype(np.int32)


rows_of_segments = st.lists(st.integers(1, 20), min_size=1, max_size=5).map(packed)


def random_arrays(*shapes, seed=0):
    random = np.random.default_rng(seed)
    return tuple(jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes)


def spelt_out(query, key, value, segment_ids, recent, group, pool_query):
    """One query after the other."""
    out = np.zeros(query.shape)
    for b, h, q in np.ndindex(*query.shape[:3]):
        segment = segment_ids[b, q]
        if not segment:
            continue
        first = int(np.flatnonzero(segment_ids[b] == segment)[0])
        place = q - first
        since = max(0, place - recent + 1) // group * group
        keys, values, counts = [], [], []
        for start in range(0, since, group):
            members = slice(first + start, first + start + group)
            pooling = np.exp(key[b, h, members] @ pool_query[h])
            pooling /= pooling.sum()
            keys.append(pooling @ key[b, h, members])
            values.append(pooling @ value[b, h, members])
            counts.append(group)
        singles = slice(first + since, q + 1)
        keys, values = np.array([*keys, *key[b, h, singles]]), np.array([*values, *value[b, h, singles]])
        counts = np.array(counts + [1] * (place + 1 - since))
        weights = counts * np.exp(keys @ query[b, h, q] / math.sqrt(K))
        out[b, h, q] = weights @ values / weights.sum()
    return out


@functools.partial(jax.jit, static_argnames=("compression", "whole"))
def compressed(arrays, segment_ids, pool_query, query_positions, *, compression, whole):
    seen = Visibility.of(
        segment_ids,
        causal=True,
        path="compressed",
        query_positions=None if whole else query_positions,
    )
    return attend_compressed(*arrays, seen, compression, pool_query)


@settings(max_examples=25)
@given(
    rows=st.tuples(*[rows_of_segments] * B),
    shape=st.sampled_from([(1, 2), (3, 2), (4, 5), (7, 3), (25, 4), (40, 8)]),
)
def test_it_is_what_the_rule_says(rows, shape):
    segment_ids, compression = np.stack(rows), HistoryCompression(recent=shape[0], group=shape[1])
    *arrays, pool_query = random_arrays(*[(B, H, LENGTH, K)] * 3, (H, K))
    got = compressed(tuple(arrays), segment_ids, pool_query, None, compression=compression, whole=True)
    wanted = spelt_out(*(np.asarray(x) for x in arrays), segment_ids, *shape, np.asarray(pool_query))
    real = (segment_ids > 0)[:, None, :, None]
    np.testing.assert_allclose(np.where(real, got, 0), wanted, rtol=2e-4, atol=2e-5)


@settings(max_examples=15)
@given(rows=st.tuples(*[rows_of_segments] * B), data=st.data())
def test_some_columns_are_columns_of_the_whole(rows, data):
    segment_ids, compression = jnp.asarray(np.stack(rows)), HistoryCompression(recent=4, group=3)
    column = st.integers(0, LENGTH - 1)
    positions = np.array(data.draw(st.lists(st.tuples(column, column, column), min_size=B, max_size=B)))
    *arrays, pool_query = random_arrays(*[(B, H, LENGTH, K)] * 3, (H, K))
    at = jnp.asarray(positions, jnp.int32)
    ask = functools.partial(compressed, compression=compression)
    whole = ask(tuple(arrays), segment_ids, pool_query, None, whole=True)
    query = jnp.take_along_axis(arrays[0], at[:, None, :, None], axis=2)
    some = ask((query, *arrays[1:]), segment_ids, pool_query, at, whole=False)
    wanted = np.take_along_axis(np.asarray(whole), positions[:, None, :, None], axis=2)
    np.testing.assert_allclose(some, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recent", [5, LENGTH])
def test_full_attention_where_the_members_of_a_group_are_alike_or_nothing_is_old(recent):
    query, key, value, pool_query = random_arrays(*[(B, H, LENGTH, K)] * 3, (H, K))
    if recent < LENGTH:  # every three columns alike
        key, value = (jnp.repeat(x[:, :, ::3], 3, axis=2)[:, :, :LENGTH] for x in (key, value))
    segment_ids = jnp.ones((B, LENGTH), jnp.int32)
    compression = HistoryCompression(recent=recent, group=3)
    got = compressed((query, key, value), segment_ids, pool_query, None, compression=compression, whole=True)
    wanted = attend(query, key, value, Visibility.of(segment_ids, causal=True).mask)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_groups_are_complete_and_never_of_two_histories():
    groups = Groups.of(jnp.asarray([packed([7, 2, 9])]), 4)
    assert groups.members[0][:4].tolist() == [[0, 1, 2, 3], [9, 10, 11, 12], [13, 14, 15, 16], [0, 0, 0, 0]]
    assert groups.segments[0].tolist() == [1, 3, 3, -1, -1, -1]
    assert groups.ends[0][:3].tolist() == [3, 3, 7]


def model(**changes):
    values = {
        "embed_dim": 8, "num_layers": 2, "num_heads": 2, "mlp_dim": 8, "max_positions": 512,
        "attention_dropout_rate": 0.3, "compression": HistoryCompression(recent=4, group=2),
    }  # fmt: skip
    return Encoder(EncoderConfig(**(values | changes)), rngs=nnx.Rngs(params=jax.random.key(0)))


def encoded(encoder, x, segment_ids, **options):
    columns = jnp.broadcast_to(jnp.arange(x.shape[1]), segment_ids.shape)
    options = {"causal": True, "key": None, "positions": columns} | options
    graphdef, state = nnx.split(encoder)
    static = {name: options.pop(name) for name in ("causal",)}

    @jax.jit
    def run(state, x, segment_ids, options):
        return nnx.merge(graphdef, state)(x, segment_ids=segment_ids, **static, **options)

    return run(state, x, segment_ids, options)


def test_an_encoder_gives_a_history_the_same_wherever_it_lies_and_asks_for_single_columns():
    (x,) = random_arrays((1, 20, 8))
    encoder = model(positions="none")
    alone = encoded(encoder, x, jnp.ones((1, 20), jnp.int32))
    others = random_arrays((1, 7, 8), (1, 6, 8), seed=1)
    between = jnp.concatenate([others[0], x, others[1]], axis=1)
    segment_ids = jnp.asarray([packed([7, 20, 6], 33)])
    together = encoded(encoder, between, segment_ids)
    np.testing.assert_allclose(together[:, 7:27], alone, rtol=1e-4, atol=1e-5)
    at = jnp.asarray([[26, 6]])
    last = encoded(encoder, between, segment_ids, last_positions=at)
    np.testing.assert_allclose(last, together[:, at[0]], rtol=1e-4, atol=1e-5)


def test_every_mesh_gives_the_same_with_its_gradients(mesh):
    (x,) = random_arrays((8, 20, 8))
    segment_ids = jnp.asarray(np.stack([packed([i + 1, 19 - i], 20) for i in range(8)]))
    graphdef, state = nnx.split(model())
    state = jax.device_get(state)

    @jax.jit
    def loss_and_gradients(state, x, segment_ids):
        def loss(state):
            states = encoded(nnx.merge(graphdef, state), x, segment_ids, key=jax.random.key(3))
            return jnp.sum(jnp.where(segment_ids[..., None] > 0, states, 0.0) ** 3)

        return jax.value_and_grad(loss)(state)

    with jax.set_mesh(make_mesh((1, 1), jax.devices()[:1])):
        wanted = jax.device_get(loss_and_gradients(state, np.asarray(x), np.asarray(segment_ids)))
    placed = jax.device_put((x, segment_ids), jax.sharding.NamedSharding(mesh, spec("batch")))
    got = jax.device_get(loss_and_gradients(state, *placed))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3 * (1 + np.abs(other).max()))
    pooling = got[1]["blocks"][0]["attention"]["pool_query"]
    assert np.abs(jax.tree.leaves(pooling)[0]).max() > 0, "how groups are pooled is learned"


def test_memory_and_operations_grow_with_the_length():
    config = EncoderConfig(
        embed_dim=8,
        num_layers=1,
        mlp_dim=8,
        max_positions=4096,
        compression=HistoryCompression(recent=32, group=32),
    )
    encoder = Encoder(config, rngs=nnx.Rngs(params=jax.random.key(0)))

    def temporary_bytes(length):
        x, ids = (
            jax.ShapeDtypeStruct((1, length, 8), jnp.float32),
            jax.ShapeDtypeStruct((1, length), jnp.int32),
        )
        program = jax.jit(jax.grad(lambda x, ids: jnp.sum(encoded(encoder, x, ids) ** 2)))
        return program.lower(x, ids).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(512), temporary_bytes(2048)
    assert long < 5 * short, "the square would be 16 times"
    operations = [encoder_flops_per_row(config, length) for length in (512, 2048)]
    assert operations[1] < 6 * operations[0], "the square would be 16 times"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "relative"}, "positions='relative': with a compression it must be 'learned'"),
        ({"attention": "chunked"}, "attention='chunked': with a compression it must be 'auto'"),
        ({"time_bias": True}, "a group of a compression has no one time"),
    ],
)
def test_what_groups_cannot_have_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        model(**changes)


def test_other_refusals():
    with pytest.raises(ValueError, match="group=1: say recent >= 1 and group >= 2"):
        HistoryCompression(group=1)
    with pytest.raises(ValueError, match="reads histories both ways"):
        encoded(model(), jnp.zeros((1, 9, 8)), jnp.ones((1, 9), jnp.int32), causal=False)
