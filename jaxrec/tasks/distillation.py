"""Distillation: a small model learns how a trained one spreads its belief over the items, beside the hard targets.

At a share of the events the scores of teacher and student, over a temperature, become two distributions over the
catalogue; the loss is their divergence. Where the catalogue is too large for that, both score a shared sample, with
logQ taken off, which estimates them. No array of tokens by items exists.

Source: Hinton, Vinyals and Dean, arXiv 2015 (the temperature, and its square before the loss); Tang and Wang, KDD 2018
(distillation of rankings).

B = packed rows, L = positions, C = asked positions of a row, S = sampled items, D = item dim.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrec.core.batch import Batch
from jaxrec.core.hashing import hashed_uniform
from jaxrec.losses.divergence import full_divergence
from jaxrec.losses.samplers import Sampler
from jaxrec.models.teacher import Teacher
from jaxrec.tasks.base import DataFacts, Forward, Plan, Task, TaskLoss
from jaxrec.tasks.next_item import next_events

SAMPLE = "distillation"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(Task):
    """Learns from the run in `teacher`; put it beside the ranking task that the model is asked by.

    Attributes:
      teacher: workdir of a trained run on the same data, its best state by validation, else its newest. It is needed to
        train and not to evaluate.
      temperature: both sides' scores are divided by it: above 1 the order of unlikely items counts for more.
      student_temperature: that of the student's own ranking task.
      events_share: of each packed row's positions, drawn anew at each step; 1 = all of them.
      sampler: where the items come from, alike for all events of a step; None = the whole catalogue.
    """

    teacher: str = ""
    temperature: float = 1.0
    student_temperature: float = 1.0
    events_share: float = 0.25
    sampler: Sampler | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("temperature", "student_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"Distillation.{name}={getattr(self, name)} must be above 0.")
        if not 0 < self.events_share <= 1:
            raise ValueError(f"Distillation.events_share={self.events_share} must lie in (0, 1].")
        if self.sampler is not None and self.sampler.num_samples < 2:
            raise ValueError(
                f"Distillation.sampler.num_samples={self.sampler.num_samples} must be at least 2: one item has no "
                "order."
            )

    @property
    def needs_catalogue(self) -> bool:
        """Where nothing is sampled."""
        return self.sampler is None

    def scored_pairs(self, batch_rows: int, length: int, num_items: int) -> float:
        """The asked positions against the items, by the student; the teacher's scores need no gradient."""
        items = num_items if self.sampler is None else self.sampler.num_samples
        return (1 + 1 / 3) * batch_rows * self._num_asked(length) * items

    def plan(self, batch: Batch, facts: DataFacts, key: jax.Array) -> Plan:
        """Draws the positions and the items; the targets themselves are the ranking task's."""
        _, weights = next_events(batch)
        columns = asked_columns(weights, self._num_asked(weights.shape[1]), key)
        weights = jnp.take_along_axis(weights, columns, axis=1)
        drawn = {}
        if self.sampler is not None:
            drawn[SAMPLE] = self.sampler.sample(key, facts.num_items, facts.item_counts)
        return Plan(jnp.sum(weights), shared_lookups=drawn, arrays={"columns": columns, "weights": weights})

    def loss(self, forward: Forward, plan: Plan, key: jax.Array) -> TaskLoss:
        """The divergence of the student's distribution from the teacher's.

        Raises:
          ValueError: the teacher has not been opened.
        """
        facts, columns, weights = forward.facts, plan.arrays["columns"], plan.arrays["weights"]
        if facts.teacher is None:
            raise ValueError(
                f"Distillation.teacher={self.teacher!r} was not opened; it is, where a run is trained."
            )
        own, theirs = (
            jnp.take_along_axis(queries, columns[:, :, None], axis=1) / temperature
            for queries, temperature in (
                (forward.causal_queries, self.student_temperature * self.temperature),
                (teacher_queries(facts.teacher, forward), self.temperature),
            )
        )
        sides = (own, theirs, weights)
        total = self._full(forward, *sides) if self.sampler is None else self._sampled(forward, plan, *sides)
        return TaskLoss(self.temperature**2 * total)

    def _full(self, forward: Forward, own: jax.Array, theirs: jax.Array, weights: jax.Array) -> jax.Array:
        assert forward.facts.teacher is not None, "checked above"
        vectors, bias = forward.catalogue_candidates()
        taught_vectors, taught_bias = forward.facts.teacher.candidates()
        return full_divergence(
            jax.lax.collapse(own, 0, 2),
            weights.reshape(-1),
            vectors,
            bias / self.temperature,
            (jax.lax.collapse(theirs, 0, 2), taught_vectors, taught_bias / self.temperature),
            num_rows=forward.facts.num_items + 1,
        )

    def _sampled(
        self, forward: Forward, plan: Plan, own: jax.Array, theirs: jax.Array, weights: jax.Array
    ) -> jax.Array:
        assert self.sampler is not None and forward.facts.teacher is not None, "checked above"
        facts, item_ids = forward.facts, plan.shared_lookups[SAMPLE]
        log_q = self.sampler.log_q(item_ids, facts.num_items, facts.item_counts)
        bias = forward.item_bias(SAMPLE)
        sides = (
            (theirs, *forward.facts.teacher.candidates(item_ids)),
            (own, forward.item_vectors(SAMPLE), jnp.zeros(len(item_ids)) if bias is None else bias),
        )
        of_teacher, of_student = (
            jax.nn.log_softmax(
                (queries @ vectors.T.astype(queries.dtype)).astype(jnp.float32)
                + offsets / self.temperature
                - log_q
            )
            for queries, vectors, offsets in sides
        )
        return jnp.sum(jnp.sum(jnp.exp(of_teacher) * (of_teacher - of_student), axis=-1) * weights)

    def _num_asked(self, length: int) -> int:
        return math.ceil(self.events_share * length)


def asked_columns(weights: Float[Array, "B L"], num: int, key: jax.Array) -> Int[Array, "B C"]:
    """Columns of each row, drawn evenly from those that weigh something; others only where these are too few."""
    return jax.lax.top_k((weights > 0) + hashed_uniform(key, weights.shape), num)[1]


def teacher_queries(teacher: Teacher, forward: Forward) -> Float[Array, "B L E"]:
    """The teacher's queries at every event, without dropout; its arrays are constants, so no gradient goes there."""
    batch = forward.batch
    asked = Forward(
        teacher.model,
        batch,
        forward.facts,
        teacher.events(jnp.asarray(batch.item_ids)),
        None,
        None,
        users=teacher.users(jnp.asarray(batch.user_ids)),
    )
    return asked.causal_queries
