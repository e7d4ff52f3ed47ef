"""Masked item: hide some events of a history and predict them from both sides (BERT4Rec).

B = packed rows, L = positions, M = masked positions a row (a static bound), D = item dim.

Source: Sun et al., CIKM 2019; the 80/10/10 replacement is BERT's (Devlin et al., NAACL 2019).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxrec.core.batch import Batch
from jaxrec.core.hashing import hashed_bits, hashed_uniform
from jaxrec.models.two_tower import ITEM
from jaxrec.tasks.base import DataFacts, Forward, Plan, TaskLoss
from jaxrec.tasks.ranking import QueryMode, RankingTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedItem(RankingTask):
    """Predicts hidden events.

    Attributes:
      mask_rate: chance of an event to be hidden.
      last_item_rate: chance of a history to hide its last event and nothing else, which is what serving asks.
      keep_rate, replace_rate: of the hidden events, how many show their own item or a random one instead of the
        mask vector.
    """

    mask_rate: float = 0.2
    last_item_rate: float = 0.1
    keep_rate: float = 0.1
    replace_rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mask_rate", "last_item_rate", "keep_rate", "replace_rate"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"MaskedItem.{name}={getattr(self, name)} must lie in [0, 1].")
        if not self.mask_rate and not self.last_item_rate:
            raise ValueError(
                "MaskedItem.mask_rate=0.0 and last_item_rate=0.0 hide nothing; raise one of them."
            )
        if self.keep_rate + self.replace_rate > 1.0:
            raise ValueError(
                f"MaskedItem.keep_rate={self.keep_rate} + replace_rate={self.replace_rate} must not exceed 1."
            )

    @property
    def query_mode(self) -> QueryMode:
        """A mask is put after the last event, and its state asks."""
        return "masked"

    def scored_pairs(self, batch_rows: int, length: int, num_items: int) -> float:
        """The hidden positions' places against the candidates."""
        queries = batch_rows * self.bound(length)
        return float(queries) * self.candidates.size(num_items, queries)

    def plan(self, batch: Batch, facts: DataFacts, key: jax.Array) -> Plan:
        """Chooses what is hidden, at most M positions a row, so that the softmax sees those alone."""
        shape = batch.item_ids.shape
        hide = self._hidden(batch, key)
        # Positions that are hidden come first, in a random order, so that the bound M is fair where it binds.
        order = hashed_uniform(jax.random.fold_in(key, 2), shape)
        bound = self.bound(shape[1])
        priority, columns = jax.lax.top_k(jnp.where(hide, 1.0 + order, 0.0), bound)
        weights = (priority > 0).astype(jnp.float32)
        hidden = jnp.zeros(shape, bool).at[jnp.arange(shape[0])[:, None], columns].set(priority > 0)

        fate = hashed_uniform(jax.random.fold_in(key, 3), shape)
        random_ids = 1 + (
            hashed_bits(jax.random.fold_in(key, 4), shape) % jnp.uint32(facts.num_items)
        ).astype(jnp.int32)
        replaced = hidden & (fate < self.replace_rate)
        masked = hidden & (fate >= self.replace_rate + self.keep_rate)
        targets = jnp.where(weights > 0, jnp.take_along_axis(jnp.asarray(batch.item_ids), columns, 1), 0)
        plan = self.candidates.plan(targets, weights, facts, jax.random.fold_in(key, 5))
        lookups = {**plan.lookups, "shown": jnp.where(replaced, random_ids, batch.item_ids)}
        arrays = {**plan.arrays, "masked": masked, "columns": columns}
        return Plan(plan.weight, lookups, plan.shared_lookups, arrays)

    def bound(self, length: int) -> int:
        """M: room for the expected number of hidden events and four standard deviations.

        Histories that hide their last event alone have two events at least, so that at most half of the row is hidden
        so.
        """
        rate = max(self.mask_rate, self.last_item_rate / 2)
        expected = rate * length
        spread = 4 * math.sqrt(length * rate * (1 - rate))
        return max(1, min(length, math.ceil(expected + spread)))

    def _hidden(self, batch: Batch, key: jax.Array) -> Bool[Array, "B L"]:
        segments = jnp.asarray(batch.segment_ids)
        # One draw a history: every event of a segment reads the draw at its segment's number.
        draws = hashed_uniform(key, segments.shape)
        only_last = jnp.take_along_axis(draws, segments, 1) < self.last_item_rate
        chance = hashed_uniform(jax.random.fold_in(key, 1), segments.shape) < self.mask_rate
        return (segments > 0) & jnp.where(only_last, batch.last_mask, chance)

    def loss(self, forward: Forward, plan: Plan, key: jax.Array) -> TaskLoss:
        """Softmax over the candidates at the hidden positions only."""
        states = forward.encode(
            forward.rows[ITEM]["shown"], causal=False, key=key, masked=plan.arrays["masked"],
            last_positions=plan.arrays["columns"],
        )  # fmt: skip
        queries = forward.model.queries(states) / self.temperature
        return TaskLoss(self.candidates.loss(queries, forward, plan))
