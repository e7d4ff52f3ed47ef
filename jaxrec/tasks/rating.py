"""Rating regression: how many stars will this user give this item, how often play it?

The user is seen through the events before the one that is judged, and the item through its vector: the value of an
event enters no input. B = packed rows, L = positions.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from jaxrec.core.batch import Batch
from jaxrec.tasks.base import DataFacts, Forward, Plan, Task, TaskLoss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rating(Task):
    """Predicts the number beside every event but the first of a history (`data.columns.value`).

    The loss is taken in standard deviations of the training events: half the square, the negative log-likelihood of a
    normal distribution but for a constant.

    Attributes:
      huber: above this many deviations an error counts by its size instead of its square; none = everywhere by its
        square.
    """

    huber: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.huber is not None and not self.huber > 0:
            raise ValueError(f"Rating.huber={self.huber} must be above 0; none = squares everywhere.")

    @property
    def needs_value_head(self) -> bool:
        """One number of each pair of user and item."""
        return True

    def check_data(self, facts: DataFacts) -> None:
        """There must be a column of numbers, and the numbers must differ."""
        if facts.value is None:
            raise ValueError(
                f"task Rating needs a number beside the events, and dataset {facts.name!r} has none; name its column "
                "with data.columns.value.column, or remove the task."
            )
        if not facts.value.deviation > 0:
            raise ValueError(
                f"task Rating: the column {facts.value.name!r} of dataset {facts.name!r} is {facts.value.mean:g} "
                "everywhere; name another with data.columns.value.column, or remove the task."
            )

    def plan(self, batch: Batch, facts: DataFacts, key: jax.Array) -> Plan:
        """Known values of events that have a past."""
        assert facts.value is not None, "check_data has seen to it"
        values = jnp.asarray(batch.values)
        known = ~jnp.isnan(values) & (jnp.asarray(batch.positions) > 0) & jnp.asarray(batch.history_mask)
        wanted = jnp.where(known, (values - facts.value.mean) / facts.value.deviation, 0.0)
        return Plan(jnp.sum(known.astype(jnp.float32)), arrays={"known": known, "wanted": wanted})

    def loss(self, forward: Forward, plan: Plan, key: jax.Array) -> TaskLoss:
        """Of the value given the history before the event and its item."""
        wanted = plan.arrays["wanted"]
        if self.huber is None:
            losses = optax.losses.l2_loss(forward.values, wanted)
        else:
            losses = optax.losses.huber_loss(forward.values, wanted, delta=self.huber)
        return TaskLoss(jnp.sum(jnp.where(plan.arrays["known"], losses, 0.0)))
