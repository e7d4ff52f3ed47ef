"""What the losses over a catalogue share whose rows lie over every device: chunks of tokens, sums over the devices.

All but `scaled` are for the inside of `shard_map`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrec.core.mesh import ALL_AXES

# Logits of one chunk on one device: 1.5 M floats = 6 MB, what stays near a core's cache.
CHUNK_LOGITS = 1_500_000


def chunks(arrays: Any, size: int) -> tuple[Any, Callable[[Any], Any]]:
    """Cuts arrays along their first dim into equal chunks of at most `size`, at least 1, padded with zeros.

    Returns:
      The arrays, `[chunks, size, ...]`, and the function that puts such arrays together again.
    """
    length = len(jax.tree.leaves(arrays)[0])
    num_chunks = max(1, -(-length // max(1, min(length, size))))
    size = -(-length // num_chunks)
    pad = num_chunks * size - length
    cut = lambda x: jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)).reshape(num_chunks, size, *x.shape[1:])  # noqa: E731
    join = lambda x: jax.lax.collapse(x, 0, 2)[:length]  # noqa: E731
    return jax.tree.map(cut, arrays), functools.partial(jax.tree.map, join)


def scaled(gradients: tuple[jax.Array, ...], cotangent: Float[Array, ""]) -> list[jax.Array]:
    """Gradients that the forward pass has formed, times what comes from above, in their dtypes."""
    return [(gradient * cotangent).astype(gradient.dtype) for gradient in gradients]


def masked(weight: Float[Array, "*t"], value: Float[Array, "*t"]) -> Float[Array, "*t"]:
    """Their product. A token of weight 0 may have an infinite value (its target is padding): 0 * inf would be NaN."""
    return jnp.where(weight > 0, weight * value, 0.0)


def sum_of_all(x: Float[Array, "*t"]) -> Float[Array, "*t"]:
    """Over the devices."""
    return jax.lax.psum(x, ALL_AXES)


def max_of_all(x: Float[Array, "*t"]) -> Float[Array, "*t"]:
    """Over the devices."""
    return jax.lax.pmax(x, ALL_AXES)
