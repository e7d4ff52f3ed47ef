"""The operations of `graph.Graph` in ONNX, and the programs as ONNX files that share one file of weights.

Shapes are int64 in ONNX, everything that a program computes with is int32.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from jaxrec.export.graph import Shape, Size, Tensor
from jaxrec.export.lowering import Lowering
from jaxrec.export.programs import ProgramSpec
from jaxrec.export.weights import HostWeights

OPSET, IR_VERSION = 18, 9  # old enough for the runtimes of the last years
WEIGHTS_FILE = "weights.bin"
ALIGNMENT = 4096  # of each weight in the file, so that it can be mapped

UNARY = {
    "abs": "Abs",
    "cos": "Cos",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "log": "Log",
    "logistic": "Sigmoid",
    "neg": "Neg",
    "not": "Not",
    "sign": "Sign",
    "sin": "Sin",
    "sqrt": "Sqrt",
    "tanh": "Tanh",
}
BINARY = {
    "add": "Add",
    "div": "Div",
    "max": "Max",
    "min": "Min",
    "mul": "Mul",
    "pow": "Pow",
    "sub": "Sub",
}
COMPARISONS = {"eq": "Equal", "ge": "GreaterOrEqual", "gt": "Greater", "le": "LessOrEqual", "lt": "Less"}
INT64 = np.dtype(np.int64)


class OnnxGraph:
    """Collects nodes; a tensor is its name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.dtypes: dict[str, np.dtype] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def constant(self, value: np.ndarray) -> Tensor:
        """A constant; equal ones are one."""
        value = np.asarray(value)
        key = (value.dtype.name, value.shape, value.tobytes())
        if key not in self._constants:
            name = self._constants[key] = f"constant_{len(self._constants)}"
            self.initializers.append(numpy_helper.from_array(value, name))
            self.dtypes[name] = value.dtype
        return self._constants[key]

    def size(self, x: Tensor, axis: int) -> Size:
        """The size of an axis."""
        return self._node("Shape", x, dtype=INT64, start=axis, end=axis + 1)

    def size_of_value(self, value: int) -> Size:
        """A number as a size."""
        return self.constant(np.asarray([value], np.int64))

    def as_size(self, x: Tensor) -> Size:
        """Sizes are int64."""
        return self.cast(x, INT64)

    def size_as_int32(self, size: Size) -> Tensor:
        """A scalar."""
        if isinstance(size, int):
            return self.constant(np.asarray(size, np.int32))
        return self.cast(self.reshape(size, []), np.dtype(np.int32))

    def cast(self, x: Tensor, dtype: np.dtype) -> Tensor:
        """Another dtype."""
        if self.dtypes[x] == dtype:
            return x
        return self._node("Cast", x, dtype=dtype, to=helper.np_dtype_to_tensor_dtype(dtype))

    def unary(self, name: str, x: Tensor) -> Tensor:
        """Elementwise."""
        match name:
            case "log1p":
                return self.unary("log", self.binary("add", x, self._like(1, x)))
            case "rsqrt":
                return self._node("Reciprocal", self.unary("sqrt", x))
            case "square":
                return self.binary("mul", x, x)
        return self._node(UNARY[name], x)

    def binary(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Elementwise."""
        is_bool = self.dtypes[x] == np.bool_
        match name:
            case "and" | "or":
                kind = name.capitalize()
                return self._node(kind if is_bool else f"Bitwise{kind}", x, y)
            case "ne":
                return self.unary("not", self.binary("eq", x, y))
            case "rem":
                return self._node("Mod", x, y, fmod=1)
            case "shift_right_arithmetic" | "shift_right_logical":
                unsigned = [self.cast(value, np.dtype(np.uint32)) for value in (x, y)]
                return self.cast(self._node("BitShift", *unsigned, direction="RIGHT"), self.dtypes[x])
        if name in COMPARISONS:
            return self._node(COMPARISONS[name], x, y, dtype=np.dtype(np.bool_))
        return self._node(BINARY[name], x, y)

    def where(self, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """A choice."""
        dtype = self.dtypes[x]
        if dtype == np.bool_:  # runtimes choose among numbers only
            x, y = (self.cast(value, np.dtype(np.int32)) for value in (x, y))
        return self.cast(self._node("Where", condition, x, y, dtype=self.dtypes[x]), dtype)

    def reduce(self, name: str, x: Tensor, axes: Sequence[int]) -> Tensor:
        """Sums, largest or smallest entries."""
        return self._node(f"Reduce{name.capitalize()}", x, self._numbers(axes), keepdims=0)

    def reshape(self, x: Tensor, shape: Shape) -> Tensor:
        """Another shape."""
        unknown = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
        if len(unknown) == 1:  # found by the runtime
            shape = [-1 if axis in unknown else size for axis, size in enumerate(shape)]
        return self._node("Reshape", x, self._shape(shape))

    def expand(self, x: Tensor, shape: Shape) -> Tensor:
        """Repeats axes of size 1."""
        return self._node("Expand", x, self._shape(shape))

    def transpose(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """Axes in another order."""
        return x if list(axes) == list(range(len(axes))) else self._node("Transpose", x, perm=list(axes))

    def concatenate(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        """One after the other."""
        return parts[0] if len(parts) == 1 else self._node("Concat", *parts, axis=axis)

    def slice(self, x: Tensor, starts: Shape, limits: Shape, steps: Sequence[int]) -> Tensor:
        """A part of each axis."""
        axes = self._numbers(range(len(steps)))
        return self._node("Slice", x, self._shape(starts), self._shape(limits), axes, self._numbers(steps))

    def reverse(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """Last entry first."""
        back = self._numbers([-1] * len(axes))
        end = self._numbers([np.iinfo(np.int64).min] * len(axes))
        return self._node("Slice", x, back, end, self._numbers(axes), back)

    def pad(self, x: Tensor, value: Tensor, low: Sequence[int], high: Sequence[int]) -> Tensor:
        """`value` around."""
        return self._node("Pad", x, self._numbers([*low, *high]), value)

    def cumsum(self, x: Tensor, axis: int, reverse: bool) -> Tensor:
        """Running sums."""
        return self._node("CumSum", x, self.constant(np.asarray(axis, np.int64)), reverse=int(reverse))

    def arange(self, size: Size) -> Tensor:
        """0, 1, ..."""
        zero, one = (self.constant(np.asarray(value, np.int32)) for value in (0, 1))
        return self._node("Range", zero, self.size_as_int32(size), one, dtype=np.dtype(np.int32))

    def einsum(self, equation: str, x: Tensor, y: Tensor) -> Tensor:
        """A product and sum over letters."""
        return self._node("Einsum", x, y, equation=equation)

    def matmul(self, x: Tensor, y: Tensor, transpose_y: bool) -> Tensor:
        """A product of matrices, or of a stack of them and one."""
        return self._node("MatMul", x, self.transpose(y, [1, 0]) if transpose_y else y)

    def gather(self, x: Tensor, indices: Tensor, batch_dims: int) -> Tensor:
        """Entries at indices."""
        return self._node("GatherND", x, self.cast(indices, INT64), batch_dims=batch_dims)

    def scatter(self, x: Tensor, indices: Tensor, updates: Tensor, add: bool) -> Tensor:
        """Entries put or added."""
        reduction = "add" if add else "none"
        return self._node("ScatterND", x, self.cast(indices, INT64), updates, reduction=reduction)

    def top_k(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The largest entries."""
        values, places = self._name(self.dtypes[x]), self._name(INT64)
        self.nodes.append(helper.make_node("TopK", [x, self._numbers([k])], [values, places], axis=-1))
        return values, self.cast(places, np.dtype(np.int32))

    def named(self, x: Tensor, name: str) -> None:
        """Gives an output its name."""
        self.nodes.append(helper.make_node("Identity", [x], [name]))

    def _node(self, kind: str, *inputs: Tensor, dtype: np.dtype | None = None, **attributes: Any) -> Tensor:
        """One node; its output is of the dtype of its first input unless said otherwise."""
        name = self._name(self.dtypes[inputs[0]] if dtype is None else dtype)
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def _name(self, dtype: np.dtype) -> str:
        name = f"value_{len(self.dtypes)}"
        self.dtypes[name] = np.dtype(dtype)
        return name

    def _like(self, value: float, x: Tensor) -> Tensor:
        return self.constant(np.asarray(value, self.dtypes[x]))

    def _numbers(self, values: Sequence[int]) -> Tensor:
        return self.constant(np.asarray(list(values), np.int64).reshape(-1))

    def _shape(self, sizes: Shape) -> Tensor:
        if all(isinstance(size, int) for size in sizes):
            return self._numbers(sizes)
        return self.concatenate([self.size_of_value(s) if isinstance(s, int) else s for s in sizes], 0)


def write_onnx(
    programs: Mapping[str, ProgramSpec], weights: HostWeights, directory: Path, producer_version: str
) -> None:
    """`NAME.onnx` for each program, and the weights of all of them in one file beside.

    Raises:
      NotImplementedError: a program does what has no rule.
    """
    directory.mkdir(parents=True)
    places = _write_weights(weights, directory / WEIGHTS_FILE)
    for name, program in programs.items():
        model = onnx_model(program, weights, places)
        model.producer_name, model.producer_version = "jaxrec", producer_version
        onnx.save_model(model, str(directory / f"{name}.onnx"))
        onnx.checker.check_model(str(directory / f"{name}.onnx"))


def onnx_model(
    program: ProgramSpec, weights: HostWeights, places: Mapping[str, tuple[int, int]]
) -> onnx.ModelProto:
    """The program with the names of its inputs and outputs.

    Args:
      places: offset and bytes of each weight in `WEIGHTS_FILE`.
    """
    graph, sizes = OnnxGraph(), {}
    for array in program.inputs:
        graph.dtypes[array.name] = np.dtype(array.dtype)
    for array in program.inputs:
        for axis, dim in enumerate(array.dims):
            if isinstance(dim, str) and dim not in sizes:
                sizes[dim] = graph.size(array.name, axis)
    for name in program.weights:
        graph.dtypes[name] = weights[name].dtype
        graph.initializers.append(_external(name, weights[name], *places[name]))
    flat = [*sorted(program.weights), *sorted(array.name for array in program.inputs)]
    for array, found in zip(program.outputs, Lowering(graph, sizes).run(program.jaxpr, flat), strict=True):
        graph.named(found, array.name)
    whole = helper.make_graph(
        graph.nodes, program.name, _values(program.inputs), _values(program.outputs), graph.initializers
    )
    return helper.make_model(whole, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def _values(arrays: Sequence[Any]) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(
            array.name, helper.np_dtype_to_tensor_dtype(np.dtype(array.dtype)), list(array.dims)
        )
        for array in arrays
    ]


def _write_weights(weights: HostWeights, path: Path) -> dict[str, tuple[int, int]]:
    places = {}
    with path.open("wb") as file:
        for name, array in weights.items():
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            content = np.ascontiguousarray(array).tobytes()
            places[name] = file.tell(), len(content)
            file.write(content)
    return places


def _external(name: str, array: np.ndarray, offset: int, length: int) -> onnx.TensorProto:
    tensor = TensorProto(
        name=name,
        dims=array.shape,
        data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
        data_location=TensorProto.EXTERNAL,
    )
    for key, value in {"location": WEIGHTS_FILE, "offset": offset, "length": length}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
