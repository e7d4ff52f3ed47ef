"""The operations of `graph.Graph` in TensorFlow."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from jaxrec.export.graph import Shape, Size, Tensor

UNARY: Mapping[str, Callable[[Any], Any]] = {
    "abs": tf.abs,
    "cos": tf.cos,
    "erf": tf.math.erf,
    "exp": tf.exp,
    "floor": tf.floor,
    "log": tf.math.log,
    "log1p": tf.math.log1p,
    "logistic": tf.sigmoid,
    "neg": tf.negative,
    "not": tf.logical_not,
    "rsqrt": tf.math.rsqrt,
    "sign": tf.sign,
    "sin": tf.sin,
    "sqrt": tf.sqrt,
    "square": tf.square,
    "tanh": tf.tanh,
}
BINARY: Mapping[str, Callable[[Any, Any], Any]] = {
    "add": tf.add,
    "eq": tf.equal,
    "ge": tf.greater_equal,
    "gt": tf.greater,
    "le": tf.less_equal,
    "lt": tf.less,
    "max": tf.maximum,
    "min": tf.minimum,
    "mul": tf.multiply,
    "ne": tf.not_equal,
    "pow": tf.pow,
    "rem": tf.truncatemod,
    "shift_right_arithmetic": tf.bitwise.right_shift,
    "shift_right_logical": tf.bitwise.right_shift,
    "sub": tf.subtract,
}


class TensorFlowGraph:
    """Inside a `tf.function`."""

    def constant(self, value: np.ndarray) -> Tensor:
        """A constant."""
        return tf.constant(value)

    def size(self, x: Tensor, axis: int) -> Size:
        """The size of an axis."""
        return tf.shape(x)[axis : axis + 1]

    def size_of_value(self, value: int) -> Size:
        """A number as a size."""
        return tf.constant([value], tf.int32)

    def as_size(self, x: Tensor) -> Size:
        """Sizes are int32."""
        return x

    def size_as_int32(self, size: Size) -> Tensor:
        """A scalar."""
        return tf.constant(size, tf.int32) if isinstance(size, int) else tf.reshape(size, [])

    def cast(self, x: Tensor, dtype: np.dtype) -> Tensor:
        """Another dtype."""
        return tf.cast(x, tf.as_dtype(dtype))

    def unary(self, name: str, x: Tensor) -> Tensor:
        """Elementwise."""
        return UNARY[name](x)

    def binary(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Elementwise."""
        if name in ("and", "or"):
            if x.dtype == tf.bool:
                return tf.logical_and(x, y) if name == "and" else tf.logical_or(x, y)
            return tf.bitwise.bitwise_and(x, y) if name == "and" else tf.bitwise.bitwise_or(x, y)
        if name == "div":
            return tf.divide(x, y) if x.dtype.is_floating else tf.truncatediv(x, y)
        return BINARY[name](x, y)

    def where(self, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """A choice."""
        return tf.where(condition, x, y)

    def reduce(self, name: str, x: Tensor, axes: Sequence[int]) -> Tensor:
        """Sums, largest or smallest entries."""
        reduction = {"sum": tf.reduce_sum, "max": tf.reduce_max, "min": tf.reduce_min}[name]
        return reduction(x, axis=list(axes))

    def reshape(self, x: Tensor, shape: Shape) -> Tensor:
        """Another shape."""
        return tf.reshape(x, self._shape(shape))

    def expand(self, x: Tensor, shape: Shape) -> Tensor:
        """Repeats axes of size 1."""
        return tf.broadcast_to(x, self._shape(shape))

    def transpose(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """Axes in another order."""
        return x if list(axes) == list(range(len(axes))) else tf.transpose(x, list(axes))

    def concatenate(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        """One after the other."""
        return tf.concat(list(parts), axis)

    def slice(self, x: Tensor, starts: Shape, limits: Shape, steps: Sequence[int]) -> Tensor:
        """A part of each axis."""
        return tf.strided_slice(x, self._shape(starts), self._shape(limits), list(steps))

    def reverse(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """Last entry first."""
        return tf.reverse(x, list(axes))

    def pad(self, x: Tensor, value: Tensor, low: Sequence[int], high: Sequence[int]) -> Tensor:
        """`value` around."""
        return tf.pad(x, list(zip(low, high, strict=True)), constant_values=value)

    def cumsum(self, x: Tensor, axis: int, reverse: bool) -> Tensor:
        """Running sums."""
        return tf.cumsum(x, axis, reverse=reverse)

    def arange(self, size: Size) -> Tensor:
        """0, 1, ..."""
        return tf.range(self.size_as_int32(size))

    def einsum(self, equation: str, x: Tensor, y: Tensor) -> Tensor:
        """A product and sum over letters."""
        return tf.einsum(equation, x, y)

    def matmul(self, x: Tensor, y: Tensor, transpose_y: bool) -> Tensor:
        """A product of matrices, or of a stack of them and one."""
        if x.shape.rank == 2:
            return tf.matmul(x, y, transpose_b=transpose_y)
        return tf.tensordot(x, y, [[-1], [1 if transpose_y else 0]])

    def gather(self, x: Tensor, indices: Tensor, batch_dims: int) -> Tensor:
        """Entries at indices."""
        return tf.gather_nd(x, indices, batch_dims=batch_dims)

    def scatter(self, x: Tensor, indices: Tensor, updates: Tensor, add: bool) -> Tensor:
        """Entries put or added."""
        change = tf.tensor_scatter_nd_add if add else tf.tensor_scatter_nd_update
        return change(x, indices, updates)

    def top_k(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The largest entries."""
        values, places = tf.math.top_k(x, k)
        return values, places

    def _shape(self, sizes: Shape) -> Any:
        if all(isinstance(size, int) for size in sizes):
            return tf.constant(list(sizes), tf.int32)
        return tf.concat([self.size_of_value(s) if isinstance(s, int) else s for s in sizes], 0)
