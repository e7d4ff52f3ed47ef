"""Behaviour prediction: will this user click, like, buy this item? Multi-label binary cross-entropy.

The user is seen through the events before the one that is judged, and the item through its vector: the label of
an event enters no input. B = packed rows, L = positions, K = behaviours.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrec.core.batch import Batch
from jaxrec.losses.binary import binary_cross_entropy
from jaxrec.tasks.base import DataFacts, Forward, Plan, Task, TaskLoss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Behaviour(Task):
    """Predicts the behaviours of every event but the first of a history.

    Attributes:
      behaviours: names of those to learn; empty = all of the dataset.
    """

    behaviours: tuple[str, ...] = ()

    @property
    def needs_behaviour_head(self) -> bool:
        """One logit a behaviour of the dataset."""
        return True

    def check_data(self, facts: DataFacts) -> None:
        """Every behaviour asked for must be a column of the dataset."""
        if not facts.behaviours:
            raise ValueError(
                f"task {type(self).__name__} needs behaviour labels, and dataset {facts.name!r} has no such column "
                "(is_*, rating, behaviour, ...); declare one in the column map or remove the task."
            )
        missing = [name for name in self.behaviours if name not in facts.behaviours]
        if missing:
            raise ValueError(
                f"task {type(self).__name__} asks for behaviour {missing[0]!r}, and dataset {facts.name!r} has "
                f"{', '.join(facts.behaviours)}; name one of these."
            )

    def plan(self, batch: Batch, facts: DataFacts, key: jax.Array) -> Plan:
        """Known labels of events that have a past."""
        known = (batch.labels >= 0) & (batch.positions > 0)[..., None] & batch.history_mask[..., None]
        if self.behaviours:
            chosen = jnp.array([name in self.behaviours for name in facts.behaviours])
            known = known & chosen
        return Plan(jnp.sum(known.astype(jnp.float32)), arrays={"known": known})

    def loss(self, forward: Forward, plan: Plan, key: jax.Array) -> TaskLoss:
        """Cross-entropy of the event's labels given the history before it and its item."""
        queries = forward.causal_queries()
        before = jnp.pad(queries[:, :-1], ((0, 0), (1, 0), (0, 0)))
        logits = forward.model.behaviour_logits(before, forward.events.astype(before.dtype))
        labels = jnp.where(plan.arrays["known"], forward.batch.labels, -1)
        total, _ = binary_cross_entropy(logits, labels)
        return TaskLoss(total)
