"""From a jaxpr to the operations of another runtime: one walk over the equations, one `Graph` a runtime.

StableHLO is what JAX itself writes, but TensorFlow reads the StableHLO of old JAX versions only, compiles it anew for
every shape, and ONNX has none. So the programs are also written with each runtime's own operations. The rules cover
what our models are traced to; an operation without a rule is an error that names it, never a wrong program.

A symbolic size (b, l, 2*b + 1) is looked up in the inputs' shapes when the program runs.
"""

import ast
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from jax import lax
from jax.extend import core

from jaxrec.export.graph import Graph, Size, Tensor


def live_equations(jaxpr: core.Jaxpr) -> tuple[list[core.JaxprEqn], set[core.Var]]:
    """The equations that the outputs depend on, and every variable that these read."""
    live = {variable for variable in jaxpr.outvars if isinstance(variable, core.Var)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if any(variable in live for variable in equation.outvars):
            kept.append(equation)
            live |= {variable for variable in equation.invars if isinstance(variable, core.Var)}
    return kept[::-1], live


class Lowering:
    """Writes the equations of a jaxpr into a graph.

    Args:
      sizes: of the letters that stand in the shapes.
    """

    def __init__(self, graph: Graph, sizes: Mapping[str, Size]):
        self.graph = graph
        self._sizes = dict(sizes)

    def run(self, closed: core.ClosedJaxpr, arguments: Sequence[Tensor | None]) -> list[Tensor]:
        """The outputs; an argument that nothing reads may be None.

        Raises:
          NotImplementedError: an operation has no rule.
        """
        jaxpr = closed.jaxpr
        values: dict[core.Var, Tensor] = dict(zip(jaxpr.invars, arguments, strict=True))
        values |= {
            variable: self.graph.constant(np.asarray(value))
            for variable, value in zip(jaxpr.constvars, closed.consts, strict=True)
        }

        def read(atom: Any) -> Tensor:
            if isinstance(atom, core.Literal):
                return self.graph.constant(np.asarray(atom.val, _aval(atom).dtype))
            return values[atom]

        equations, _ = live_equations(jaxpr)
        for equation in equations:
            found = self._apply(equation, [read(atom) for atom in equation.invars])
            values.update(zip(equation.outvars, found, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def size(self, dim: Any) -> Size:
        """A number, or what a symbolic size is when the program runs."""
        if isinstance(dim, int | np.integer):
            return int(dim)
        text = str(dim)
        if text not in self._sizes:
            self._sizes[text] = self._evaluate(ast.parse(text, mode="eval").body)
        return self._sizes[text]

    def shape(self, dims: Sequence[Any]) -> list[Size]:
        """The sizes of all of them."""
        return [self.size(dim) for dim in dims]

    def _evaluate(self, node: ast.expr) -> Size:
        """A symbolic size is written as Python writes a polynomial of letters."""
        match node:
            case ast.Constant(value=int() as value):
                return self.graph.size_of_value(value)
            case ast.Name(id=letter):
                return self._sizes[letter]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self.graph.binary("sub", self.graph.size_of_value(0), self._evaluate(operand))
            case ast.BinOp(left=left, op=op, right=right):
                name = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul"}.get(type(op))
                if name:
                    return self.graph.binary(name, self._evaluate(left), self._evaluate(right))
            case ast.Call(func=ast.Name(id=function), args=[left, right]):
                # Sizes are not negative, and so division is the same however it rounds.
                name = {"max": "max", "min": "min", "floordiv": "div", "mod": "rem"}.get(function)
                if name:
                    return self.graph.binary(name, self._evaluate(left), self._evaluate(right))
        raise NotImplementedError(f"no rule for the symbolic size {ast.unparse(node)}.")

    def _apply(self, equation: core.JaxprEqn, inputs: list[Tensor]) -> Sequence[Tensor]:
        name, params = equation.primitive.name, equation.params
        inner = next((params[key] for key in ("call_jaxpr", "jaxpr", "fun_jaxpr") if key in params), None)
        if inner is not None and name not in ("scan", "while", "cond"):
            if isinstance(inner, core.Jaxpr):
                inner = core.ClosedJaxpr(inner, ())
            return self.run(inner, inputs)
        if name in UNARY:
            return [self.graph.unary(name, inputs[0])]
        if name in BINARY:
            return [self.graph.binary(name, *inputs)]
        if name in SAME:
            return inputs
        if name not in RULES:
            raise NotImplementedError(
                f"no rule for the operation {name!r}, so that this model cannot be written for other runtimes than "
                "JAX; add one to jaxrec/export/lowering.py."
            )
        found = RULES[name](self, equation, *inputs)
        return found if isinstance(found, list) else [found]


UNARY = frozenset(
    {"abs", "cos", "erf", "exp", "floor", "log", "log1p", "logistic", "neg", "not", "rsqrt", "sign", "sin"}
    | {"sqrt", "square", "tanh"}
)
BINARY = frozenset(
    {"add", "and", "div", "eq", "ge", "gt", "le", "lt", "max", "min", "mul", "ne", "or", "pow", "rem", "sub"}
    | {"shift_right_arithmetic", "shift_right_logical"}
)
SAME = frozenset({"copy", "copy_p", "optimization_barrier", "sharding_constraint", "stop_gradient"})

Rule: TypeAlias = Callable[..., Tensor]


def _aval(atom: Any) -> Any:
    """Shape and dtype of a variable or literal."""
    return atom.aval


def _output(equation: core.JaxprEqn) -> Any:
    return _aval(equation.outvars[0])


def _convert(to: Lowering, equation: core.JaxprEqn, x: Tensor) -> Tensor:
    return to.graph.cast(x, np.dtype(equation.params["new_dtype"]))


def _reshape(to: Lowering, equation: core.JaxprEqn, x: Tensor) -> Tensor:
    return to.graph.reshape(x, to.shape(_output(equation).shape))


def _broadcast(to: Lowering, equation: core.JaxprEqn, x: Tensor) -> Tensor:
    """Axes of size 1 first, which are then repeated."""
    shape, at = equation.params["shape"], equation.params["broadcast_dimensions"]
    before: list[Any] = [1] * len(shape)
    for axis, dim in zip(at, _aval(equation.invars[0]).shape, strict=True):
        before[axis] = dim
    if len(before) != len(at):
        x = to.graph.reshape(x, to.shape(before))
    return x if tuple(before) == tuple(shape) else to.graph.expand(x, to.shape(shape))


def _transpose(to: Lowering, equation: core.JaxprEqn, x: Tensor) -> Tensor:
    return to.graph.transpose(x, equation.params["permutation"])


def _concatenate(to: Lowering, equation: core.JaxprEqn, *parts: Tensor) -> Tensor:
    return to.graph.concatenate(parts, equation.params["dimension"])


def _slice(to: Lowering, equation: core.JaxprEqn, x: Tensor) -> Tensor:
    params = equation.params
    steps = params["strides"] or [1] * len(params["start_indices"])
    return to.graph.slice(x, to.shape(params["start_indices"]), to.shape(params["limit_indices"]), steps)


def _split(to: Lowering, equation: core.JaxprEqn, x: Tensor) -> list[Tensor]:
    axis, shape = equation.params["axis"], _aval(equation.invars[0]).shape
    parts, at = [], 0
    for size in map(int, equation.params["sizes"]):
        starts, limits = [0] * len(shape), list(shape)
        starts[axis], limits[axis] = at, at + size
        parts.append(to.graph.slice(x, starts, to.shape(limits), [1] * len(shape)))
        at += size
    return parts


def _pad(to: Lowering, equation: core.JaxprEqn, x: Tensor, value: Tensor) -> Tensor:
    low, high, inner = zip(*equation.params["padding_config"], strict=True)
    if any(inner) or min(*low, *high) < 0:
        raise NotImplementedError(f"no rule for padding by {equation.params['padding_config']}.")
    return to.graph.pad(x, value, low, high)


def _cumsum(to: Lowering, equation: core.JaxprEqn, x: Tensor) -> Tensor:
    return to.graph.cumsum(x, equation.params["axis"], equation.params["reverse"])


def _iota(to: Lowering, equation: core.JaxprEqn) -> Tensor:
    shape, axis = equation.params["shape"], equation.params["dimension"]
    numbers = to.graph.cast(to.graph.arange(to.size(shape[axis])), np.dtype(equation.params["dtype"]))
    if len(shape) == 1:
        return numbers
    beside = [dim if i == axis else 1 for i, dim in enumerate(shape)]
    return to.graph.expand(to.graph.reshape(numbers, to.shape(beside)), to.shape(shape))


def _dim_as_value(to: Lowering, equation: core.JaxprEqn) -> Tensor:
    return to.graph.size_as_int32(to.size(equation.params["dim"]))


def _select(to: Lowering, equation: core.JaxprEqn, which: Tensor, *cases: Tensor) -> Tensor:
    if len(cases) != 2 or _aval(equation.invars[0]).dtype != np.bool_:
        raise NotImplementedError(f"no rule for a selection among {len(cases)} cases.")
    return to.graph.where(which, cases[1], cases[0])


def _clamp(to: Lowering, equation: core.JaxprEqn, low: Tensor, x: Tensor, high: Tensor) -> Tensor:
    return to.graph.binary("min", to.graph.binary("max", x, low), high)


def _integer_pow(to: Lowering, equation: core.JaxprEqn, x: Tensor) -> Tensor:
    exponent = equation.params["y"]
    if exponent < 1:
        raise NotImplementedError(f"no rule for the power {exponent}.")
    found = x
    for _ in range(exponent - 1):
        found = to.graph.binary("mul", found, x)
    return found


def _clz(to: Lowering, equation: core.JaxprEqn, x: Tensor) -> Tensor:
    """Of numbers that are not negative: 31 less one for each power of two from 1 on that they reach."""
    graph = to.graph
    count = graph.constant(np.asarray(32, np.int32))
    for power in range(31):
        reached = graph.binary("ge", x, graph.constant(np.asarray(1 << power, np.int32)))
        count = graph.binary("sub", count, graph.cast(reached, np.dtype(np.int32)))
    return count


def _reduce(name: str) -> Rule:
    return lambda to, equation, x: to.graph.reduce(name, x, equation.params["axes"])


def _reduce_bool(name: str) -> Rule:
    def rule(to: Lowering, equation: core.JaxprEqn, x: Tensor) -> Tensor:
        numbers = to.graph.cast(x, np.dtype(np.int32))
        return to.graph.cast(to.graph.reduce(name, numbers, equation.params["axes"]), np.dtype(np.bool_))

    return rule


def _top_k(to: Lowering, equation: core.JaxprEqn, x: Tensor) -> list[Tensor]:
    return list(to.graph.top_k(x, equation.params["k"]))


def _dot_general(to: Lowering, equation: core.JaxprEqn, x: Tensor, y: Tensor) -> Tensor:
    (x_sums, y_sums), (x_batch, y_batch) = equation.params["dimension_numbers"]
    x_rank, y_rank = (len(_aval(atom).shape) for atom in equation.invars)
    if not x_batch and y_rank == 2 and tuple(x_sums) == (x_rank - 1,):
        return to.graph.matmul(x, y, transpose_y=tuple(y_sums) == (1,))
    letters = iter(string.ascii_lowercase)
    of_x, of_y = [""] * x_rank, [""] * y_rank
    shared = [*zip(x_batch, y_batch, strict=True), *zip(x_sums, y_sums, strict=True)]
    for x_axis, y_axis in shared:
        of_x[x_axis] = of_y[y_axis] = next(letters)
    of_x, of_y = ([letter or next(letters) for letter in names] for names in (of_x, of_y))
    summed = {of_x[axis] for axis in x_sums}
    batch = [of_x[axis] for axis in x_batch]
    free = [letter for letter in (*of_x, *of_y) if letter not in summed and letter not in batch]
    return to.graph.einsum(f"{''.join(of_x)},{''.join(of_y)}->{''.join(batch + free)}", x, y)


def _gather(to: Lowering, equation: core.JaxprEqn, x: Tensor, indices: Tensor) -> Tensor:
    """Single entries along the indexed axes, whole other axes; or one slice."""
    graph, params = to.graph, equation.params
    numbers, slices = params["dimension_numbers"], params["slice_sizes"]
    shape, out = _aval(equation.invars[0]).shape, _output(equation)
    if len(_aval(equation.invars[1]).shape) == 1:
        return _one_slice(to, equation, x, indices)
    indexed, x_batch = list(numbers.start_index_map), list(numbers.operand_batching_dims)
    index_batch = list(numbers.start_indices_batching_dims)
    whole = [axis for axis in range(len(shape)) if axis not in (*indexed, *x_batch)]
    if any(slices[axis] != 1 for axis in indexed) or any(slices[axis] != shape[axis] for axis in whole):
        raise NotImplementedError(f"no rule for a gather of slices {slices} from {shape}.")
    index_rank = len(_aval(equation.invars[1]).shape) - 1
    index_axes = [*index_batch, *(axis for axis in range(index_rank) if axis not in index_batch)]

    sizes = [_as_tensor(graph, to.size(shape[axis])) for axis in indexed]
    last = graph.binary("add", graph.concatenate(sizes, 0), graph.size_of_value(-1))
    bound = graph.cast(last, np.dtype(np.int32))
    zero = graph.constant(np.asarray(0, np.int32))
    indices = graph.cast(indices, np.dtype(np.int32))
    inside = graph.binary("max", graph.binary("min", indices, bound), zero)
    found = graph.gather(
        graph.transpose(x, [*x_batch, *indexed, *whole]),
        graph.transpose(inside, [*index_axes, index_rank]),
        len(x_batch),
    )
    # Axes of `found`: those of the indices in the order of `index_axes`, then the whole ones.
    offsets = [axis for axis in range(len(shape)) if axis not in (*numbers.collapsed_slice_dims, *x_batch)]
    from_index, from_x = iter(range(index_rank)), iter(offsets)
    order, position = [], {axis: at for at, axis in enumerate(index_axes)}
    for axis in range(len(out.shape)):
        if axis not in numbers.offset_dims:
            order.append(position[next(from_index)])
        elif (source := next(from_x)) in whole:
            order.append(index_rank + whole.index(source))
    found = graph.reshape(graph.transpose(found, order), to.shape(out.shape))
    if params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return found
    valid = graph.cast(graph.binary("eq", inside, indices), np.dtype(np.int32))
    valid = graph.cast(graph.reduce("min", valid, [index_rank]), np.dtype(np.bool_))
    beside = [1 if axis in numbers.offset_dims else dim for axis, dim in enumerate(out.shape)]
    missing = params["fill_value"]
    if missing is None:
        missing = np.nan if np.issubdtype(out.dtype, np.floating) else np.iinfo(out.dtype).min
    return graph.where(
        graph.reshape(valid, to.shape(beside)), found, graph.constant(np.asarray(missing, out.dtype))
    )


def _one_slice(to: Lowering, equation: core.JaxprEqn, x: Tensor, starts: Tensor) -> Tensor:
    """A slice of known size; it is moved inside where it would reach out."""
    graph, int32 = to.graph, np.dtype(np.int32)
    slices, shape = equation.params["slice_sizes"], _aval(equation.invars[0]).shape
    indexed = equation.params["dimension_numbers"].start_index_map
    zero, low, high = graph.size_of_value(0), [], []
    for axis, (size, width) in enumerate(zip(to.shape(shape), to.shape(slices), strict=True)):
        start, width = zero, _as_tensor(graph, width)
        if axis in indexed:
            at = indexed.index(axis)
            wanted = graph.slice(graph.cast(starts, int32), [at], [at + 1], [1])
            most = graph.cast(graph.binary("sub", _as_tensor(graph, size), width), int32)
            inside = graph.binary("max", graph.binary("min", wanted, most), graph.cast(zero, int32))
            start = graph.as_size(inside)
        low.append(start)
        high.append(graph.binary("add", start, width))
    return graph.reshape(graph.slice(x, low, high, [1] * len(shape)), to.shape(_output(equation).shape))


def _scatter(*, add: bool) -> Rule:
    def rule(to: Lowering, equation: core.JaxprEqn, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        numbers = equation.params["dimension_numbers"]
        rank = len(_aval(equation.invars[0]).shape)
        if tuple(numbers.scatter_dims_to_operand_dims) != tuple(range(rank)) or numbers.update_window_dims:
            raise NotImplementedError(f"no rule for a scatter by {numbers}.")
        return to.graph.scatter(x, indices, updates, add)

    return rule


def _as_tensor(graph: Graph, size: Size) -> Size:
    return graph.size_of_value(size) if isinstance(size, int) else size


RULES: dict[str, Rule] = {
    "broadcast_in_dim": _broadcast,
    "clamp": _clamp,
    "clz": _clz,
    "concatenate": _concatenate,
    "convert_element_type": _convert,
    "cumsum": _cumsum,
    "dim_as_value": _dim_as_value,
    "dot_general": _dot_general,
    "expand_dims": _reshape,
    "gather": _gather,
    "integer_pow": _integer_pow,
    "iota": _iota,
    "pad": _pad,
    "reduce_and": _reduce_bool("min"),
    "reduce_max": _reduce("max"),
    "reduce_min": _reduce("min"),
    "reduce_or": _reduce_bool("max"),
    "reduce_sum": _reduce("sum"),
    "reshape": _reshape,
    "rev": lambda to, equation, x: to.graph.reverse(x, equation.params["dimensions"]),
    "scatter": _scatter(add=False),
    "scatter-add": _scatter(add=True),
    "select_n": _select,
    "slice": _slice,
    "split": _split,
    "squeeze": _reshape,
    "top_k": _top_k,
    "transpose": _transpose,
}
