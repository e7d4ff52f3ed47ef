"""Next item: from a user's events up to now, the item of the next one (causal).

Source: Kang & McAuley, ICDM 2018 (the shifted objective), with the loss over the whole catalogue.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrec.core.batch import Batch
from jaxrec.tasks.base import DataFacts, Forward, Plan, TaskLoss, next_in_history
from jaxrec.tasks.candidates import FullSoftmax
from jaxrec.tasks.ranking import QueryMode, RankingTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextItem(RankingTask):
    """Predicts at every event the item of the event after it."""

    @property
    def query_mode(self) -> QueryMode:
        """The state of the last event asks for what follows it."""
        return "causal"

    @property
    def takes_memory(self) -> bool:
        """Where its candidates are the whole catalogue."""
        return isinstance(self.candidates, FullSoftmax)

    def scored_pairs(self, batch_rows: int, length: int, num_items: int) -> float:
        """Every position against the candidates."""
        return float(batch_rows * length) * self.candidates.size(num_items, batch_rows * length)

    def plan(self, batch: Batch, facts: DataFacts, key: jax.Array) -> Plan:
        """Targets are the ids one column to the right, where that column is of the same history."""
        target_ids, same = next_events(batch)
        return self.candidates.plan(target_ids, same, facts, key)

    def loss(self, forward: Forward, plan: Plan, key: jax.Array) -> TaskLoss:
        """Softmax over the candidates at every event that has a next one."""
        queries = forward.causal_queries / self.temperature
        mixed = forward.memory_logits(plan.arrays["target_ids"])
        if mixed is None:
            return TaskLoss(self.candidates.loss(queries, forward, plan))
        assert isinstance(self.candidates, FullSoftmax), "checked with the config"
        return TaskLoss(self.candidates.loss(queries, forward, plan, mixed))


def next_events(batch: Batch) -> tuple[Int[Array, "B L"], Float[Array, "B L"]]:
    """Each event's successor in its history, and 1.0 where there is one."""
    target_ids, same = next_in_history(batch, batch.item_ids)
    return target_ids, same.astype(jnp.float32)
