"""Products of whole numbers: activations and kernels as int8 in the place of floats, for the maps of an encoder.

A row of activations has one scale, worked out where the program runs, and each output of a kernel has one: a kernel
that was stored as int8 by output is encoded to the same numbers again. The gradient is that of the floats, so that a
run may also be trained so.

qwix, which intercepts the products of a model, cannot be used here: it sets the encoded kernel on the module from
inside of the product, and ours lies in a function with a derivative of its own, where NNX forbids that.

Source: Jacob et al., CVPR 2018 (products of whole numbers; gradients straight through the rounding).

D = features in, F = features out.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

Products = Literal["float", "int8"]

_products: contextvars.ContextVar[Products] = contextvars.ContextVar("products", default="float")


@contextlib.contextmanager
def use_products(kind: Products) -> Iterator[None]:
    """While a program is traced: what `layers.affine` multiplies.

    JAX keeps traced programs by their function and does not see this setting: a function must always be traced under
    the same one, as an encoder is by its config.
    """
    token = _products.set(kind)
    try:
        yield
    finally:
        _products.reset(token)


def products_in_use() -> Products:
    """What `use_products` has said last."""
    return _products.get()


def nearest_int8(x: Float[Array, "*b D"]) -> tuple[Int8[Array, "*b D"], Float[Array, "*b 1"]]:
    """Numbers in -127 .. 127 and a scale for each row."""
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32) / 127
    safe = jnp.where(scale > 0, scale, 1.0)
    return jnp.round(x / safe).astype(jnp.int8), scale


def integer_product(x: Float[Array, "n D"], kernel: Float[Array, "D F"]) -> Float[Array, "n F"]:
    """The product by whole numbers, summed in int32."""
    rows, row_scale = nearest_int8(x)
    outputs, output_scale = nearest_int8(kernel.T)
    total = jax.lax.dot_general(rows, outputs, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return (total.astype(jnp.float32) * row_scale * output_scale[:, 0]).astype(x.dtype)
