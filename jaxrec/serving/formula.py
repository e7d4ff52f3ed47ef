"""A formula in a config that makes one score of several: `click * buy^0.5`.

Numbers, names, + - * / ^, parentheses, and log, exp, sqrt, min, max: nothing else is read, so a formula runs no code.

C = candidates.
"""

import ast
import dataclasses
import operator
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, Self

import numpy as np
from jaxtyping import Float

__all__ = ["Formula"]

MOST_CHARACTERS = 500
MOST_PARTS = 100  # operations, names and numbers

_OPERATORS: dict[type[ast.operator] | type[ast.unaryop], Callable[..., Any]] = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.divide,
    ast.Pow: np.power,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_FUNCTIONS: dict[str, tuple[Callable[..., Any], int]] = {
    "log": (np.log, 1),
    "exp": (np.exp, 1),
    "sqrt": (np.sqrt, 1),
    "min": (np.minimum, 2),
    "max": (np.maximum, 2),
}


@dataclasses.dataclass(frozen=True)
class Formula:
    """A parsed formula; made by `parse`.

    Attributes:
      text: as it was written.
      names: that it reads.
    """

    text: str
    names: frozenset[str]
    _root: ast.expr = dataclasses.field(repr=False, compare=False)

    @classmethod
    def parse(cls, text: str, known: Collection[str] | None = None) -> Self:
        """Reads a formula over the names in `known`; None = over whatever names it has, which others check.

        Raises:
          ValueError: it is too long, is no formula, or asks for something else than numbers, names and the operations
            above; says what.
        """
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"a formula of {len(text)} characters; at most {MOST_CHARACTERS} are read.")
        try:
            root = ast.parse(text.strip().replace("^", "**"), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"{text!r} is no formula; write it like click * buy^0.5.") from error
        names: set[str] = set()
        _check(root, text, known, names, [0])
        return cls(text, frozenset(names), root)

    def __call__(self, columns: Mapping[str, Float[np.ndarray, " c"]]) -> Float[np.ndarray, " c"]:
        """The score of each candidate; what is no finite number (a division by 0, the log of 0) is -infinity."""
        with np.errstate(all="ignore"):
            value = np.asarray(_value(self._root, columns), np.float64)
        shape = np.broadcast_shapes(value.shape, *(np.shape(column) for column in columns.values()))
        return np.broadcast_to(np.where(np.isfinite(value), value, -np.inf), shape)


def _check(
    node: ast.AST, text: str, known: Collection[str] | None, names: set[str], parts: list[int]
) -> None:
    parts[0] += 1
    if parts[0] > MOST_PARTS:
        raise ValueError(f"{text!r} has more than {MOST_PARTS} parts.")
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            if value > sys.float_info.max:
                raise ValueError(
                    f"{text!r}: a number is too large; write none above {sys.float_info.max:.1e}."
                )
        case ast.Name(id=name):
            if known is not None and name not in known:
                raise ValueError(
                    f"{text!r}: {name!r} is no score; there are {', '.join(sorted(known)) or 'none'}."
                )
            names.add(name)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            _check(left, text, known, names, parts)
            _check(right, text, known, names, parts)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            _check(operand, text, known, names, parts)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            wanted = _FUNCTIONS[name][1]
            if len(arguments) != wanted:
                raise ValueError(f"{text!r}: {name} takes {wanted}, not {len(arguments)}.")
            for argument in arguments:
                _check(argument, text, known, names, parts)
        case _:
            raise ValueError(
                f"{text!r}: {ast.unparse(node)!r} is not read; use numbers, names, + - * / ^, parentheses, "
                f"{', '.join(_FUNCTIONS)}."
            )


def _value(node: ast.AST, columns: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=int() | float() as value):
            return np.float64(value)
        case ast.Name(id=name):
            return np.asarray(columns[name], np.float64)
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)](_value(left, columns), _value(right, columns))
        case ast.UnaryOp(op=op, operand=operand):
            return _OPERATORS[type(op)](_value(operand, columns))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return _FUNCTIONS[name][0](*(_value(argument, columns) for argument in arguments))
    raise AssertionError("checked by parse")
