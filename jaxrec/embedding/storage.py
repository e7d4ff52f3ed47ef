"""How rows are kept: bfloat16 with stochastic rounding for training, int8 with a scale a row for frozen tables.

R = rows, D = embed dim.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Int8, UInt32


def round_stochastically(values: Float[Array, "r D"], bits: UInt32[Array, "r D"]) -> BFloat16[Array, "r D"]:
    """float32 to bfloat16, up or down with the probabilities that keep the mean; NaN and infinities stay.

    Nearest rounding loses every update smaller than 2^-9 of its row entry; this keeps them on average.

    Args:
      bits: uniform; the low 16 are used.
    """
    words = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    up = (words + (bits & np.uint32(0xFFFF))) & np.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(up, jnp.float32)
    # A carry past the largest exponent would turn a finite number into infinity.
    safe = jnp.isfinite(values) & jnp.isfinite(rounded)
    return jnp.where(safe, rounded, values).astype(jnp.bfloat16)


def quantize_rows(rows: Float[Array, "R D"]) -> dict[str, Int8[Array, "R D"] | Float[Array, "R 1"]]:
    """int8 rows and one float32 scale a row: a table that `engine.look_up` takes as two tables of the same ids."""
    scale = jnp.max(jnp.abs(rows), -1, keepdims=True).astype(jnp.float32) / 127
    safe = jnp.where(scale > 0, scale, 1.0)
    return {"values": jnp.round(rows / safe).astype(jnp.int8), "scale": scale}


def dequantize_rows(table: dict[str, Array]) -> Float[Array, "*b D"]:
    """Float32 rows, off by at most half a scale in each entry."""
    return table["values"].astype(jnp.float32) * table["scale"]
