"""The encoder against a naive reference in NumPy, and what it promises about masks, keys and meshes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxrec.core.mesh import make_mesh
from jaxrec.core.partition import sharding
from jaxrec.nn.encoder import Encoder, EncoderConfig
from jaxrec.nn.layers import parameter_shardings

B, L, D = 8, 12, 16
SEGMENT_IDS = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12] * (B // 2), np.int32)
POSITIONS = np.array([[*range(5), *range(4), 0, 0, 0], [*range(12)]] * (B // 2), np.int32)
TIMES = np.array(
    [[0, 3, -1, 90, 4000, 0, 0, 7, 2**31 - 1, -1, -1, -1], [*range(0, 240, 20)]] * (B // 2), np.int32
)
X = np.random.default_rng(0).normal(size=(B, L, D)).astype(np.float32)
SMALL = EncoderConfig(
    embed_dim=D,
    num_layers=2,
    num_heads=2,
    mlp_dim=32,
    max_positions=L,
    dropout_rate=0.2,
    attention_dropout_rate=0.3,
    mlp_dropout_rate=0.1,
    embedding_dropout_rate=0.2,
)


BIASED = {"positions": "relative", "time_bias": True}
HSTU = {"block": "hstu", "activation": "silu", "norm_position": "pre", **BIASED}


def build(**changes) -> Encoder:
    """An encoder whose parameters are all random: zeros and ones would hide a bias that is never added."""
    model = Encoder(dataclasses.replace(SMALL, **changes), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    random = np.random.default_rng(1)
    leaves = [leaf + 0.1 * random.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))


@functools.partial(jax.jit, static_argnums=0, static_argnames="causal")
def apply(graphdef, state, x, segment_ids, positions, times, key, last_positions, *, causal):
    options = {"causal": causal, "key": key, "times": times, "last_positions": last_positions}
    return nnx.merge(graphdef, state)(x, segment_ids=segment_ids, positions=positions, **options)


def encode(
    model, x=X, *, segment_ids=SEGMENT_IDS, positions=POSITIONS, times=TIMES, causal=True, key=None, last=None
):
    return apply(*nnx.split(model), x, segment_ids, positions, times, key, last, causal=causal)


def naive_norm(x, norm, epsilon):
    scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return scaled * np.asarray(norm.scale[...], np.float64) + np.asarray(norm.bias[...], np.float64)


def naive_turn(x, place):
    """Pairs of entries as complex numbers."""
    half = len(x) // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * place * 10_000.0 ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag])


def naive_bias(layer, head, places, times):
    """By the places of a query and a key, and by their times."""
    tables = {name: np.asarray(table[0, head]) for name, table in layer.tables(1).items()}
    bias = 0.0
    if "distance" in tables:
        distance, half = abs(places[0] - places[1]), len(tables["distance"]) // 2
        bucket = distance if distance < 16 else 16 + int(4 * (math.log2(distance) - 4))
        bias += tables["distance"][bucket + half * (places[1] > places[0])]
    if "time" in tables:
        seconds, half = int(times[0]) - int(times[1]), len(tables["time"]) // 2
        bucket = min(abs(seconds).bit_length() + 1, half - 1) + half * (seconds < 0)
        bias += tables["time"][0 if min(times) < 0 else bucket]
    return bias


def naive_hstu(layer, x, segments, causal, places, times):
    asks, tells = (
        NAIVE_ACTIVATIONS["silu"](
            np.einsum("ld,dhk->hlk", x, np.asarray(kernel[...], np.float64)) + np.asarray(bias[...])[:, None]
        )
        for kernel, bias in ((layer.query_kernel, layer.query_bias), (layer.key_kernel, layer.key_bias))
    )
    dim, mixed = layer.head_dim, np.zeros((len(x), layer.num_heads, asks.shape[2] - layer.head_dim))
    for head, i, j in np.ndindex(layer.num_heads, len(x), len(x)):
        if segments[j] == segments[i] and (j <= i or not causal):
            score = asks[head, i, :dim] @ tells[head, j, :dim]
            score += naive_bias(layer.relative_bias, head, places[[i, j]], times[[i, j]])
            mixed[i, head] += score / (1 + np.exp(-score)) * tells[head, j, dim:] / layer.max_positions
    gated = naive_norm(mixed.reshape(len(x), -1), layer.mixed_norm, layer.mixed_norm.epsilon)
    gated = gated * np.swapaxes(asks[..., dim:], 0, 1).reshape(len(x), -1)
    kernel = np.asarray(layer.out_kernel[...], np.float64).reshape(-1, x.shape[1])
    return gated @ kernel + np.asarray(layer.out_bias[...])


def naive_attention(layer, x, segments, causal, places, times):
    kernel, bias = np.asarray(layer.qkv_kernel[...], np.float64), np.asarray(layer.qkv_bias[...], np.float64)
    out = np.tile(np.asarray(layer.out_bias[...], np.float64), (len(x), 1))
    for head in range(kernel.shape[2]):
        query, key, value = (x @ kernel[:, i, head] + bias[i, head] for i in range(3))
        for i in range(len(x)):
            seen = [j for j in range(len(x)) if segments[j] == segments[i] and (j <= i or not causal)]
            turn = naive_turn if layer.rotary else lambda x, place: x
            products = [turn(query[i], places[i]) @ turn(key[j], places[j]) for j in seen]
            scores = np.array(products) / math.sqrt(kernel.shape[3])
            scores += [naive_bias(layer.relative_bias, head, places[[i, j]], times[[i, j]]) for j in seen]
            weights = np.exp(scores) / np.exp(scores).sum()
            mixed = sum(w * value[j] for w, j in zip(weights, seen, strict=True))
            out[i] += mixed @ np.asarray(layer.out_kernel[...], np.float64)[head]
    return out


NAIVE_ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def naive_dense(layer, x):
    return x @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...])


def naive_mlp(block, x, config):
    activate, hidden = NAIVE_ACTIVATIONS[config.activation], naive_dense(block.mlp_in, x)
    gated = config.mlp == "gated"
    hidden = activate(naive_dense(block.mlp_gate, x)) * hidden if gated else activate(hidden)
    return naive_dense(block.mlp_out, hidden)


def naive_encoder(model, x, segments, positions, times, causal):
    """One row, float64, loops over queries."""
    config, epsilon = model.config, model.config.layer_norm_epsilon
    x = x.astype(np.float64)
    if config.positions == "learned":
        x = x + np.asarray(model.position_table[...])[positions]
    attend = functools.partial(
        naive_hstu if config.block == "hstu" else naive_attention,
        segments=segments,
        causal=causal,
        places=positions,
        times=times,
    )
    if config.norm_position == "post":
        x = naive_norm(x, model.embedding_norm, epsilon)
    for block in model.blocks:
        if config.norm_position == "post":
            x = naive_norm(x + attend(block.attention, x), block.attention_norm, epsilon)
            if config.block == "transformer":
                x = naive_norm(x + naive_mlp(block, x, config), block.mlp_norm, epsilon)
        else:
            inner = naive_norm(x, block.attention_norm, epsilon)
            x = x + attend(block.attention, inner)
            if config.block == "transformer":
                x = x + naive_mlp(block, naive_norm(x, block.mlp_norm, epsilon), config)
    if config.norm_position == "pre" and config.final_norm:
        x = naive_norm(x, model.final_norm, epsilon)
    return x


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_position": "pre"},
        {"norm_position": "pre", "final_norm": False, "activation": "relu"},
        {"activation": "gelu_tanh", "num_heads": 1},
        {"activation": "silu", "mlp": "gated", "positions": "rotary"},
        {"positions": "relative", "time_bias": True, "norm_position": "pre"},
        {"positions": "none", "time_bias": True},
        HSTU,
        {"block": "hstu", "activation": "silu", "mlp_dim": 6},
    ],
)
def test_equals_the_naive_reference(changes, causal):
    model = build(**changes)
    output = np.asarray(encode(model, causal=causal))
    for row in range(2):
        wanted = naive_encoder(model, X[row], SEGMENT_IDS[row], POSITIONS[row], TIMES[row], causal)
        real = SEGMENT_IDS[row] > 0
        np.testing.assert_allclose(output[row][real], wanted[real], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("changes", [{"norm_position": "pre"}, {}, {"positions": "rotary"}, BIASED, HSTU])
def test_last_positions_equal_a_gather_of_the_full_output(changes):
    model = build(**changes)
    last = np.array([[4, 8, 0], [11, 3, 3]] * (B // 2), np.int32)
    for causal in (True, False):
        full = np.asarray(encode(model, causal=causal))
        got = np.asarray(encode(model, causal=causal, last=last))
        np.testing.assert_allclose(
            got, np.take_along_axis(full, last[..., None], axis=1), rtol=2e-5, atol=2e-5
        )


def test_causal_output_does_not_move_when_the_future_does():
    model = build()
    changed = X.copy()
    changed[:, 7:] = np.random.default_rng(2).normal(size=changed[:, 7:].shape)
    before, after = np.asarray(encode(model)), np.asarray(encode(model, changed))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before[1, 7:] - after[1, 7:]).max(axis=-1).min() > 0.1

    gradient = jax.grad(lambda x: jnp.sum(encode(model, x)[1, 5] ** 2))(jnp.asarray(X))
    assert not np.any(np.asarray(gradient)[1, 6:]), "position 5 has a gradient from its future"
    assert np.all(np.any(np.asarray(gradient)[1, :6] != 0, axis=-1))


def test_without_causal_every_position_of_the_segment_is_seen():
    gradient = jax.grad(lambda x: jnp.sum(encode(build(), x, causal=False)[0, 2] ** 2))(jnp.asarray(X))
    seen = np.any(np.asarray(gradient)[0] != 0, axis=-1)
    np.testing.assert_array_equal(seen, SEGMENT_IDS[0] == 1)


@pytest.mark.parametrize(
    ("changes", "causal"),
    [({}, True), ({}, False), ({"positions": "rotary"}, False), (BIASED, False), (HSTU, True)],
)
def test_packed_segments_equal_the_segments_encoded_alone(changes, causal):
    model = build(**changes)
    packed = np.asarray(encode(model, causal=causal))[0]
    for start, stop in [(0, 5), (5, 9)]:
        length = stop - start
        alone = encode(
            model,
            X[:1, start:stop],
            segment_ids=np.ones((1, length), np.int32),
            positions=np.arange(length, dtype=np.int32)[None],
            times=TIMES[:1, start:stop],
            causal=causal,
        )
        np.testing.assert_allclose(packed[start:stop], np.asarray(alone)[0], rtol=2e-5, atol=2e-5)


def test_padding_is_finite_and_never_seen():
    changed = X.copy()
    changed[0, 9:] = 1e3
    before, after = np.asarray(encode(build())), np.asarray(encode(build(), changed))
    np.testing.assert_array_equal(before[0, :9], after[0, :9])
    assert np.all(np.isfinite(after))


def loss_and_gradients(model, key):
    graphdef, state = nnx.split(model)

    @jax.jit
    def evaluate(state):
        def loss(state):
            return jnp.sum(encode(nnx.merge(graphdef, state), key=key) * X)

        return jax.value_and_grad(loss)(state)

    return evaluate(state)


def test_remat_changes_neither_output_nor_gradient():
    key = jax.random.key(3)
    plain, again = loss_and_gradients(build(), key), loss_and_gradients(build(remat=True), key)
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {**BIASED, "mlp": "gated"}, {"positions": "rotary"}, HSTU])
def test_bfloat16_is_close_and_parameters_stay_float32(options):
    model = build(dtype="bfloat16", **options)
    output = encode(model)
    assert output.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    error = np.abs(np.asarray(output, np.float32) - np.asarray(encode(build(**options))))[SEGMENT_IDS > 0]
    assert error.mean() < 0.03 and error.max() < 0.3


@pytest.mark.parametrize("field", [name for name in EncoderConfig.__annotations__ if "dropout" in name])
def test_each_dropout_acts_in_training_only(field):
    rates = {name: 0.0 for name in EncoderConfig.__annotations__ if "dropout" in name}
    model = build(**{**rates, field: 0.5})
    clean = np.asarray(encode(model))
    one, same, other = (np.asarray(encode(model, key=jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.01 and np.abs(one - clean).max() > 0.01
    np.testing.assert_array_equal(clean, np.asarray(encode(build(**rates), key=jax.random.key(0))))


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 8)])
def test_dropout_is_the_same_on_every_mesh(shape):
    assert jax.device_count() == 8, "a skip here would hide every sharding bug"
    graphdef, state = nnx.split(build())
    key = jax.random.key(5)

    def run(state, x, segment_ids, positions):
        return encode(nnx.merge(graphdef, state), x, segment_ids=segment_ids, positions=positions, key=key)

    wanted = jax.jit(run)(state, X, SEGMENT_IDS, POSITIONS)
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        data = jax.device_put((X, SEGMENT_IDS, POSITIONS), sharding(mesh, "batch"))
        state = jax.device_put(state, parameter_shardings(state, mesh))
        got = jax.jit(run)(state, *data)
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, HSTU])
def test_chunked_attention_changes_nothing(options):
    key, changes = jax.random.key(3), {"num_layers": 3, "remat": True, "scan_layers": True, **options}
    full, chunked = build(**changes), build(attention="chunked", **changes)
    for one, other in zip(
        jax.tree.leaves(loss_and_gradients(full, key)),
        jax.tree.leaves(loss_and_gradients(chunked, key)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)
    last = np.array([[4, 8, 0]] * B, np.int32)
    np.testing.assert_allclose(encode(full, last=last), encode(chunked, last=last), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_equal_the_loop(remat):
    key = jax.random.key(3)
    deep = {"num_layers": 4, "remat": remat}
    loop, scanned = build(**deep), build(scan_layers=True, **deep)
    for plain, again in zip(
        jax.tree.leaves(loss_and_gradients(loop, key)),
        jax.tree.leaves(loss_and_gradients(scanned, key)),
        strict=True,
    ):
        np.testing.assert_allclose(plain, again, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(encode(loop), encode(scanned), rtol=1e-5, atol=1e-5)


def masked_loss(graphdef, state, x, segment_ids, positions, times):
    model = nnx.merge(graphdef, state)
    out = encode(model, x, segment_ids=segment_ids, positions=positions, times=times, key=jax.random.key(5))
    return jnp.sum(jnp.sin(out) * (segment_ids > 0)[..., None])


LAYOUT_CASES = [
    *(
        ({}, layout, shape)
        for layout in ("replicated", "fsdp", "tensor")
        for shape in ((8, 1), (2, 4), (4, 2))
    ),
    ({**BIASED, "mlp": "gated", "num_layers": 2}, "tensor", (2, 4)),
    ({**HSTU, "attention": "chunked", "num_layers": 2}, "fsdp", (4, 2)),
    ({**HSTU, "attention": "chunked", "num_layers": 2}, "tensor", (2, 4)),
]


@pytest.mark.parametrize(("options", "layout", "shape"), LAYOUT_CASES)
def test_every_layout_gives_the_same(options, layout, shape):
    sizes = {"num_heads": 4, "num_layers": 3, **options}
    graphdef, state = nnx.split(build(**sizes))
    twin = jax.jit(jax.value_and_grad(functools.partial(masked_loss, graphdef)))(
        state, X, SEGMENT_IDS, POSITIONS, TIMES
    )
    graphdef, state = nnx.split(build(**sizes, layout=layout))
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        data = jax.device_put((X, SEGMENT_IDS, POSITIONS, TIMES), sharding(mesh, "batch"))
        where = parameter_shardings(state, mesh, layout)
        step = jax.jit(
            jax.value_and_grad(functools.partial(masked_loss, graphdef)), out_shardings=(None, where)
        )
        got = step(jax.device_put(state, where), *data)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(twin), strict=True):
        # Gradients are sums of terms that cancel: what is exact is the largest of them.
        largest = np.abs(other).max()
        np.testing.assert_allclose(
            np.asarray(one), np.asarray(other), rtol=1e-4, atol=max(1e-4, 3e-5 * largest)
        )
    kernel = jax.tree.leaves(got[1]["blocks"][0]["attention"]["out_kernel"])[0].sharding.spec
    wanted = {
        "replicated": P(None, None, None),
        "fsdp": P(None, None, ("data",)),
        "tensor": P(("model",), None, None),
    }
    assert kernel == wanted[layout]
    if options.get("block") != "hstu":
        kernel = jax.tree.leaves(got[1]["blocks"][0]["mlp_in"]["kernel"])[0].sharding.spec
        wanted = {"replicated": P(None, None), "fsdp": P(("data",), None), "tensor": P(None, ("model",))}
        assert kernel == wanted[layout]


def test_a_layout_that_does_not_divide_names_the_parameter():
    mesh = make_mesh((1, 8))
    with pytest.raises(ValueError, match=r"layout='tensor'.*out_kernel.*does not divide over .*'model'"):
        parameter_shardings(nnx.state(build(num_heads=2)), mesh, "tensor")


def test_every_parameter_names_its_axes():
    variables = jax.tree.leaves(nnx.state(build()), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    assert len(variables) == 1 + 2 + 2 * (4 + 4 + 4)
    assert all(len(variable.get_metadata()["logical_axes"]) == variable.ndim for variable in variables)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "sinus"}, "positions='sinus' must be 'learned', 'rotary', 'relative' or 'none'"),
        (
            {"positions": "rotary", "num_heads": 16},
            "head of embed_dim=16 over num_heads=16 is 1 wide; make it even",
        ),
        (
            {"attention": "fused", "attention_dropout_rate": 0.0, "time_bias": True},
            "attention='fused' knows neither .* positions='learned' and time_bias=True; set attention to",
        ),
        ({"block": "lstm"}, "block='lstm' must be 'transformer' or 'hstu'"),
        (
            {"block": "hstu"},
            "activation='gelu': block='hstu' has no MLP and computes with SiLU; set it to 'silu'",
        ),
        ({"block": "hstu", "mlp": "gated", "activation": "silu"}, "mlp='gated': .* set it to 'dense'"),
        ({**HSTU, "mlp_dim": 33}, "mlp_dim=33 is not a multiple of num_heads=2, among which"),
        ({"num_heads": 3}, "embed_dim=16 is not a multiple of num_heads=3"),
        ({"dropout_rate": 1.0}, "dropout_rate=1.0"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"activation": "swish"}, "activation='swish'"),
        ({"mlp": "glu"}, "mlp='glu' must be 'dense' or 'gated'"),
        ({"norm_position": "middle"}, "norm_position='middle'"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"layout": "pipeline"}, "layout='pipeline' must be one of replicated, fsdp, tensor"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon=0.0"),
        ({"attention": "flash"}, "attention='flash' must be one of auto, full, chunked, fused"),
        ({"attention": "fused"}, "attention='fused' drops no .* attention_dropout_rate=0.3; set it to 0"),
    ],
)
def test_a_bad_config_names_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)
