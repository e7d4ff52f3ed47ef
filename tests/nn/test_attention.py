"""The paths of attention that need no square array, against the one that holds it; who takes which path."""

import functools
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

from jaxrec.core.mesh import DATA, MODEL
from jaxrec.core.partition import spec
from jaxrec.nn import attention, fused_attention
from jaxrec.nn.attention import attend, choose_path
from jaxrec.nn.chunked_attention import attend_in_chunks, even_chunk
from jaxrec.nn.encoder import Encoder, EncoderConfig
from jaxrec.nn.fused_attention import attend_fused, flash, splash
from jaxrec.nn.visibility import Visibility

B, H, K, CHUNK = 2, 3, 4, 8
KEY = jax.random.key(7)


def random_arrays(*shapes, seed=0, dtype=jnp.float32):
    random = np.random.default_rng(seed)
    return tuple(jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)


def packed_segments(rows, length, seed=0):
    """Segments one after the other, then padding."""
    ids = np.sort(np.random.default_rng(seed).integers(0, 4, (rows, length)))[:, ::-1]
    return jnp.asarray(np.where(ids, 4 - ids, 0), jnp.int32)


def output_and_gradients(attend_by, arrays):
    """The output, and the gradients of a random weighted sum of it by query, key and value."""
    output, pull = jax.vjp(attend_by, *arrays)
    (weights,) = random_arrays(output.shape, seed=9, dtype=output.dtype)
    return output, pull(weights)


def assert_same(got, wanted, *, tolerance=1e-5):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * (1 + np.abs(other).max()))


@functools.partial(jax.jit, static_argnames=("causal", "rate", "chunk"))
def by_both_paths(arrays, segment_ids, query_positions, *, causal, rate=0.0, chunk=CHUNK):
    look = functools.partial(Visibility.of, segment_ids, causal=causal, query_positions=query_positions)
    full, chunked = look(), look(path="chunked")
    return (
        output_and_gradients(lambda *a: attend(*a, full.mask, KEY, rate), arrays),
        output_and_gradients(lambda *a: attend_in_chunks(*a, chunked, KEY, rate, chunk), arrays),
    )


@pytest.mark.parametrize(
    ("length", "num_queries", "causal", "rate"),
    [
        (16, None, True, 0.0),  # a multiple of the chunk
        (21, None, True, 0.4),
        (21, None, False, 0.0),
        (21, 10, True, 0.0),
        (21, 10, False, 0.4),
    ],
)
@settings(max_examples=6)
@given(data=st.data())
def test_chunked_equals_full(length, num_queries, causal, rate, data):
    segment_ids = data.draw(arrays_of.arrays(np.int32, (B, length), elements=st.integers(0, 3)), "segments")
    query_positions = None
    if num_queries:
        columns = arrays_of.arrays(np.int32, (B, num_queries), elements=st.integers(0, length - 1))
        query_positions = data.draw(columns, "query_positions")
    arrays = random_arrays((B, H, num_queries or length, K), (B, H, length, K), (B, H, length, K))
    wanted, got = by_both_paths(arrays, segment_ids, query_positions, causal=causal, rate=rate)
    assert_same(got, wanted)


def test_chunked_in_bfloat16_is_as_close_to_float32_as_full():
    segment_ids = packed_segments(B, 16)
    arrays = random_arrays(*[(B, H, 16, K)] * 3)
    narrow = tuple(x.astype(jnp.bfloat16) for x in arrays)
    exact, _ = by_both_paths(arrays, segment_ids, None, causal=True)
    full, chunked = by_both_paths(narrow, segment_ids, None, causal=True)
    for wanted, one, other in zip(*map(jax.tree.leaves, (exact, full, chunked)), strict=True):
        assert other.dtype == jnp.bfloat16
        errors = [np.abs(np.asarray(x, np.float32) - np.asarray(wanted)).max() for x in (one, other)]
        assert errors[1] <= 1.5 * errors[0] < 0.1


def test_chunked_survives_large_scores_and_rows_of_padding():
    query, key, value = random_arrays(*[(B, H, 16, K)] * 3)
    segment_ids = jnp.zeros((B, 16), jnp.int32).at[0].set(1)
    wanted, got = by_both_paths((query * 1e4, key * 1e4, value), segment_ids, None, causal=True)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(got))
    assert_same(got[0], wanted[0])


def temporary_bytes(length, attend_by):
    row = jax.ShapeDtypeStruct((1, 1, length, K), jnp.float32)
    segment_ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def run(arrays, segment_ids):
        return output_and_gradients(lambda *a: attend_by(*a, segment_ids), arrays)

    return jax.jit(run).lower((row,) * 3, segment_ids).compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_length_and_not_with_its_square():
    def full(*arguments):
        *arrays, segment_ids = arguments
        return attend(*arrays, Visibility.of(segment_ids, causal=True).mask)

    def chunked(*arguments):
        *arrays, segment_ids = arguments
        return attend_in_chunks(*arrays, Visibility.of(segment_ids, causal=True, path="chunked"), chunk=32)

    short, long = (temporary_bytes(length, chunked) for length in (256, 1024))
    short_square, long_square = (temporary_bytes(length, full) for length in (256, 1024))
    assert long <= 4.2 * short
    assert long_square > 10 * short_square, "the measure sees the square"
    assert long < long_square / 20


def wide_case():
    """As many rows and heads as devices."""
    return random_arrays(*[(8, 8, 21, K)] * 3), packed_segments(8, 21)


@functools.cache
def wide_twin():
    """By the full path, on one device."""
    return jax.tree.map(np.asarray, by_both_paths(*wide_case(), None, causal=True, rate=0.3)[0])


@pytest.mark.parametrize("heads", [None, MODEL])
def test_chunked_is_the_same_on_every_mesh_and_moves_nothing(mesh, heads):
    rows = P(DATA) if heads else spec("batch")
    arrays, segment_ids = wide_case()
    arrays = jax.device_put(arrays, jax.NamedSharding(mesh, P(*rows, heads)))
    segment_ids = jax.device_put(segment_ids, jax.NamedSharding(mesh, rows))

    @jax.jit
    def chunked(arrays, segment_ids):
        return by_both_paths(arrays, segment_ids, None, causal=True, rate=0.3)[1]

    compiled = chunked.lower(arrays, segment_ids).compile()
    assert_same(compiled(arrays, segment_ids), wide_twin())
    moved = [line for line in compiled.as_text().splitlines() if re.search("all-|collective-permute", line)]
    assert moved == []


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", [splash, flash])
def test_the_kernels_equal_full(kernel, causal):
    length = 130  # no multiple of what the kernels take
    segment_ids = packed_segments(2, length)
    arrays = random_arrays(*[(2, 1, length, 16)] * 3)
    interpreted = functools.partial(kernel, interpret=True)

    @jax.jit
    def both(arrays):
        full = Visibility.of(segment_ids, causal=causal)
        fused = functools.partial(attend_fused, segment_ids=segment_ids, causal=causal, kernel=interpreted)
        return output_and_gradients(lambda *a: attend(*a, full.mask), arrays), output_and_gradients(
            fused, arrays
        )

    wanted, got = both(arrays)
    assert_same(got, wanted)


@pytest.mark.parametrize("layout", ["replicated", "tensor"])
def test_each_device_gives_the_kernel_its_rows_or_its_heads(mesh, layout):
    shapes = []

    def kernel(query, key, value, segment_ids, *, causal):
        shapes.append((query.shape, segment_ids.shape))
        return attend(
            query * 2.0, key, value, Visibility.of(segment_ids, causal=causal).mask
        )  # it comes scaled

    arrays, segment_ids = wide_case()
    run = jax.jit(functools.partial(attend_fused, causal=True, layout=layout, kernel=kernel))
    got = run(*arrays, segment_ids)
    assert_same(got, attend(*arrays, Visibility.of(segment_ids, causal=True).mask))
    data, model = mesh.shape[DATA], mesh.shape[MODEL]
    rows, heads = (8 // data, 8 // model) if layout == "tensor" else (1, 8)
    assert shapes == [((rows, heads, 128, 4), (rows, 128))]


@pytest.mark.parametrize(
    ("asked", "length", "past_kernels", "platform", "path"),
    [
        ("auto", 512, False, "tpu", "full"),
        ("auto", 513, False, "tpu", "fused"),
        ("auto", 513, False, "gpu", "fused"),
        ("auto", 513, True, "tpu", "chunked"),
        ("auto", 513, False, "cpu", "chunked"),
        ("chunked", 8, False, "cpu", "chunked"),
        ("full", 4096, False, "tpu", "full"),
    ],
)
def test_who_takes_which_path(asked, length, past_kernels, platform, path, monkeypatch):
    monkeypatch.setattr(attention, "platform", lambda: platform)
    assert choose_path(asked, length=length, past_kernels=past_kernels) == path


def traced_encoder(length, monkeypatch, platform, *, last=None, key=None, **changes):
    """What an encoder computes, as text."""
    for module in (attention, fused_attention):
        monkeypatch.setattr(module, "platform", lambda: platform)
    config = EncoderConfig(embed_dim=16, num_heads=2, mlp_dim=8, **changes)
    model = nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)

    def run(state, x, integers):
        model = nnx.merge(graphdef, state)
        last_positions = None if last is None else integers[:, :last]
        return model(
            x, segment_ids=integers, positions=integers, causal=True, key=key, last_positions=last_positions
        )

    x = jax.ShapeDtypeStruct((1, length, 16), jnp.float32)
    return str(jax.make_jaxpr(run)(state, x, jax.ShapeDtypeStruct((1, length), jnp.int32)))


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_a_long_row_never_meets_its_square(platform, monkeypatch):
    assert "512,512]" in traced_encoder(512, monkeypatch, platform)
    for last in (None, 5):
        text = traced_encoder(1024, monkeypatch, platform, last=last)
        assert "1024,1024]" not in text
        assert ("pallas_call" in text) == (platform != "cpu")
    assert "pallas_call" not in traced_encoder(1024, monkeypatch, platform, key=KEY), "dropout on the weights"


def test_no_kernel_on_a_cpu(monkeypatch):
    with pytest.raises(ValueError, match="attention='fused' needs a TPU or a GPU, .* cpu .* use 'auto'"):
        traced_encoder(8, monkeypatch, "cpu", attention="fused", attention_dropout_rate=0.0)


@pytest.mark.parametrize(("length", "chunk", "size"), [(8, 8, 8), (9, 8, 8), (600, 256, 200), (5, 256, 8)])
def test_chunks_are_even(length, chunk, size):
    assert even_chunk(length, chunk) == size
