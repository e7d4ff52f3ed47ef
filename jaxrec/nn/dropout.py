"""Dropout whose mask depends on (key, global position) alone, so that a mesh changes nothing.

Under `jax.jit` the position is counted over the global array (see `core.hashing`).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrec.core.hashing import hashed_bits


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
