"""Rules that no model of today asks for in every form, each against JAX; and what has no rule."""

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
import tensorflow as tf
from onnx import helper

from jaxrec.export.lowering import Lowering
from jaxrec.export.onnx_graph import IR_VERSION, OPSET, OnnxGraph
from jaxrec.export.tensorflow_graph import TensorFlowGraph

X = np.arange(24, dtype=np.float32).reshape(4, 6) / 7 - 1
N = np.array([[5, 0, 9, 3], [-2, 7, 1, 30]], np.int32)
FUNCTIONS = {
    "take_fills": (lambda x, n: jnp.take(x, n, axis=1, mode="fill"), X, N),
    "take_clips": (lambda x, n: jnp.take(x, n, axis=0, mode="clip"), X, N),
    "take_integers_fills": (lambda n, m: jnp.take(n, m, axis=1, mode="fill", fill_value=-7), N, N),
    "take_along": (lambda x, n: jnp.take_along_axis(x[:2], n, axis=1, mode="clip"), X, N),
    "index_pairs": (lambda x, n: x[jnp.abs(n) % 4, jnp.abs(n) % 6], X, N),
    "scatter_add": (lambda x, n: x.at[jnp.abs(n[0]) % 4, jnp.abs(n[0]) % 6].add(1.5), X, N),
    "clz": (lambda x, n: jax.lax.clz(jnp.abs(n)), X, N),
    "shifts": (lambda x, n: jnp.right_shift(jnp.abs(n), 1) & 3 | 4, X, N),
    "remainder": (lambda x, n: n % 4, X, N),
    "division": (lambda x, n: n // 4, X, N),
    "any_all": (lambda x, n: jnp.any(n > 8, axis=1) & ~jnp.all(n > 0, axis=1) | jnp.isneginf(x[0, :2]), X, N),
    "powers": (lambda x, n: x**3 + jnp.abs(x) ** 1.5 - jnp.log1p(jnp.abs(x)), X, N),
    "chosen_truth": (lambda x, n: jnp.where(n > 2, n > 4, n < 0), X, N),
    "reversed_sums": (lambda x, n: jnp.cumsum(x[::-1], axis=0) + jnp.cumsum(x, axis=0, dtype=x.dtype), X, N),
    "strides": (lambda x, n: x[1:4:2, ::3], X, N),
    "products": (lambda x, n: jnp.einsum("ab,cb->ac", x, x) + x[:, :4] @ x[:, :4], X, N),
    "slices": (lambda x, n: x[:, :-1] * x[:, 1:] + x[0, :-1], X, N),
    "pads": (lambda x, n: jnp.pad(x, ((1, 0), (0, 2)), constant_values=3), X, N),
    "clamps": (lambda x, n: jax.lax.clamp(-0.5, x, 0.5), X, N),
    "top": (lambda x, n: jax.lax.top_k(jnp.floor(jnp.sin(x) * 2), 3)[1], X, N),
}


def traced(function, *arguments, sizes="b, l"):
    """The jaxpr with symbolic sizes for the axes of the first argument."""
    b, l = jax.export.symbolic_shape(sizes)
    shapes = [jax.ShapeDtypeStruct((b, l), arguments[0].dtype)]
    shapes += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments[1:]]
    return jax.make_jaxpr(function)(*shapes)


def in_tensorflow(closed, arguments):
    graph, given = TensorFlowGraph(), [tf.constant(x) for x in arguments]
    sizes = {name: graph.size(given[0], axis) for axis, name in enumerate("bl")}
    return Lowering(graph, sizes).run(closed, given)[0].numpy()


def in_onnx(closed, arguments):
    graph, names = OnnxGraph(), ["x", "n"]
    for name, array in zip(names, arguments, strict=True):
        graph.dtypes[name] = array.dtype
    sizes = {name: graph.size("x", axis) for axis, name in enumerate("bl")}
    (found,) = Lowering(graph, sizes).run(closed, names)
    kind = helper.np_dtype_to_tensor_dtype
    values = [
        helper.make_tensor_value_info(n, kind(x.dtype), [None] * x.ndim)
        for n, x in zip(names, arguments, strict=True)
    ]
    rank = len(closed.out_avals[0].shape)
    out = helper.make_tensor_value_info(found, kind(graph.dtypes[found]), [None] * rank)
    whole = helper.make_graph(graph.nodes, "g", values, [out], graph.initializers)
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, dict(zip(names, arguments, strict=True)))[0]


def symbolic_where_possible(function, arguments):
    """Slices of fixed length have no symbolic twin: those are traced as they are."""
    try:
        return traced(function, *arguments)
    except Exception:
        return jax.make_jaxpr(function)(*arguments)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("run", [in_tensorflow, in_onnx])
def test_a_rule_does_what_jax_does(run, name):
    function, *arguments = FUNCTIONS[name]
    expected = np.asarray(function(*map(jnp.asarray, arguments)))
    found = run(symbolic_where_possible(function, arguments), arguments)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("run", [in_tensorflow, in_onnx])
def test_sizes_are_those_of_the_call(run):
    closed = traced(lambda x, n: (jnp.zeros((x.shape[0] * 2 + 1, x.shape[1] - 1)) + x.size).T, X, N)
    for rows in (1, 4):
        assert run(closed, [X[:rows], N]).shape == (5, rows * 2 + 1)
        assert run(closed, [X[:rows], N])[0, 0] == rows * 6


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, n: jnp.sort(x), "no rule for the operation 'sort'"),
        (lambda x, n: jax.lax.scan(lambda c, y: (c + y, c * y), jnp.float32(0), n[0] * 1.0)[1], "'scan'"),
        (lambda x, n: jax.lax.dynamic_slice(x, (n[0, 0], 0), (1, 1)), "'dynamic_slice'"),
        (lambda x, n: x.at[:, 0].set(n[0, 0]), "no rule for a scatter"),
        (lambda x, n: x**-2, "no rule for the power -2"),
    ],
)
def test_what_has_no_rule_is_named(function, message):
    with pytest.raises(NotImplementedError, match=message):
        in_tensorflow(traced(function, X, N), [X, N])
