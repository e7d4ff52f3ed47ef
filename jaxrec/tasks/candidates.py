"""How an item is told from the others: the candidate sets that ranking tasks choose among.

A ranking task hands over queries and target ids; the candidate set names the rows that it needs and gives the
loss. T = targets, S = shared negatives, D = item dim.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrec.core.sparse_logits import MixedLogits, in_blocks
from jaxrec.losses.generalised_bce import generalised_bce
from jaxrec.losses.in_batch import in_batch_softmax, item_log_q
from jaxrec.losses.sampled import sampled_softmax
from jaxrec.losses.samplers import LogUniformSampler, Sampler, UniformSampler
from jaxrec.losses.softmax import CHUNK_LOGITS, full_softmax
from jaxrec.losses.target_trust import TargetTrust
from jaxrec.tasks.base import DataFacts, Forward, Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidates:
    """Base of the candidate sets."""

    @property
    def needs_catalogue(self) -> bool:
        """Whether the whole item table is read."""
        return False

    def size(self, num_items: int, num_targets: int) -> float:
        """Candidates that each query is scored against."""
        raise TypeError(f"{type(self).__name__} must define size")

    def plan(
        self, target_ids: Int[Array, "*t"], weights: Float[Array, "*t"], facts: DataFacts, key: jax.Array
    ) -> Plan:
        """The look-ups beside the targets' own; keeps `target_ids` and `weights` in `arrays`."""
        return Plan(jnp.sum(weights), arrays={"target_ids": target_ids, "weights": weights})

    def loss(self, queries: Float[Array, "*t D"], forward: Forward, plan: Plan) -> jax.Array:
        """Weighted sum over targets, in nats."""
        raise TypeError(f"{type(self).__name__} must define loss")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullSoftmax(Candidates):
    """Every item of the catalogue, over the sharded table.

    Attributes:
      new_items: whether items without a training event are candidates too. False = an item that nobody could choose is
        no negative: its text is not pushed away. They are the last ids, since items are numbered by falling count.
      trust: how far targets are believed, where some events are noise.
      chunk_logits: bound on the logits that one device holds at a time.
    """

    new_items: bool = True
    trust: TargetTrust = TargetTrust()
    chunk_logits: int = CHUNK_LOGITS

    @property
    def needs_catalogue(self) -> bool:
        """A full softmax touches every row."""
        return True

    def size(self, num_items: int, num_targets: int) -> float:
        """All items."""
        return float(num_items)

    def loss(
        self, queries: Float[Array, "*t D"], forward: Forward, plan: Plan, mixed: MixedLogits | None = None
    ) -> jax.Array:
        """See `losses.softmax`."""
        tokens = (queries, plan.arrays["target_ids"], plan.arrays["weights"])
        target_dims = tokens[1].ndim
        if mixed is not None:
            tokens = jax.tree.map(lambda x: jax.lax.collapse(in_blocks(x, mixed.block), 1, 3), tokens)
        queries, target_ids, weights = (jax.lax.collapse(x, 0, target_dims) for x in tokens)
        return full_softmax(
            queries,
            target_ids,
            weights,
            *forward.catalogue_candidates(),
            num_rows=self._num_rows(forward.facts),
            mixed=mixed,
            trust=self.trust,
            chunk_logits=self.chunk_logits,
        )

    def _num_rows(self, facts: DataFacts) -> int:
        """Rows that are candidates, row 0 included."""
        if self.new_items or facts.item_counts is None:  # the planner has nothing to count
            return facts.num_items + 1
        return 1 + int(np.flatnonzero(facts.item_counts).max(initial=0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledSoftmax(Candidates):
    """A shared sample of the catalogue, with exact logQ: for catalogues past a full softmax.

    Attributes:
      sampler: where the negatives come from; they are the same for every target of a step.
    """

    sampler: Sampler = LogUniformSampler()

    def size(self, num_items: int, num_targets: int) -> float:
        """The draws, and the target."""
        return self.sampler.num_samples + 1.0

    def plan(
        self, target_ids: Int[Array, "*t"], weights: Float[Array, "*t"], facts: DataFacts, key: jax.Array
    ) -> Plan:
        """Looks up the targets and the draws."""
        plan = super().plan(target_ids, weights, facts, key)
        negatives = self.sampler.sample(key, facts.num_items, facts.item_counts)
        return dataclasses.replace(
            plan, lookups={"targets": target_ids}, shared_lookups={"negatives": negatives}
        )

    def loss(self, queries: Float[Array, "*t D"], forward: Forward, plan: Plan) -> jax.Array:
        """See `losses.sampled`."""
        negative_ids = plan.shared_lookups["negatives"]
        total, _ = sampled_softmax(
            queries.reshape(-1, queries.shape[-1]),
            plan.arrays["target_ids"].reshape(-1),
            forward.item_vectors("targets").reshape(-1, queries.shape[-1]),
            plan.arrays["weights"].reshape(-1),
            negative_ids,
            forward.item_vectors("negatives"),
            self.sampler.log_q(negative_ids, forward.facts.num_items, forward.facts.item_counts),
            target_bias=_flat(forward.item_bias("targets")),
            negative_bias=_flat(forward.item_bias("negatives")),
            score=forward.model.score,
        )
        return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledBinary(SampledSoftmax):
    """Each target against shared uniform draws, as yes or no: gSASRec's loss.

    Attributes:
      sampler: uniform draws.
      calibration: 0 = plain binary cross-entropy, whose probabilities are too high; 1 = calibrated ones.
    """

    sampler: UniformSampler = UniformSampler(num_samples=256)
    calibration: float = 0.75

    def __post_init__(self) -> None:
        if not isinstance(self.sampler, UniformSampler):
            raise ValueError(
                f"SampledBinary.sampler={type(self.sampler).__name__}: its calibration holds for uniform draws; use "
                "UniformSampler."
            )
        if not 0.0 <= self.calibration <= 1.0:
            raise ValueError(f"SampledBinary.calibration={self.calibration} must lie in [0, 1].")

    def loss(self, queries: Float[Array, "*t D"], forward: Forward, plan: Plan) -> jax.Array:
        """See `losses.generalised_bce`."""
        dim = queries.shape[-1]
        total, _ = generalised_bce(
            queries.reshape(-1, dim),
            plan.arrays["target_ids"].reshape(-1),
            forward.item_vectors("targets").reshape(-1, dim),
            plan.arrays["weights"].reshape(-1),
            plan.shared_lookups["negatives"],
            forward.item_vectors("negatives"),
            num_items=forward.facts.num_items,
            calibration=self.calibration,
            target_bias=_flat(forward.item_bias("targets")),
            negative_bias=_flat(forward.item_bias("negatives")),
            score=forward.model.score,
        )
        return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class InBatch(Candidates):
    """The other targets of the global batch, corrected for their popularity; no further look-ups."""

    def size(self, num_items: int, num_targets: int) -> float:
        """Every target of the batch."""
        return float(num_targets)

    def plan(
        self, target_ids: Int[Array, "*t"], weights: Float[Array, "*t"], facts: DataFacts, key: jax.Array
    ) -> Plan:
        """Looks up the targets."""
        return dataclasses.replace(
            super().plan(target_ids, weights, facts, key), lookups={"targets": target_ids}
        )

    def loss(self, queries: Float[Array, "*t D"], forward: Forward, plan: Plan) -> jax.Array:
        """See `losses.in_batch`."""
        target_ids = plan.arrays["target_ids"].reshape(-1)
        total, _ = in_batch_softmax(
            queries.reshape(-1, queries.shape[-1]),
            target_ids,
            forward.item_vectors("targets").reshape(-1, queries.shape[-1]),
            plan.arrays["weights"].reshape(-1),
            jnp.asarray(item_log_q(forward.facts.item_counts))[target_ids],
            target_bias=_flat(forward.item_bias("targets")),
            score=forward.model.score,
        )
        return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixed(SampledSoftmax):
    """The batch's other targets and shared draws together: popular items from the first, the tail from the second.

    Both are draws from one mixture, whose logQ is exact, so an item that both kinds bring is not counted twice.

    Source: Yang et al., WWW 2020 (mixed negative sampling).
    """

    sampler: Sampler = UniformSampler()

    def size(self, num_items: int, num_targets: int) -> float:
        """The targets and the draws."""
        return float(num_targets + self.sampler.num_samples)

    def loss(self, queries: Float[Array, "*t D"], forward: Forward, plan: Plan) -> jax.Array:
        """See the class."""
        facts, dim = forward.facts, queries.shape[-1]
        target_ids = plan.arrays["target_ids"].reshape(-1)
        weights = plan.arrays["weights"].reshape(-1)
        target_vectors = forward.item_vectors("targets").reshape(-1, dim)
        target_bias, drawn_bias = _flat(forward.item_bias("targets")), _flat(forward.item_bias("negatives"))
        ids = jnp.concatenate([target_ids, plan.shared_lookups["negatives"]])
        real = jnp.concatenate([weights > 0, jnp.ones(self.sampler.num_samples, bool)])
        # A target's own place in the batch is no draw.
        in_batch = jnp.sum(weights > 0) - 1.0
        draws = in_batch + self.sampler.num_samples
        log_q = jnp.logaddexp(
            jnp.asarray(item_log_q(facts.item_counts))[ids] + jnp.log(jnp.maximum(in_batch, 1e-9)),
            self.sampler.log_q(ids, facts.num_items, facts.item_counts) + math.log(self.sampler.num_samples),
        ) - jnp.log(draws)  # fmt: skip
        total, _ = sampled_softmax(
            queries.reshape(-1, dim),
            target_ids,
            target_vectors,
            weights,
            ids,
            jnp.concatenate([target_vectors, forward.item_vectors("negatives")]),
            log_q,
            target_bias=target_bias,
            negative_bias=None
            if target_bias is None or drawn_bias is None
            else jnp.concatenate([target_bias, drawn_bias]),
            negative_mask=real,
            num_draws=draws,
            score=forward.model.score,
        )
        return total


def _flat(bias: jax.Array | None) -> jax.Array | None:
    return None if bias is None else bias.reshape(-1)
