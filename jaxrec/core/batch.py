"""The batch: packed histories.

B = packed rows of the global batch, L = positions in a row, K = behaviours, F = context columns.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

Array = jax.Array | np.ndarray

# Buckets of the time since the event before: 0 unknown or first; 1 the same second; 1 + b a gap of b bits; the
# last takes the rest.
NUM_TIME_GAPS = 32
UNKNOWN_SECONDS = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueFacts:
    """What the numbers beside the training events are like.

    Attributes:
      name: their column.
      deviation: standard deviation.
    """

    name: str
    mean: float
    deviation: float


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
      times: seconds since the first moment of the segment that is known, 2^31 - 1 at most; -1 = unknown.
      labels: behaviour labels: 1, 0, or -1 = unknown. Never an input of the event's own prediction.
      values: the number beside each event (a rating, a count); NaN = unknown. Targets only.
      context: hashes of what is known of an event before its outcome, 0 = unknown; None = events have no context.
      domain_ids: 1, 2, ...: the domain of the event's user; 0 = padding. None = the dataset has one domain.
    """

    item_ids: Int[Array, "b l"]
    user_ids: Int[Array, "b l"]
    segment_ids: Int[Array, "b l"]
    positions: Int[Array, "b l"]
    time_gaps: Int[Array, "b l"]
    times: Int[Array, "b l"]
    labels: Int[Array, "b l k"]
    values: Float[Array, "b l"]
    context: Int[Array, "b l f"] | None = None
    domain_ids: Int[Array, "b l"] | None = None

    @property
    def history_mask(self) -> Bool[Array, "b l"]:
        """True = real event."""
        return self.segment_ids > 0

    @property
    def last_mask(self) -> Bool[Array, "b l"]:
        """True = the last event of its history in the row."""
        segments = jnp.asarray(self.segment_ids)
        return (segments > 0) & (jnp.pad(segments[:, 1:], ((0, 0), (0, 1))) != segments)


def abstract_batch(
    num_rows: int,
    length: int,
    num_behaviours: int,
    where: jax.sharding.Sharding | None = None,
    *,
    num_context: int = 0,
    has_domains: bool = False,
) -> Batch:
    """The shapes of a batch of `num_rows` packed rows of `length` positions."""
    integers = jax.ShapeDtypeStruct((num_rows, length), jnp.int32, sharding=where)
    labels = jax.ShapeDtypeStruct((num_rows, length, num_behaviours), jnp.int8, sharding=where)
    fields: dict[str, Any] = {field.name: integers for field in dataclasses.fields(Batch)}
    values = jax.ShapeDtypeStruct((num_rows, length), jnp.float32, sharding=where)
    context = jax.ShapeDtypeStruct((num_rows, length, num_context), jnp.int32, sharding=where)
    beside = {
        "labels": labels,
        "values": values,
        "context": context if num_context else None,
        "domain_ids": integers if has_domains else None,
    }
    return Batch(**(fields | beside))
