"""The memory of transitions: what followed the latest events in other histories, as logits beside the towers'.

Counting alone ranks above many trained models where histories are short. Here the counts are a frozen table, a few
successors an item, and what they are worth is learned together with the encoder, which is left to learn what counting
cannot. An event that is being predicted is counted out of the rows that it went into: else training would trust the
counts more than serving can.

B = packed rows, L = positions, W = window, K = successors, E = encoder width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxrec.core.sparse_logits import MixedLogits, SparseLogits
from jaxrec.nn.layers import parameter

SUCCESSORS, COUNTS = "successors", "counts"  # the arrays of the memory, by name
SHRINKAGE, LIFT, WEIGHT = 50.0, 200.0, 0.3  # where the learned weights start


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransitionMemory:
    """What is kept of the training events, and how far it reaches.

    Attributes:
      num_successors: kept of each item, the most frequent ones.
      window: events over which a transition is counted, and latest events whose successors are asked.
      decay: weight of a gap between two events, relative to the gap before.
    """

    num_successors: int = 64
    window: int = 10
    decay: float = 0.7

    def __post_init__(self) -> None:
        if self.num_successors < 1 or self.window < 1 or not 0.0 < self.decay <= 1.0:
            raise ValueError(
                f"memory.num_successors={self.num_successors}, window={self.window}, decay={self.decay}: say "
                "num_successors >= 1, window >= 1 and 0 < decay <= 1."
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MemoryRows:
    """The memory's rows of some events.

    Attributes:
      event_ids: the items of the events; 0 = no such event.
      item_ids: their successors; 0 = none.
      counts: of the successors, and of the whole row in the last place.
    """

    event_ids: Int[Array, "*e"]
    item_ids: Int[Array, "*e K"]
    counts: Float[Array, "*e K_plus_1"]


class MemoryHead(nnx.Module):
    """What the counts are worth: a weight for each age of an event, a gate by the query, and how counts become rates.

    The logit that item y gets is `g(x) sum over ages a of w_a log(1 + lift C_iy / (C_i + shrinkage))`, where i is the
    item of the event of age a. All its weights are learned.
    """

    def __init__(self, config: TransitionMemory, width: int):
        self.config = config
        ages = jnp.arange(config.window, dtype=jnp.float32)
        self.log_weights = parameter(math.log(WEIGHT) + ages * math.log(config.decay), None)
        self.log_shrinkage = parameter(jnp.float32(math.log(SHRINKAGE)))
        self.log_lift = parameter(jnp.float32(math.log(LIFT)))
        self.gate = parameter(jnp.zeros(width, jnp.float32), "embed")

    def __call__(self, states: Float[Array, "*t E"], rows: MemoryRows) -> SparseLogits:
        """The logits of the successors of each query's latest events.

        Args:
          states: M(x) of the queries; their gate starts at 1.
          rows: of the latest `window` events of each query, `[*t, W]`, newest first.
        """
        values = self._evidence(rows.counts[..., :-1], rows.counts[..., -1:])
        values = values * self._weights()[:, None] * self._gate(states)[..., None, None]
        flat = (*values.shape[:-2], values.shape[-2] * values.shape[-1])
        return SparseLogits(rows.item_ids.reshape(flat), values.reshape(flat))

    def of_histories(
        self,
        states: Float[Array, "B L E"],
        rows: MemoryRows,
        segment_ids: Int[Array, "B L"],
        target_ids: Int[Array, "B L"],
    ) -> MixedLogits:
        """The same at every event of whole histories, the targets counted out.

        Args:
          rows: of the events, `[B, L]`.
          segment_ids: 1, 2, ... inside a row, 0 = padding: histories that must not see each other.
          target_ids: the item of the event after each, which the rows have counted; 0 = none.
        """
        length, counts, totals = segment_ids.shape[1], rows.counts[..., :-1], rows.counts[..., -1]

        def aged(x: jax.Array, age: int) -> jax.Array:
            return jnp.pad(x, ((0, 0), (age, 0), *((0, 0) for _ in x.shape[2:])))[:, :length]

        sames = [
            (aged(segment_ids, age) == segment_ids) & (segment_ids > 0) for age in range(self.config.window)
        ]
        there = jnp.stack(sames, -1)
        latest = jnp.where(there, jnp.stack([aged(rows.event_ids, age) for age in range(len(sames))], -1), 0)
        own = self._counted(latest, target_ids)
        mixing = jnp.where(there, self._weights() * self._gate(states)[..., None], 0.0)
        at_target = jnp.zeros(segment_ids.shape, jnp.float32)
        for age in range(len(sames)):
            # A target that is among the successors of this event: what it should get, less what it gets.
            named = aged(rows.item_ids, age) == target_ids[..., None]
            count, total = jnp.sum(jnp.where(named, aged(counts, age), 0.0), -1), aged(totals, age)
            left = jnp.maximum(count - own[..., age], 0.0), jnp.maximum(total - own[..., age], 0.0)
            change = self._evidence(*left) - self._evidence(count, total)
            at_target += mixing[..., age] * jnp.where((count > 0) & (target_ids > 0), change, 0.0)
        return MixedLogits.of_events(
            rows.item_ids, self._evidence(counts, totals[..., None]), mixing, at_target
        )

    def _evidence(self, counts: Float[Array, "*e"], totals: Float[Array, "*e"]) -> Float[Array, "*e"]:
        rates = counts / (totals + jnp.exp(self.log_shrinkage[...]))
        return jnp.log1p(jnp.exp(self.log_lift[...]) * rates)

    def _weights(self) -> Float[Array, " W"]:
        return jnp.exp(self.log_weights[...])

    def _gate(self, states: Float[Array, "*t E"]) -> Float[Array, "*t"]:
        return 2.0 * jax.nn.sigmoid(states.astype(jnp.float32) @ self.gate[...])

    def _counted(self, event_ids: Int[Array, "*t W"], target_ids: Int[Array, "*t"]) -> Float[Array, "*t W"]:
        """What the target's event has added to the rows of these items; an item may be there more than once."""
        share = self.config.decay ** jnp.arange(self.config.window, dtype=jnp.float32)
        same = event_ids[..., :, None] == event_ids[..., None, :]
        return jnp.where(target_ids[..., None] > 0, same.astype(jnp.float32) @ share, 0.0)
