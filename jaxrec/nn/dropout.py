"""Dropout whose mask depends on (key, global position) alone, so that a mesh changes nothing.

Under `jax.jit` the position is counted over the global array (see `core.hashing`).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrec.core.hashing import hashed_bits, hashed_rows


def dropout(
    x: Float[Array, "*dims"],
    rate: float,
    key: jax.Array | None,
    *,
    whole: tuple[int, ...] | None = None,
    starts: Sequence[int | jax.Array] = (),
) -> Float[Array, "*dims"]:
    """Zeroes entries with probability `rate` and scales the rest by 1/(1-rate).

    Args:
      rate: in [0, 1).
      key: a `jax.random.key`; None = evaluation, returns `x` itself.
      whole: `x` is a part of an array of this shape, and drops what the whole array would drop there; None = all.
      starts: where the part begins along each dim but the first; of the first it has all.
    """
    if key is None or rate == 0.0:
        return x
    threshold = np.uint32(min(round(rate * 2**32), 2**32 - 1))
    if whole is None:
        bits = hashed_bits(key, x.shape)
    else:
        rows = jnp.arange(x.shape[0], dtype=jnp.uint32)
        bits = hashed_rows(key, rows, whole[1:], part=(starts, x.shape[1:]))
    keep = bits >= threshold
    return jnp.where(keep, x * jnp.asarray(1.0 / (1.0 - rate), x.dtype), jnp.zeros((), x.dtype))
