"""64 bits of which each depends on all that were given: for hashes, and for numbers that no order of work changes."""

import numpy as np
from jaxtyping import UInt64

__all__ = ["ODD", "mixed"]

ODD = np.uint64(0x9E3779B97F4A7C15)


def mixed(bits: UInt64[np.ndarray, " e"]) -> UInt64[np.ndarray, " e"]:
    """Every bit of the result depends on every bit given.

    Source: Steele, Lea, Flood, OOPSLA 2014 (the finaliser of SplitMix64).
    """
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
