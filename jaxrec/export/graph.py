"""What a runtime must be able to do for a program to be written in it (`lowering`)."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

Tensor: TypeAlias = Any  # of the runtime
Size: TypeAlias = Any  # a number, or a tensor [1] of the runtime's index type
Shape: TypeAlias = Sequence[Size]


class Graph(Protocol):
    """The operations of a runtime; they broadcast as NumPy does. Names of `unary` and the like are those of JAX."""

    def constant(self, value: np.ndarray) -> Tensor:
        """A constant."""

    def size(self, x: Tensor, axis: int) -> Size:
        """The size of an axis, as a tensor [1]."""

    def size_of_value(self, value: int) -> Size:
        """A number as a size."""

    def as_size(self, x: Tensor) -> Size:
        """An int32 tensor [1] as a size."""

    def size_as_int32(self, size: Size) -> Tensor:
        """A size as a scalar that one computes with."""

    def cast(self, x: Tensor, dtype: np.dtype) -> Tensor:
        """Another dtype; floats are truncated to integers."""

    def unary(self, name: str, x: Tensor) -> Tensor:
        """Elementwise."""

    def binary(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Elementwise; on sizes too."""

    def where(self, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """`x` where the condition is true."""

    def reduce(self, name: str, x: Tensor, axes: Sequence[int]) -> Tensor:
        """ "sum", "max" or "min"; the axes are gone."""

    def reshape(self, x: Tensor, shape: Shape) -> Tensor:
        """The same entries in another shape."""

    def expand(self, x: Tensor, shape: Shape) -> Tensor:
        """Repeats axes of size 1."""

    def transpose(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """Axes in another order."""

    def concatenate(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        """One after the other."""

    def slice(self, x: Tensor, starts: Shape, limits: Shape, steps: Sequence[int]) -> Tensor:
        """As lax.slice, for all axes."""

    def reverse(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        """Last entry first."""

    def pad(self, x: Tensor, value: Tensor, low: Sequence[int], high: Sequence[int]) -> Tensor:
        """`value` before and after each axis."""

    def cumsum(self, x: Tensor, axis: int, reverse: bool) -> Tensor:
        """Running sums."""

    def arange(self, size: Size) -> Tensor:
        """0, 1, ... as int32."""

    def einsum(self, equation: str, x: Tensor, y: Tensor) -> Tensor:
        """A product and sum over letters."""

    def matmul(self, x: Tensor, y: Tensor, transpose_y: bool) -> Tensor:
        """The product of the last two axes; y may be a matrix for all of x."""

    def gather(self, x: Tensor, indices: Tensor, batch_dims: int) -> Tensor:
        """`x[b, *indices[b, i]]` for leading axes b."""

    def scatter(self, x: Tensor, indices: Tensor, updates: Tensor, add: bool) -> Tensor:
        """`x` with entries put, or added, at full indices that lie inside."""

    def top_k(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Values and places along the last axis; the first of equal ones comes first."""
