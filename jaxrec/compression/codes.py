"""What stands for an array in a compressed model: the codes, how they are read back, what they weigh.

A code is a tree of arrays, so that a program may take it as an argument and read it back inside: the array itself is
then nowhere in memory. `describe` and `from_arrays` carry it through a file.

R = rows, D = entries of a row, G = groups of a row, M = sub-spaces, K = centroids of a sub-space.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8, UInt8

from jaxrec.compression.row_codes import encode_rows, packed_width, unpack_nibbles

AnyArray = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Code:
    """Base of the codes. Fields marked static are the description, the others the arrays."""

    kind: ClassVar[str]

    @property
    def arrays(self) -> dict[str, AnyArray]:
        """What is stored, by name."""
        return {name: getattr(self, name) for name in _names(type(self), static=False)}

    @property
    def num_bytes(self) -> int:
        """Of the stored arrays."""
        return sum(array.size * array.dtype.itemsize for array in self.arrays.values())

    def describe(self) -> dict[str, Any]:
        """What `from_arrays` needs beside the arrays, as JSON."""
        return {"kind": self.kind} | {
            name: list(value) if isinstance(value := getattr(self, name), tuple) else value
            for name in _names(type(self), static=True)
        }

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that it stands for."""
        raise TypeError(f"{type(self).__name__} must define shape")

    def expected(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype that each stored array must have by the description."""
        raise TypeError(f"{type(self).__name__} must define expected")

    def decode(self) -> jax.Array:
        """The array, in the dtype that the model computes with."""
        raise TypeError(f"{type(self).__name__} must define decode")

    def rows(self, ids: Int[Array, "*b"]) -> Float[Array, "*b D"]:
        """Some rows of a table."""
        return self.decode()[ids]

    def scores(self, query: Float[Array, " D"]) -> Float[Array, " R"]:
        """The product of every row of a table with a query."""
        return self.decode() @ query


def _names(kind: type, *, static: bool) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if bool(field.metadata.get("static")) == static]


def static(**options: Any) -> Any:
    """A field of the description."""
    return dataclasses.field(metadata={"static": True}, **options)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain(Code):
    """The array, perhaps in a narrower dtype.

    Attributes:
      dtype: what it is read back as.
      stored: what it is kept as.
    """

    kind: ClassVar[str] = "plain"
    values: AnyArray
    full_shape: tuple[int, ...] = static()
    dtype: str = static(default="float32")
    stored: str = static(default="float32")

    @classmethod
    def of(cls, array: np.ndarray, stored: str | None = None) -> "Plain":
        """Keeps `array` as it is, or as `stored`.

        Raises:
          ValueError: a number does not fit the narrower dtype.
        """
        array = np.asarray(array)
        with np.errstate(over="ignore"):
            narrow = array.astype(stored or array.dtype, copy=False)
        whole = np.issubdtype(array.dtype, np.integer)
        fits = (
            np.array_equal(narrow, array) if whole else np.isfinite(narrow).all() >= np.isfinite(array).all()
        )
        if not fits:
            raise ValueError(
                f"an array of {array.dtype} holds {np.abs(array).max()}, which {stored} does not; keep it as it is."
            )
        return cls(values=narrow, full_shape=array.shape, dtype=str(array.dtype), stored=str(narrow.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Code`."""
        return tuple(self.full_shape)

    def expected(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """See `Code`."""
        return {"values": (self.shape, self.stored)}

    def decode(self) -> jax.Array:
        """See `Code`."""
        return jnp.asarray(self.values).astype(self.dtype)

    def rows(self, ids: Int[Array, "*b"]) -> Array:
        """See `Code`."""
        return jnp.asarray(self.values)[ids].astype(self.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowCodes(Code):
    """Whole numbers of 8 or 4 bits, and a float16 scale for each group of a row's entries (`row_codes`).

    Attributes:
      values: `[R, D]` int8, or `[R, ceil(D / 2)]` uint8 of two numbers each.
      bits: 8 or 4.
      group: entries that share a scale.
      num_inputs: leading dims of a kernel that are summed over: its rows are the output channels then, so that each of
        them has scales of its own. 0 = the rows of the array, its last dim.
    """

    kind: ClassVar[str] = "rows"
    values: Int8[Array, "R D"] | UInt8[Array, "R P"] | np.ndarray
    scales: Float[Array, "R G"] | np.ndarray
    full_shape: tuple[int, ...] = static()
    bits: int = static()
    group: int = static()
    num_inputs: int = static(default=0)

    @classmethod
    def of(cls, array: np.ndarray, *, bits: int, group: int = 0, num_inputs: int = 0) -> "RowCodes":
        """Encodes an array of at least one dim.

        Args:
          group: entries that share a scale; 0 = all of a row.
        """
        array = np.asarray(array, np.float32)
        matrix = _as_rows(array, num_inputs)
        group = min(group or matrix.shape[1], matrix.shape[1]) or 1
        values, scales = encode_rows(matrix, bits=bits, group=group)
        return cls(
            values=values,
            scales=scales,
            full_shape=array.shape,
            bits=bits,
            group=group,
            num_inputs=num_inputs,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Code`."""
        return tuple(self.full_shape)

    def expected(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """See `Code`."""
        rows, width = self._matrix_shape
        values = ((rows, width), "int8") if self.bits == 8 else ((rows, packed_width(width)), "uint8")
        return {"values": values, "scales": ((rows, -(-width // self.group)), "float16")}

    @property
    def _matrix_shape(self) -> tuple[int, int]:
        if not self.num_inputs:
            return int(np.prod(self.shape[:-1])), self.shape[-1]
        return int(np.prod(self.shape[self.num_inputs :])), int(np.prod(self.shape[: self.num_inputs]))

    def decode(self) -> jax.Array:
        """See `Code`."""
        matrix = self._scaled(jnp.asarray(self.values), jnp.asarray(self.scales))
        return (matrix.T if self.num_inputs else matrix).reshape(self.shape)

    def rows(self, ids: Int[Array, "*b"]) -> Float[Array, "*b D"]:
        """Reads these rows alone; see `Code`."""
        if self.num_inputs or len(self.shape) != 2:
            return super().rows(ids)
        flat = ids.reshape(-1)
        found = self._scaled(jnp.asarray(self.values)[flat], jnp.asarray(self.scales)[flat])
        return found.reshape(*ids.shape, self.shape[1])

    def scores(self, query: Float[Array, " D"]) -> Float[Array, " R"]:
        """One product with the whole numbers, then the scales; see `Code`."""
        if self.group < self.shape[-1]:
            return super().scores(query)
        numbers = self._numbers(jnp.asarray(self.values))
        return (numbers @ query) * jnp.asarray(self.scales).astype(jnp.float32)[:, 0]

    def _scaled(self, values: jax.Array, scales: jax.Array) -> Float[Array, "R D"]:
        numbers = self._numbers(values)
        return numbers * jnp.repeat(scales.astype(jnp.float32), self.group, axis=1)[:, : numbers.shape[1]]

    def _numbers(self, values: jax.Array) -> Float[Array, "R D"]:
        if self.bits == 4:
            values = unpack_nibbles(values, self._matrix_shape[1])
        return values.astype(jnp.float32)


def _as_rows(array: np.ndarray, num_inputs: int) -> Float[np.ndarray, "R D"]:
    if not num_inputs:
        return array.reshape(-1, array.shape[-1])
    return np.ascontiguousarray(array.reshape(int(np.prod(array.shape[:num_inputs])), -1).T)


def code_from_arrays(
    kinds: Mapping[str, type[Code]], described: Mapping[str, Any], arrays: Mapping[str, Any]
) -> Code:
    """The code of a description; `arrays` may be anything that has a shape and a dtype.

    Raises:
      ValueError: the description is of no kind, or the arrays are not what it says.
    """
    kind = kinds.get(str(described.get("kind")))
    if kind is None:
        raise ValueError(f"kind={described.get('kind')!r} must be one of {', '.join(kinds)}.")
    wanted, named = _names(kind, static=True), set(described) - {"kind"}
    if set(arrays) != set(_names(kind, static=False)) or named != set(wanted):
        raise ValueError(
            f"a code of kind {kind.kind!r} has the fields {', '.join([*wanted, *_names(kind, static=False)])}, and "
            f"these are {', '.join(sorted(named | set(arrays)))}."
        )
    fields = {name: described[name] for name in wanted}
    code = kind(**arrays, **{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})
    for name, (shape, dtype) in code.expected().items():
        found = arrays[name]
        if tuple(found.shape) != shape or str(found.dtype) != dtype:
            raise ValueError(
                f"{name} is {found.dtype}{list(found.shape)}, and its description says {dtype}{list(shape)}."
            )
    return code
