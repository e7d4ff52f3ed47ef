"""Query to item: a text, a search or a tag, finds the items that answer it.

The query is read by the encoder that reads the items' text, and held against v(y) by cosine: what items are called,
and who took them, both count. Pairs are drawn from those of the dataset, apart from the batch's histories.

B = packed rows, N = pairs a row, T = pairs of a batch, E = answers of the query that has most.

Source: Huang et al., CIKM 2013 (texts and documents in one space); Yi et al., RecSys 2019 (logQ of in-batch negatives).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrec.core.batch import Batch
from jaxrec.core.hashing import hashed_bits
from jaxrec.core.partition import spec
from jaxrec.core.queries import TextQueries
from jaxrec.losses.in_batch import in_batch_softmax
from jaxrec.nn.layers import unit_vectors
from jaxrec.tasks.base import DataFacts, Forward, Plan, Task, TaskLoss


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryItem(Task):
    """Tells an item that answers a query from the other queries' items; needs `data.queries` and `model.text`.

    Attributes:
      pairs_per_row: pairs that are drawn for each packed row of the batch.
      temperature: the cosines are divided by it.
    """

    pairs_per_row: int = 16
    temperature: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs_per_row < 1:
            raise ValueError(f"QueryItem.pairs_per_row={self.pairs_per_row} must be at least 1.")
        if self.temperature <= 0:
            raise ValueError(f"QueryItem.temperature={self.temperature} must be above 0.")

    @property
    def encodings(self) -> frozenset[str]:
        """None of the user tower."""
        return frozenset()

    @property
    def reads_queries(self) -> bool:
        """Queries are texts."""
        return True

    def scored_pairs(self, batch_rows: int, length: int, num_items: int) -> float:
        """Every query against every item of the batch."""
        return float(batch_rows * self.pairs_per_row) ** 2

    def check_data(self, facts: DataFacts) -> None:
        """There must be queries."""
        _queries(facts)

    def plan(self, batch: Batch, facts: DataFacts, key: jax.Array) -> Plan:
        """Draws pairs, each as likely as another."""
        queries = _queries(facts)
        shape = batch.item_ids.shape[0], self.pairs_per_row
        drawn = hashed_bits(key, shape) % jnp.uint32(len(queries.query_ids))
        query_ids = jnp.asarray(queries.query_ids)[drawn]
        return Plan(
            jnp.float32(drawn.size),
            lookups={"answers": jnp.asarray(queries.item_ids)[drawn]},
            arrays={"query_ids": query_ids},
        )

    def loss(self, forward: Forward, plan: Plan, key: jax.Array) -> TaskLoss:
        """Softmax over the drawn items; no answer of a query is a negative for it, whatever it was drawn with."""
        queries = _queries(forward.facts)
        query_ids = plan.arrays["query_ids"].reshape(-1)
        item_ids = plan.lookups["answers"].reshape(-1)
        tokens = jax.lax.with_sharding_constraint(jnp.asarray(queries.token_ids)[query_ids], spec("batch"))
        vectors = forward.model.text_queries(tokens, key=key) / self.temperature
        items = jax.lax.collapse(forward.item_vectors("answers").astype(jnp.float32), 0, 2)
        total, _ = in_batch_softmax(
            vectors,
            item_ids,
            unit_vectors(items),
            jnp.ones(item_ids.shape, jnp.float32),
            _log_q(queries, item_ids),
            own_ids=jnp.asarray(queries.answers())[query_ids],
        )
        return TaskLoss(total)


def _queries(facts: DataFacts) -> TextQueries:
    if facts.queries is None:
        raise ValueError(
            f"task QueryItem needs texts that items are searched by, and dataset {facts.name!r} has none; name their "
            "table with data.queries, or remove the task."
        )
    return facts.queries


def _log_q(queries: TextQueries, item_ids: Int[Array, "t"]) -> Float[Array, "t"]:
    """Of the items as pairs draw them, which is not how events do."""
    counts = queries.item_counts(int(queries.item_ids.max()))
    log_q = np.log(np.maximum(counts, 1) / len(queries.item_ids)).astype(np.float32)
    return jnp.asarray(log_q)[item_ids]
