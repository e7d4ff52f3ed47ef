"""Funnel: a behaviour that only follows another one (click, then long view), learned over every event.

The head's logit of the second behaviour is that of p(second | first), which no loss sees alone: what is trained, over
the entire space of events, is p(first) and p(second) = p(first) p(second | first). So the second is never predicted
above the first, and nothing is learned from a selection of events. A label of the second without the first, which
the model holds to be impossible, is a label of p(second) like any other; the evaluation counts them.

B = packed rows, L = positions, K = behaviours.

Source: Ma et al., SIGIR 2018 (ESMM).
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrec.core.batch import Batch
from jaxrec.losses.binary import binary_cross_entropy, product_logits
from jaxrec.tasks.base import DataFacts, Forward, Plan, Task, TaskLoss
from jaxrec.tasks.behaviour import check_behaviours, known_labels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Funnel(Task):
    """Predicts two behaviours of every event but the first of a history.

    Attributes:
      first: the behaviour that comes first, such as "click".
      second: the one that follows it, such as "long_view"; no other task may learn it.
    """

    first: str
    second: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first == self.second:
            raise ValueError(
                f"Funnel.first={self.first!r} and Funnel.second={self.second!r} must be two behaviours."
            )

    @property
    def needs_behaviour_head(self) -> bool:
        """Two of its logits."""
        return True

    def learned_behaviours(self, names: Sequence[str]) -> tuple[str, ...]:
        """Both."""
        return self.first, self.second

    @property
    def conditional_behaviours(self) -> tuple[str, ...]:
        """The second."""
        return (self.second,)

    def check_data(self, facts: DataFacts) -> None:
        """Both must be columns of the dataset."""
        check_behaviours(self, (self.first, self.second), facts)

    def plan(self, batch: Batch, facts: DataFacts, key: jax.Array) -> Plan:
        """Known labels of events that have a past."""
        known = known_labels(batch, (self.first, self.second), facts)
        return Plan(jnp.sum(known.astype(jnp.float32)), arrays={"known": known})

    def predicted_logits(self, logits: Float[Array, "*b K"], facts: DataFacts) -> Float[Array, "*b K"]:
        """The second's logit is that of the product."""
        first, second = (facts.behaviours.index(name) for name in (self.first, self.second))
        return logits.at[..., second].set(product_logits(logits[..., first], logits[..., second]))

    def loss(self, forward: Forward, plan: Plan, key: jax.Array) -> TaskLoss:
        """Cross-entropy of both labels."""
        labels = jnp.where(plan.arrays["known"], forward.batch.labels, -1)
        logits = self.predicted_logits(forward.behaviour_logits, forward.facts)
        return TaskLoss(binary_cross_entropy(logits, labels)[0])
