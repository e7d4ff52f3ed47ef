"""Item similarity: an item's vector is drawn to that of the item that followed it, away from the batch's others.

With text in the item tower, texts come to say what is used together: new items find their neighbours. Cosines, of v(y)
as candidates have it, without the user tower.

B = packed rows, L = positions, D = item dim.

Source: Grbovic & Cheng, KDD 2018 (neighbours in a session); Yi et al., RecSys 2019 (logQ of in-batch negatives).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrec.core.batch import Batch
from jaxrec.losses.in_batch import in_batch_softmax, item_log_q
from jaxrec.nn.layers import unit_vectors
from jaxrec.tasks.base import DataFacts, Forward, Plan, Task, TaskLoss
from jaxrec.tasks.next_item import next_events


@dataclasses.dataclass(frozen=True, kw_only=True)
class ItemSimilarity(Task):
    """Tells the item that followed an event's from the other followers of the global batch.

    Attributes:
      temperature: the cosines are divided by it.
    """

    temperature: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"ItemSimilarity.temperature={self.temperature} must be above 0.")

    @property
    def encodings(self) -> frozenset[str]:
        """None."""
        return frozenset()

    def scored_pairs(self, batch_rows: int, length: int, num_items: int) -> float:
        """Every event against every follower."""
        return float(batch_rows * length) ** 2

    def check_data(self, facts: DataFacts) -> None:
        """The correction needs the items' counts."""
        item_log_q(facts.item_counts)

    def plan(self, batch: Batch, facts: DataFacts, key: jax.Array) -> Plan:
        """An event that the same item follows has nothing to tell."""
        target_ids, weights = next_events(batch)
        weights = weights * (target_ids != batch.item_ids)
        target_ids = jnp.where(weights > 0, target_ids, 0)
        return Plan(jnp.sum(weights), lookups={"targets": target_ids}, arrays={"weights": weights})

    def loss(self, forward: Forward, plan: Plan, key: jax.Array) -> TaskLoss:
        """Softmax over the followers; the event's own item is no negative, whose cosine could be nothing but 1."""
        target_ids = plan.lookups["targets"].reshape(-1)
        total, _ = in_batch_softmax(
            _unit(forward.event_vectors()) / self.temperature,
            target_ids,
            _unit(forward.item_vectors("targets")),
            plan.arrays["weights"].reshape(-1),
            jnp.asarray(item_log_q(forward.facts.item_counts))[target_ids],
            own_ids=jnp.asarray(forward.batch.item_ids).reshape(-1),
        )
        return TaskLoss(total)


def _unit(vectors: Float[Array, "b l d"]) -> Float[Array, "t d"]:
    return unit_vectors(jax.lax.collapse(vectors.astype(jnp.float32), 0, 2))
