"""Programs of bundles, compiled: once for each size, however many bundles hold the same program.

A server that takes a version of the same model into use has nothing to compile: weights are arguments of a program.
"""

import functools
import hashlib
import weakref
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Generic, TypeVar

import jax
import numpy as np

__all__ = ["Arrays", "Compiled", "Program", "Shared"]

Arrays = Mapping[str, np.ndarray]
T = TypeVar("T")


class Shared(Generic[T]):
    """What is made of the same content is one object, as long as somebody holds it."""

    def __init__(self) -> None:
        self._held: weakref.WeakValueDictionary[bytes, T] = weakref.WeakValueDictionary()

    def of(self, content: bytes, make: Callable[[], T]) -> T:
        """The object of this content, made where nobody holds it."""
        digest = hashlib.sha256(content).digest()
        found = self._held.get(digest)
        if found is None:
            found = self._held[digest] = make()
        return found


class Compiled:
    """A program without weights; made by `of`.

    Attributes:
      call: of weights and inputs, compiled for each size.
      shapes: that it was warmed up with.
    """

    def __init__(self, program: bytes):
        self.call = jax.jit(jax.export.deserialize(bytearray(program)).call)
        self.shapes: set[tuple] = set()

    @classmethod
    def of(cls, program: bytes) -> "Compiled":
        """The program that a file holds."""
        return _COMPILED.of(program, lambda: cls(program))


_COMPILED: Shared[Compiled] = Shared()


class Program:
    """A program with its weights on the device: arrays by name in, arrays by name out; made by `Bundle.program`.

    Args:
      any_size: reads the program that takes every size.
      sized: programs that take inputs of just one size, by that of the histories and, where there are, candidates.
    """

    def __init__(
        self,
        any_size: Callable[[], Compiled],
        weights: Mapping[str, jax.Array],
        sized: Mapping[tuple[int, ...], Compiled] = MappingProxyType({}),
    ):
        self._any_size, self._weights, self._sized = functools.cache(any_size), weights, sized
        # Read when a size is asked that has no program of its own, which a server never does; else now, while the
        # files are there: of many versions the old ones may be removed.
        if not sized:
            self._any_size()

    def __call__(self, inputs: Arrays) -> dict[str, jax.Array]:
        """Compiles where inputs of these shapes are new."""
        return self._of(inputs).call(self._weights, dict(inputs))

    def warm_up(self, inputs: Arrays) -> None:
        """Compiles for inputs of these shapes and runs once, unless it has, for this bundle or for another one."""
        compiled = self._of(inputs)
        shapes = tuple((name, array.shape, str(array.dtype)) for name, array in sorted(inputs.items()))
        if shapes not in compiled.shapes:
            jax.block_until_ready(self(inputs))
            compiled.shapes.add(shapes)

    def _of(self, inputs: Arrays) -> Compiled:
        """The program of just this size, where there is one."""
        if not self._sized:
            return self._any_size()
        candidates = inputs["candidate_ids"].shape[1:] if "candidate_ids" in inputs else ()
        found = self._sized.get((*inputs["item_ids"].shape, *candidates))
        return self._any_size() if found is None else found
