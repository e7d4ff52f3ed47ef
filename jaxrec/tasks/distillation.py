"""Distillation: a small model learns how a trained one spreads its belief over the items, beside the hard targets.

At every event with a successor the scores of teacher and student of a shared sample of items, over a temperature and
with logQ taken off, become two distributions, which estimate those over the whole catalogue; the loss is their
divergence. No array of tokens by items exists.

Source: Hinton, Vinyals and Dean, arXiv 2015 (the temperature, and its square before the loss); Tang and Wang, KDD 2018
(distillation of rankings).

B = packed rows, L = positions, S = sampled items, D = item dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrec.core.batch import Batch
from jaxrec.losses.samplers import LogUniformSampler, Sampler
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
      sampler: where the items come from; alike for all targets of a step.
    """

    teacher: str = ""
    temperature: float = 1.0
    student_temperature: float = 1.0
    sampler: Sampler = LogUniformSampler(num_samples=512)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("temperature", "student_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"Distillation.{name}={getattr(self, name)} must be above 0.")
        if self.sampler.num_samples < 2:
            raise ValueError(
                f"Distillation.sampler.num_samples={self.sampler.num_samples} must be at least 2: one item has no "
                "order."
            )

    def scored_pairs(self, batch_rows: int, length: int, num_items: int) -> float:
        """Every position against the sample, by both models."""
        return 2.0 * batch_rows * length * self.sampler.num_samples

    def plan(self, batch: Batch, facts: DataFacts, key: jax.Array) -> Plan:
        """Draws the items; the targets themselves are the ranking task's."""
        _, weights = next_events(batch)
        drawn = self.sampler.sample(key, facts.num_items, facts.item_counts)
        return Plan(jnp.sum(weights), shared_lookups={SAMPLE: drawn}, arrays={"weights": weights})

    def loss(self, forward: Forward, plan: Plan, key: jax.Array) -> TaskLoss:
        """The divergence of the student's distribution from the teacher's.

        Raises:
          ValueError: the teacher has not been opened.
        """
        facts, item_ids = forward.facts, plan.shared_lookups[SAMPLE]
        if facts.teacher is None:
            raise ValueError(
                f"Distillation.teacher={self.teacher!r} was not opened; it is, where a run is trained."
            )
        log_q = self.sampler.log_q(item_ids, facts.num_items, facts.item_counts)
        queries = forward.causal_queries() / self.student_temperature
        vectors = forward.item_vectors(SAMPLE).astype(queries.dtype)
        own = (queries @ vectors.T).astype(jnp.float32)
        if (bias := forward.item_bias(SAMPLE)) is not None:
            own = own + bias
        taught = teacher_scores(facts.teacher, forward, item_ids)
        of_teacher, of_student = (
            jax.nn.log_softmax(scores / self.temperature - log_q) for scores in (taught, own)
        )
        divergence = jnp.sum(jnp.exp(of_teacher) * (of_teacher - of_student), axis=-1)
        return TaskLoss(self.temperature**2 * jnp.sum(divergence * plan.arrays["weights"]))


def teacher_scores(teacher: Teacher, forward: Forward, item_ids: jax.Array) -> jax.Array:
    """The teacher's scores of the items at every event, without dropout: `[B, L, S]`."""
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
    return teacher.scores(asked.causal_queries(), item_ids)
