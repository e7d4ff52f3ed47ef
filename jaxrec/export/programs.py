"""The programs of a served model: what goes in and comes out of each, its weights, and its StableHLO.

Sizes are numbers or letters: b = users (or items, or texts), l = events of a history, c = candidates, x = items to
leave out. A letter stands for any size of at least 1, one and the same for all inputs of a call.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxrec.export.layout import ITEM_TOWER, USER_TOWER
from jaxrec.export.lowering import live_equations
from jaxrec.export.served_model import Inputs, Program, ServedModel, Weights
from jaxrec.export.weights import HostWeights, arrays_of, of_arrays

PLATFORMS = ("cpu", "cuda", "tpu")
LETTERS = "b, l, c, x"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Array:
    """What a program takes or gives.

    Attributes:
      dims: numbers and letters.
    """

    name: str
    dims: tuple[int | str, ...]
    dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramSpec:
    """One program.

    Attributes:
      weights: shapes of the arrays that it reads, by name (`weights.arrays_of`).
      function: of these arrays and of the inputs.
    """

    name: str
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...] = ()
    weights: Mapping[str, jax.ShapeDtypeStruct]
    function: Callable[[Mapping[str, jax.Array], Inputs], dict[str, jax.Array]]

    @functools.cached_property
    def jaxpr(self) -> core.ClosedJaxpr:
        """Its equations. The leaves of a dict are in the order of its keys, and the weights come first."""
        return jax.make_jaxpr(self.function)(*self.abstract())

    def stablehlo(self, platforms: Sequence[str] = PLATFORMS, **numbers: int) -> bytes:
        """The program as `jax.export.deserialize` reads it; called with a dict of weights and a dict of inputs.

        Args:
          numbers: in the place of letters; the other letters stay.
        """
        exported = jax.export.export(jax.jit(self.function), platforms=platforms)(*self.abstract(**numbers))
        return bytes(exported.serialize())

    def abstract(self, **numbers: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Shapes of weights and inputs, with numbers or symbolic sizes of one scope."""
        sizes = {str(size): size for size in jax.export.symbolic_shape(LETTERS)} | numbers
        inputs = {
            array.name: jax.ShapeDtypeStruct(
                tuple(sizes[dim] if isinstance(dim, str) else dim for dim in array.dims),
                jnp.dtype(array.dtype),
            )
            for array in self.inputs
        }
        return dict(self.weights), inputs


def programs_of(model: ServedModel, weights: Weights, k: int) -> dict[str, ProgramSpec]:
    """The programs that the model has.

    Args:
      k: length of the lists; a smaller catalogue gives shorter ones.
    """
    k = min(k, model.facts.num_items)
    functions: dict[str, tuple[Program, tuple[Array, ...]]] = {
        USER_TOWER: (model.user_tower, _history(model)),
        ITEM_TOWER: (model.item_tower, _items(model)),
        "recommend": (
            functools.partial(model.recommend, k=k),
            (*_history(model, recommends=True), _ids("exclude_ids", "b", "x")),
        ),
        "rank": (model.rank, (*_history(model), _ids("candidate_ids", "b", "c"))),
    }
    judged = (*_history(model), _ids("candidate_ids", "b", "c"))
    if model.config.context_rows:
        judged = (*judged, _ids("candidate_context", "b", "c", len(model.facts.context)))
    if model.outputs.num_behaviours:
        functions["behaviours"] = model.behaviours, judged
    if model.outputs.values:
        functions["values"] = model.values, judged
    if any(task.reads_queries for task in model.tasks.values()):
        functions["search"] = functools.partial(model.search, k=k), (_tokens(model),)
    return {name: _program(name, *parts, weights) for name, parts in functions.items()}


def used_arrays(programs: Mapping[str, ProgramSpec], weights: Weights) -> HostWeights:
    """The arrays that some program reads."""
    used = {name for program in programs.values() for name in program.weights}
    return {name: array for name, array in arrays_of(weights).items() if name in used}


def _program(name: str, function: Program, inputs: tuple[Array, ...], weights: Weights) -> ProgramSpec:
    @functools.wraps(function)
    def of_stored(arrays: Mapping[str, jax.Array], given: Inputs) -> dict[str, jax.Array]:
        return function(of_arrays(weights, arrays), given)

    arrays = arrays_of(weights)
    shapes = {key: jax.ShapeDtypeStruct(arrays[key].shape, arrays[key].dtype) for key in sorted(arrays)}
    everything = ProgramSpec(name=name, inputs=inputs, weights=shapes, function=of_stored)
    outputs = jax.eval_shape(of_stored, *everything.abstract())
    jaxpr = everything.jaxpr.jaxpr
    _, live = live_equations(jaxpr)
    read = [key for key, variable in zip(shapes, jaxpr.invars, strict=False) if variable in live]
    return dataclasses.replace(
        everything,
        weights={key: shapes[key] for key in read},
        outputs=tuple(
            Array(name=key, dims=tuple(_dim(size) for size in shape.shape), dtype=np.dtype(shape.dtype).name)
            for key, shape in sorted(outputs.items())
        ),
    )


def _dim(size: Any) -> int | str:
    return size if isinstance(size, int) else str(size)


def _ids(name: str, *dims: int | str) -> Array:
    return Array(name=name, dims=dims, dtype="int32")


def _history(model: ServedModel, *, recommends: bool = False) -> tuple[Array, ...]:
    """What the user tower reads, by the features of the model."""
    config, inputs = model.config, [_ids("item_ids", "b", "l")]
    if config.user_dim:
        inputs.append(_ids("user_ids", "b"))
    if config.time_gaps or config.encoder.time_bias:
        inputs.append(_ids("seconds", "b", "l"))
    if model.outputs.read_behaviours:
        inputs.append(_ids("labels", "b", "l", model.outputs.read_behaviours))
    if config.domain_adapters or (recommends and model.has_domains):
        inputs.append(_ids("domain_ids", "b"))
    return tuple(inputs)


def _items(model: ServedModel) -> tuple[Array, ...]:
    item_ids = _ids("item_ids", "b")
    return (item_ids,) if model.config.text is None else (item_ids, _tokens(model))


def _tokens(model: ServedModel) -> Array:
    return _ids("token_ids", "b", model.facts.num_text_tokens)
