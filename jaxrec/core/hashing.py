"""Counter-based hashing: 32 bits from a key and a position, the same on every mesh.

Threefry draws cost 30 ns an entry on a CPU core. Dropout masks, first rows and rounding need no cryptographic
quality: an integer hash of (key, row, position in the row) fuses into what uses it and costs a twentieth.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

# Starts, which may be traced and (`[r, 1 ...]`) differ between the rows, and sizes.
Part = tuple[Sequence[int | jax.Array], tuple[int, ...]]


def hashed_bits(key: jax.Array, shape: tuple[int, ...]) -> UInt32[Array, "*dims"]:
    """32 hashed bits an entry, a pure function of the key and of the entry's global position."""
    return hashed_rows(key, jnp.arange(shape[0], dtype=jnp.uint32), shape[1:])


def hashed_uniform(key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "*dims"]:
    """Uniform float32 in [0, 1) from 24 bits, a pure function as `hashed_bits`."""
    return (hashed_bits(key, shape) >> 8).astype(jnp.float32) * (1.0 / 2**24)


def hashed_rows(
    key: jax.Array,
    rows: UInt32[Array, "r"],
    shape: tuple[int, ...],
    *,
    part: Part | None = None,
) -> UInt32[Array, "r *dims"]:
    """32 hashed bits an entry, a pure function of the key, of the row's number and of the position in the row.

    Rows are hashed apart from the positions in them, so that positions never wrap below 2^32 entries a row.

    Args:
      shape: of a row.
      part: where to begin in a row and how many entries to take along each dim; None = the whole row.
    """
    starts, sizes = part or ((0,) * len(shape), shape)
    words = jax.random.key_data(key).astype(jnp.uint32).reshape(-1)
    first, second = words[0], words[-1]
    rows = rows.astype(jnp.uint32).reshape(-1, *(1,) * len(shape))
    row_seed = mixed(mixed(rows ^ first) + second)
    inner = jnp.zeros((1, *sizes), jnp.uint32)
    stride = 1
    for dim in reversed(range(len(shape))):
        place = jax.lax.broadcasted_iota(jnp.uint32, inner.shape, dim + 1) + jnp.uint32(starts[dim])
        inner += place * np.uint32(stride)
        stride = stride * shape[dim] % 2**32
    return mixed(mixed(inner ^ row_seed) + row_seed)


def hashed_normal(
    key: jax.Array, rows: UInt32[Array, "r"], shape: tuple[int, ...], *, part: Part | None = None
) -> Float[Array, "r *dims"]:
    """Standard normal float32 by the inverse error function, a pure function as `hashed_rows`; at most 5.2 sigma."""
    bits = hashed_rows(key, rows, shape, part=part)
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * 2**-22 - 1.0  # in (-1, 1), never the ends
    return jax.lax.erf_inv(uniform) * np.float32(2**0.5)


def mixed(x: UInt32[Array, "*dims"]) -> UInt32[Array, "*dims"]:
    """A bijection of 32 bits that spreads every input bit over the output.

    Source: lowbias32, C. Wellons, "Prospecting for hash functions", 2018 (the finalizer's constants).
    """
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
