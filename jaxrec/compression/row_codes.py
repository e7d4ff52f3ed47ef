"""Rows as whole numbers of 8 or 4 bits with a scale for each group of entries, symmetric about zero.

Scales are rounded up to float16, so that no entry of a group lies outside of what its numbers reach. With 4 bits a
smaller scale often fits a group better: its largest entries are cut off, and all others are told apart more finely.

Source: Guan et al., arXiv 2019 (rows of embedding tables in 4 bits, scales chosen by the squared error). Theirs are
asymmetric; ours keep zero at zero, which is the row of padding.

R = rows, D = entries of a row, G = groups of a row.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

CUTS = tuple(
    np.linspace(0.6, 1.0, 9).tolist()
)  # of the scale that reaches the largest entry; tried with 4 bits
LARGEST_SCALE = 65504.0  # of a float16


def encode_rows(
    rows: Float[np.ndarray, "R D"], *, bits: int, group: int
) -> tuple[np.ndarray, Float[np.ndarray, "R G"]]:
    """The whole numbers, two in a byte where they have 4 bits, and the float16 scales.

    Args:
      bits: 8 = numbers in -127 .. 127, entries off by at most half a scale; 4 = in -7 .. 7, the scale of a group being
        the one of the least squared error.
      group: entries that share a scale.

    Raises:
      ValueError: an entry is not finite or too large, or `bits` or `group` is out of range.
    """
    if bits not in (4, 8) or group < 1:
        raise ValueError(f"bits={bits}, group={group}: say 4 or 8 bits, and at least 1 entry a group.")
    most = 127 if bits == 8 else 7
    if not np.isfinite(rows).all():
        raise ValueError("an entry is NaN or infinite: the run diverged; compress an older checkpoint.")
    num_rows, width = rows.shape
    groups = -(-width // group)
    cells = np.pad(rows, ((0, 0), (0, groups * group - width))).reshape(num_rows, groups, group)
    reach = np.abs(cells).max(axis=-1, initial=0.0) / most
    if (largest := reach.max(initial=0.0)) > LARGEST_SCALE:
        raise ValueError(
            f"an entry of {largest * most:.3g} is past what a float16 scale reaches ({LARGEST_SCALE * most:.3g}); "
            "compress an older checkpoint, or leave the array as it is."
        )
    scales = _half_above(reach)
    numbers = _numbers(cells, scales, most)
    for cut in CUTS[:-1] if bits == 4 else ():
        narrower = _half_above(reach * np.float32(cut))
        tried = _numbers(cells, narrower, most)
        better = _squared_error(cells, tried, narrower) < _squared_error(cells, numbers, scales)
        scales = np.where(better, narrower, scales)
        numbers = np.where(better[..., None], tried, numbers)
    flat = numbers.reshape(num_rows, groups * group)[:, :width]
    return (flat if bits == 8 else pack_nibbles(flat)), scales


def pack_nibbles(numbers: Int[np.ndarray, "R D"]) -> UInt8[np.ndarray, "R P"]:
    """Two numbers of -8 .. 7 in a byte, the first in the low half; an odd row ends with an empty half."""
    padded = np.pad(numbers, ((0, 0), (0, numbers.shape[1] % 2))).astype(np.uint8) & 15
    return padded[:, ::2] | (padded[:, 1::2] << 4)


def unpack_nibbles(packed: UInt8[Array, "R P"], width: int) -> Int[Array, "R D"]:
    """Inverse of `pack_nibbles`."""
    halves = jnp.concatenate([(packed & 15)[:, :, None], (packed >> 4)[:, :, None]], axis=2)
    numbers = halves.reshape(packed.shape[0], -1)[:, :width].astype(jnp.int32)
    return jnp.where(numbers > 7, numbers - 16, numbers)  # the fourth bit is the sign's


def packed_width(width: int) -> int:
    """Bytes of a row of 4-bit numbers."""
    return -(-width // 2)


def _half_above(scales: Float[np.ndarray, "R G"]) -> Float[np.ndarray, "R G"]:
    """The smallest float16 that is not below."""
    near = scales.astype(np.float16)
    with np.errstate(over="ignore"):
        above = np.nextafter(near, np.float16(np.inf))
    return np.minimum(np.where(near < scales, above, near), np.float16(LARGEST_SCALE))


def _numbers(cells: np.ndarray, scales: np.ndarray, most: int) -> np.ndarray:
    safe = np.where(scales > 0, scales, 1).astype(np.float32)[..., None]
    return np.clip(np.rint(cells / safe), -most, most).astype(np.int8)


def _squared_error(cells: np.ndarray, numbers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.sum(np.square(cells - numbers * scales.astype(np.float32)[..., None]), axis=-1)
