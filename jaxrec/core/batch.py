"""The batch: packed histories.

B = packed rows of the global batch, L = positions in a row, K = behaviours.
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Bool, Int

Array = jax.Array | np.ndarray

# Buckets of the time since the event before: 0 unknown or first; 1 the same second; 1 + b a gap of b bits; the
# last takes the rest.
NUM_TIME_GAPS = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Histories packed into rows; `segment_ids` keeps them apart.

    Attributes:
      item_ids: catalogue ids, oldest first inside a segment; 0 = padding.
      user_ids: 1, 2, ...: whose event it is; 0 = padding, or a user whom the dataset does not know.
      segment_ids: 1, 2, ... inside a row; 0 = padding.
      positions: 0, 1, ... inside a segment.
      time_gaps: log2 bucket of the seconds since the segment's previous event; 0 = unknown or first.
      labels: behaviour labels: 1, 0, or -1 = unknown. Targets only; never a model input.
    """

    item_ids: Int[Array, "b l"]
    user_ids: Int[Array, "b l"]
    segment_ids: Int[Array, "b l"]
    positions: Int[Array, "b l"]
    time_gaps: Int[Array, "b l"]
    labels: Int[Array, "b l k"]

    @property
    def history_mask(self) -> Bool[Array, "b l"]:
        """True = real event."""
        return self.segment_ids > 0
