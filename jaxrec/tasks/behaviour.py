"""Behaviour prediction: will this user click, like, buy this item? Multi-label binary cross-entropy.

The user is seen through the events before the one that is judged, and the item through its vector: the label of
an event enters no input. B = packed rows, L = positions, K = behaviours.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxrec.core.batch import Batch
from jaxrec.losses.binary import binary_cross_entropy
from jaxrec.tasks.base import DataFacts, Forward, Plan, Task, TaskLoss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Behaviour(Task):
    """Predicts the behaviours of every event but the first of a history.

    Attributes:
      behaviours: names of those to learn; empty = all of the dataset.
      given: learn them where this behaviour happened and nowhere else, as the second stage of a funnel; empty =
        everywhere.
    """

    behaviours: tuple[str, ...] = ()
    given: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.given and (not self.behaviours or self.given in self.behaviours):
            raise ValueError(
                f"Behaviour.given={self.given!r} needs behaviours={self.behaviours} to name others than itself; name "
                "what is learned where it happened."
            )

    @property
    def needs_behaviour_head(self) -> bool:
        """One logit a behaviour of the dataset."""
        return True

    def learned_behaviours(self, names: Sequence[str]) -> tuple[str, ...]:
        """As the config says."""
        return self.behaviours or tuple(names)

    @property
    def conditional_behaviours(self) -> tuple[str, ...]:
        """All, where there is a condition."""
        return self.behaviours if self.given else ()

    def check_data(self, facts: DataFacts) -> None:
        """Every behaviour asked for must be a column of the dataset."""
        check_behaviours(self, [*self.behaviours, *([self.given] if self.given else [])], facts)

    def plan(self, batch: Batch, facts: DataFacts, key: jax.Array) -> Plan:
        """Known labels of events that have a past."""
        known = known_labels(batch, self.behaviours, facts)
        if self.given:
            known &= (jnp.asarray(batch.labels)[..., facts.behaviours.index(self.given)] == 1)[..., None]
        return Plan(jnp.sum(known.astype(jnp.float32)), arrays={"known": known})

    def loss(self, forward: Forward, plan: Plan, key: jax.Array) -> TaskLoss:
        """Cross-entropy of the event's labels given the history before it and its item."""
        labels = jnp.where(plan.arrays["known"], forward.batch.labels, -1)
        total, _ = binary_cross_entropy(forward.behaviour_logits, labels)
        return TaskLoss(total)


def check_behaviours(task: Task, asked: Sequence[str], facts: DataFacts) -> None:
    """Raises ValueError where the dataset lacks a behaviour that `task` asks for, or has none at all."""
    if not facts.behaviours:
        raise ValueError(
            f"task {type(task).__name__} needs behaviour labels, and dataset {facts.name!r} has no such column "
            "(is_*, rating, behaviour, ...); declare one in the column map or remove the task."
        )
    missing = [name for name in asked if name not in facts.behaviours]
    if missing:
        raise ValueError(
            f"task {type(task).__name__} asks for behaviour {missing[0]!r}, and dataset {facts.name!r} has "
            f"{', '.join(facts.behaviours)}; name one of these."
        )


def known_labels(batch: Batch, asked: Sequence[str], facts: DataFacts) -> Bool[Array, "B L K"]:
    """True = a known label, of a behaviour that is asked for (none = all), at an event that has a past."""
    wanted = jnp.array([not asked or name in asked for name in facts.behaviours])
    judged = (jnp.asarray(batch.positions) > 0) & jnp.asarray(batch.history_mask)
    return (jnp.asarray(batch.labels) >= 0) & judged[..., None] & wanted
