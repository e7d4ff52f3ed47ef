"""The smallest layers: a parameter with its logical axes, a dense map, layer normalisation.

D = features in, F = features out. Parameters are float32; a layer computes in the dtype of its input.
Both layers bring their own backward pass: the automatic one copies wide arrays to transpose them, and keeps
more of them, which cost a quarter of a training step on a CPU.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxrec.core import partition
from jaxrec.core.precision import ActivationDtype
from jaxrec.nn.integer_products import Products, integer_product, products_in_use


def parameter(value: jax.Array, *names: str | None) -> nnx.Param:
    """A parameter that carries the logical `names` of its dims.

    They are a plain note: the train state places the arrays in one go, by the layout of the run, and a model may
    also be built where no mesh is set.

    Raises:
      ValueError: an unknown name, or not one name for each dim.
    """
    if len(names) != value.ndim:
        raise ValueError(
            f"{len(names)} axis names {names} for a parameter of shape {value.shape}; name every dim."
        )
    partition.spec(*names)  # an unknown name is an error here, beside the parameter
    return nnx.Param(value, logical_axes=names)


def parameter_shardings(state: nnx.State, mesh: Mesh, layout: partition.Layout = "replicated") -> nnx.State:
    """Where each parameter of `state` lies, by the logical axes that it bears.

    Raises:
      ValueError: a dim does not divide over the mesh axis that the layout gives it.
    """

    def place(path: Any, variable: nnx.Variable) -> NamedSharding:
        where = NamedSharding(mesh, partition.spec(*variable.get_metadata()["logical_axes"], layout=layout))
        try:
            where.shard_shape(variable.shape)
        except ValueError as error:
            raise ValueError(
                f"layout={layout!r}: parameter {jax.tree_util.keystr(path)} of shape {variable.shape} does not "
                f"divide over {where.spec} of the mesh {dict(mesh.shape)}; change mesh_shape or the layout."
            ) from error
        return where

    return jax.tree_util.tree_map_with_path(place, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def whole_parameters(
    dense: Any, state: nnx.State, layout: partition.Layout, gather_dtype: ActivationDtype
) -> Any:
    """The parameters as a step computes with them: under "fsdp" whole on every device, gathered here, once.

    Their gradients are summed over the devices and split again on the way back. Left to itself the compiler gathers
    activations instead, which are larger.

    Args:
      dense: arrays of `state` as a nested dict.
      state: tells the logical axes.
      gather_dtype: of the kernels of the encoder's blocks and of their gradients on the way.
    """
    if layout == "tensor":
        return dense

    def gather(path: Any, variable: nnx.Variable, value: jax.Array) -> jax.Array:
        names = [str(getattr(part, "key", getattr(part, "name", ""))) for part in path]
        travels = gather_dtype if "blocks" in names and "kernel" in names[-1] else "float32"
        where = partition.spec(*variable.get_metadata()["logical_axes"], layout=layout)
        if travels == "float32" and not any(where):
            return value
        return _whole(where, travels, value)

    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    paths, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_variable)
    values = jax.tree.leaves(dense)
    whole = [gather(path, variable, value) for (path, variable), value in zip(paths, values, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(dense), whole)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _whole(where: PartitionSpec, dtype: str, value: jax.Array) -> jax.Array:
    # The barrier keeps the compiler from gathering first and rounding afterwards.
    narrow = jax.lax.with_sharding_constraint(value.astype(dtype), where)
    return jax.lax.with_sharding_constraint(jax.lax.optimization_barrier(narrow), PartitionSpec())


def _whole_forward(where: PartitionSpec, dtype: str, value: jax.Array) -> tuple[jax.Array, None]:
    return _whole(where, dtype, value), None


def _whole_backward(where: PartitionSpec, dtype: str, residuals: None, g: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(g, where).astype(jnp.float32),)


_whole.defvjp(_whole_forward, _whole_backward)


def glorot_normal(key: jax.Array, shape: Sequence[int], fan_in: int, fan_out: int) -> jax.Array:
    """Normal with variance 2 / (fan_in + fan_out).

    Source: Glorot and Bengio, AISTATS 2010 (keep the variance of activations and of gradients). The fans are
    arguments because a fused kernel's shape does not show them.
    """
    return math.sqrt(2.0 / (fan_in + fan_out)) * jax.random.normal(key, tuple(shape), jnp.float32)


def unit_vectors(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Vectors of length 1, worked out in float32; zeros stay zeros, with finite gradients."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.sum(jnp.square(wide), -1, keepdims=True) + 1e-12)).astype(x.dtype)


class Dense(nnx.Module):
    """`[..., D] -> [..., F]`: x W + b."""

    def __init__(self, in_dim: int, out_dim: int, names: tuple[str | None, str | None], *, rngs: nnx.Rngs):
        kernel = glorot_normal(rngs.params(), (in_dim, out_dim), in_dim, out_dim)
        self.kernel = parameter(kernel, *names)
        self.bias = parameter(jnp.zeros((out_dim,), jnp.float32), names[1])

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b f"]:
        return affine(x, self.kernel[...], self.bias[...])


class LayerNorm(nnx.Module):
    """Layer normalisation over the last dim, with float32 statistics whatever the input's dtype."""

    def __init__(self, dim: int, epsilon: float):
        self.epsilon = epsilon
        self.scale = parameter(jnp.ones((dim,), jnp.float32), "embed")
        self.bias = parameter(jnp.zeros((dim,), jnp.float32), "embed")

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return normalize(x, self.scale[...], self.bias[...], self.epsilon)


def affine(
    x: Float[Array, "*b d"], kernel: Float[Array, "d f"], bias: Float[Array, " f"]
) -> Float[Array, "*b f"]:
    """X W + b in the dtype of x; by whole numbers where `integer_products` are in use."""
    return _affine(products_in_use(), x, kernel, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _affine(products: Products, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    flat = x.reshape(-1, x.shape[-1])
    y = integer_product(flat, kernel) if products == "int8" else flat @ kernel.astype(x.dtype)
    y = y + bias.astype(x.dtype)
    return y.reshape(*x.shape[:-1], kernel.shape[1])


def _affine_forward(
    products: Products, x: jax.Array, kernel: jax.Array, bias: jax.Array
) -> tuple[jax.Array, tuple]:
    return _affine(products, x, kernel, bias), (x, kernel)


def _affine_backward(
    products: Products, residuals: tuple, g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    del products  # the gradient goes straight through the rounding
    x, kernel = residuals
    flat, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    # Summed in float32 and given in the kernel's dtype, which is what crosses the network.
    product = functools.partial(jnp.einsum, "na,nb->ab", preferred_element_type=kernel.dtype)
    if flat.shape[1] <= g.shape[1]:
        d_kernel = product(flat, g)
    else:
        # The left operand of a product over rows is copied to be transposed, so the narrower one goes left;
        # without the barrier the compiler would swap them back.
        d_kernel = jax.lax.optimization_barrier(product(g, flat)).T
    d_x = (g @ kernel.astype(g.dtype).T).reshape(x.shape)
    return d_x, d_kernel, jnp.sum(g, axis=0, dtype=jnp.float32)


_affine.defvjp(_affine_forward, _affine_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(
    x: Float[Array, "*b d"], scale: Float[Array, " d"], bias: Float[Array, " d"], epsilon: float
) -> Float[Array, "*b d"]:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last dim.

    Source: Ba, Kiros and Hinton, arXiv 2016.
    """
    return _normalize_forward(x, scale, bias, epsilon)[0]


def _normalize_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, tuple]:
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)
    normal = centred * inverse
    return (normal * scale + bias).astype(x.dtype), (normal.astype(x.dtype), inverse, scale)


def _normalize_backward(
    epsilon: float, residuals: tuple, g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    del epsilon  # it is inside `inverse`
    normal, inverse, scale = residuals
    dtype, g, normal = g.dtype, g.astype(jnp.float32), normal.astype(jnp.float32)
    lead = tuple(range(g.ndim - 1))
    d_normal = g * scale
    along = jnp.mean(d_normal * normal, axis=-1, keepdims=True)
    d_x = inverse * (d_normal - jnp.mean(d_normal, axis=-1, keepdims=True) - normal * along)
    return d_x.astype(dtype), jnp.sum(g * normal, axis=lead), jnp.sum(g, axis=lead)


normalize.defvjp(_normalize_forward, _normalize_backward)
