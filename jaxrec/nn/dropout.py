"""Dropout whose mask depends on (key, global position) alone, so that a mesh changes nothing.

Threefry draws cost 30 ns an entry on a CPU core, more than the layers that they mask. A mask needs no
cryptographic quality: a counter-based integer hash of (key, row, position in the row) fuses into the select, costs
a twentieth, and under `jax.jit` counts over the global array.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32


def dropout(x: Float[Array, "*dims"], rate: float, key: jax.Array | None) -> Float[Array, "*dims"]:
    """Zeroes entries with probability `rate` and scales the rest by 1/(1-rate).

    Args:
      rate: in [0, 1).
      key: a `jax.random.key`; None = evaluation, returns `x` itself.
    """
    if key is None or rate == 0.0:
        return x
    threshold = np.uint32(min(round(rate * 2**32), 2**32 - 1))
    keep = hashed_bits(key, x.shape) >= threshold
    return jnp.where(keep, x * jnp.asarray(1.0 / (1.0 - rate), x.dtype), jnp.zeros((), x.dtype))


def hashed_bits(key: jax.Array, shape: tuple[int, ...]) -> UInt32[Array, "*dims"]:
    """32 hashed bits an entry, a pure function of the key and of the entry's global position.

    The first dim is hashed apart from the others, so that positions never wrap below 2^32 entries a row.

    Source: lowbias32, C. Wellons, "Prospecting for hash functions", 2018 (the finalizer's constants).
    """
    words = jax.random.key_data(key).astype(jnp.uint32).reshape(-1)
    first, second = words[0], words[-1]
    rows = jax.lax.broadcasted_iota(jnp.uint32, (shape[0],) + (1,) * (len(shape) - 1), 0)
    row_seed = _mix(_mix(rows ^ first) + second)
    inner_shape = (1, *shape[1:])
    inner = jnp.zeros(inner_shape, jnp.uint32)
    stride = 1
    for dim in range(len(shape) - 1, 0, -1):
        inner += jax.lax.broadcasted_iota(jnp.uint32, inner_shape, dim) * np.uint32(stride)
        stride = stride * shape[dim] % 2**32
    return _mix(_mix(inner ^ row_seed) + row_seed)


def _mix(x: UInt32[Array, "*dims"]) -> UInt32[Array, "*dims"]:
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
