"""Checks the shapes that `jaxrec`'s signatures declare, while the tests run (`make test` turns it on).

Only array annotations are checked: what a user may get wrong in a config is answered by the config's own errors,
and a type checker that spoke first would hide them.
"""

import typing
from collections.abc import Callable

import beartype
import jaxtyping


def is_array(annotation: object) -> bool:
    """Whether an annotation is a jaxtyping array, alone or in a union such as `Float[Array, "b"] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(is_array(part) for part in typing.get_args(annotation))


def check_shapes(function: Callable) -> Callable:
    """Checks the array arguments and results of a function; leaves all others alone.

    The fields of a dataclass are left alone too: as a pytree it is rebuilt inside `scan` and `vmap`, where its
    leaves carry one dim more.
    """
    if not isinstance(function, type) and function.__name__ != "__init__":
        arrays = {name: hint for name, hint in function.__annotations__.items() if is_array(hint)}
        if arrays:
            function.__annotations__ = arrays
            return beartype.beartype(function)
    return function
