"""Dropout whose masks are a hash of (key, global position): the same on every mesh, and nearly free.

Threefry costs about ten times the multiplication that it guards (on a CPU it was a third of a training step);
a mask needs no cryptography. The hash is a chain of element-wise integer operations on an iota, so the
compiler fuses it into the loop that uses the mask, keeps no random bits in memory, and each shard computes its
own part from the global index.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

GOLDEN = 0x9E3779B1  # odd, so that multiplication by it is a bijection of 32-bit words


def dropout(x: Float[Array, "*dims"], rate: float, key: jax.Array | None) -> Float[Array, "*dims"]:
    """Zeroes entries with probability `rate` and scales the rest by 1/(1-rate); identity where `key` is None."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(keep_mask(key, x.shape, rate), x * (1.0 / (1.0 - rate)), jnp.zeros((), x.dtype))


def keep_mask(key: jax.Array, shape: tuple[int, ...], rate: float) -> Bool[Array, "*dims"]:
    """True with probability 1-rate (to 2**-32), independent for each position and each key."""
    return hashed_bits(key, shape) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def hashed_bits(key: jax.Array, shape: tuple[int, ...]) -> UInt32[Array, "*dims"]:
    """32 bits for each position of a global array, a function of (key, position) alone.

    The leading dims make a row number, which together with the key gives two words of state: where the row
    starts in the column hash, and an odd factor. The factor is there because of rows that start close to each
    other (of 2**14 rows some do): without it their masks would be shifted copies.
    """
    columns = shape[-1] if shape else 1
    rows = jnp.zeros((), jnp.uint32)
    for dim, size in enumerate(shape[:-1]):
        rows = rows * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, (*shape[:-1], 1), dim)
    words = jax.random.bits(key, (4,), jnp.uint32)
    first = mix(rows * jnp.uint32(GOLDEN) + words[0]) ^ words[1]
    second = mix(rows * jnp.uint32(GOLDEN) + words[2]) ^ words[3]
    column = jax.lax.broadcasted_iota(jnp.uint32, (*(1 for _ in shape[:-1]), columns), max(len(shape) - 1, 0))
    bits = mix(column * jnp.uint32(GOLDEN) + first) * (second | jnp.uint32(1))
    return bits.reshape(shape)


def mix(x: UInt32[Array, "*dims"]) -> UInt32[Array, "*dims"]:
    """A bijection of 32-bit words in which each input bit flips each output bit about half of the time.

    Source: Wellons, "Prospecting for hash functions", 2018 (xor-shift and multiply; these constants).
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
