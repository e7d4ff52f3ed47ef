"""What a task is, and what it sees.

A task works in two halves. `plan` sees integers only (the batch) and names the table rows that it wants; `loss`
sees the model and those rows. The step looks rows up in between, so that gradients are taken with respect to rows
and never to a table that was merely read.

B = packed rows, L = positions, T = targets or tokens, V = texts, D = item dim, R = physical rows.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrec.core.batch import Batch, ValueFacts, abstract_batch
from jaxrec.core.hashing import hashed_uniform
from jaxrec.core.queries import TextQueries
from jaxrec.core.sparse_logits import MixedLogits
from jaxrec.models.memory import COUNTS, SUCCESSORS, MemoryRows
from jaxrec.models.teacher import Teacher
from jaxrec.models.two_tower import ITEM_BIAS, TwoTower

HIDDEN_TIMES = 0.1  # share of the targets whose time a step does not tell a model that reads it


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What tasks may know of the dataset, apart from its events.

    Attributes:
      num_items, num_users: ids are 1 .. n; 0 = padding.
      item_counts: training events of each id, `[num_items + 1]`; for sampling corrections. None where there are no
        data to count (the planner), and then tasks that need counts say so.
      has_timestamps: whether the time of any event is known.
      value: of the numbers beside the training events; None = there are none, or nobody has counted yet.
      num_text_tokens: tokens of an item's text, padding included; 0 = the items have no text.
      context: columns of an event's context, by name.
      queries: texts and the items that answer them, to train on; None = the dataset has none.
      domains: catalogues that the dataset joins; () = it is one.
      teacher: a trained model to learn from; None = no task asked for one, or the run is not trained.
    """

    name: str
    num_items: int
    num_users: int
    behaviours: tuple[str, ...]
    item_counts: Float[np.ndarray, "n"] | None
    has_timestamps: bool = True
    value: ValueFacts | None = None
    num_text_tokens: int = 0
    context: tuple[str, ...] = ()
    queries: TextQueries | None = None
    domains: tuple[str, ...] = ()
    teacher: Teacher | None = None

    def abstract_batch(self, num_rows: int, length: int, where: jax.sharding.Sharding | None = None) -> Batch:
        """The shapes of a batch of the dataset."""
        return abstract_batch(
            num_rows,
            length,
            len(self.behaviours),
            where,
            num_context=len(self.context),
            has_domains=len(self.domains) > 1,
        )


def next_in_history(
    batch: Batch, values: jax.Array | np.ndarray
) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
    """Of every event the value of the one after it in its history, 0 where there is none; and whether there is one."""
    after = ((0, 0), (0, 1))
    shifted, segments = (jnp.pad(jnp.asarray(x)[:, 1:], after) for x in (values, batch.segment_ids))
    same = (segments == batch.segment_ids) & (segments > 0)
    return jnp.where(same, shifted, 0), same


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """The integer half of a task.

    Attributes:
      weight: sum of the weights of the task's targets in this batch.
      lookups: item ids whose leading dim is split like the batch.
      shared_lookups: item ids that every device wants alike (shared negatives).
      arrays: whatever else `loss` needs.
    """

    weight: jax.Array
    lookups: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    shared_lookups: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    arrays: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TaskLoss:
    """`total` is a weighted sum in nats over the plan's targets; `metrics` are sums over the same targets."""

    total: jax.Array
    metrics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


class Forward:
    """One forward pass, shared by the tasks of a step: encodings that several want are made once.

    Attributes:
      events: vectors of the events' items.
      scored: the same of the scored table.
      users: rows of the user table for the events, or None.
      rows: rows of a task's `lookups` and `shared_lookups`, by table and name; the items' with their text.
      catalogue: the whole tables in physical row order, the items' with their text; None where no task asked.
      memory: the memory's rows of the events, by array, or None where the model has none.
      text_tokens: of the texts that this step encodes with a gradient, split like the batch; None = it encodes none.
    """

    def __init__(
        self,
        model: TwoTower,
        batch: Batch,
        facts: DataFacts,
        events: Float[Array, "B L D"],
        catalogue: Mapping[str, jax.Array] | None,
        key: jax.Array | None,
        users: Float[Array, "B L U"] | None = None,
        memory: Mapping[str, jax.Array] | None = None,
        scored: Float[Array, "B L D"] | None = None,
        text_tokens: Int[Array, "V T"] | None = None,
    ):
        self.model, self.batch, self.facts, self.events = model, batch, facts, events
        self.catalogue, self.key, self.users, self.memory = catalogue, key, users, memory
        self.scored = events if scored is None else scored
        self.text_tokens = text_tokens
        self.rows: dict[str, dict[str, jax.Array]] = {}

    def memory_logits(self, target_ids: Int[Array, "B L"]) -> MixedLogits | None:
        """What the memory says at every event, these targets counted out; None where the model has none."""
        if self.memory is None:
            return None
        rows = MemoryRows(jnp.asarray(self.batch.item_ids), self.memory[SUCCESSORS], self.memory[COUNTS])
        segments = jnp.asarray(self.batch.segment_ids)
        return self.model.memory.of_histories(self._causal_states, rows, segments, target_ids)

    @functools.cached_property
    def _causal_states(self) -> Float[Array, "B L E"]:
        states = self.encode(self.events, causal=True, key=self.key)
        return self.model.at_time(states, self._next_gaps())

    def _next_gaps(self) -> Int[Array, "B L"]:
        """Of every event the time to the next one; in training now and then unknown, as it may be when asked."""
        gaps, _ = next_in_history(self.batch, self.batch.time_gaps)
        if self.key is None or not self.model.config.target_time:
            return gaps
        hidden = hashed_uniform(jax.random.fold_in(self.key, 1 << 16), gaps.shape) < HIDDEN_TIMES
        return jnp.where(hidden, 0, gaps)

    @functools.cached_property
    def causal_queries(self) -> Float[Array, "B L D"]:
        """M(x) W at every event, from the events up to and including it."""
        return self.model.queries(self._causal_states)

    @functools.cached_property
    def behaviour_logits(self) -> Float[Array, "B L K"]:
        """The head's logits of every event, given the history before it and its item."""
        return self.model.behaviour_logits(*self._pairs)

    @functools.cached_property
    def values(self) -> Float[Array, "B L"]:
        """The predicted value of every event, in deviations from the mean, given the history before it and its item."""
        return self.model.values(*self._pairs)

    @functools.cached_property
    def _pairs(self) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"]]:
        """Of every event the query before it and the vector of its item."""
        queries = self.causal_queries
        before = jnp.pad(queries[:, :-1], ((0, 0), (1, 0), (0, 0)))
        if self.batch.context is not None:
            before = self.model.in_context(before, jnp.asarray(self.batch.context))
        return before, self.event_vectors().astype(before.dtype)

    def encode(self, events: Float[Array, "B L D"], **options: Any) -> Float[Array, "B S E"]:
        """M(x) before W, of these events by these users; see `TwoTower.encode`."""
        return self.model.encode(events, self.batch, user_rows=self.users, **options)

    def item_bias(self, name: str) -> jax.Array | None:
        """b_y of the rows of look-up `name`, or None where the model has none."""
        rows = self.rows.get(ITEM_BIAS)
        return None if rows is None else rows[name][..., 0]

    def item_vectors(self, name: str) -> jax.Array:
        """v(y) of the items of look-up `name`."""
        return self.model.candidate_vectors(self.rows[self.model.config.scored_table][name])

    def catalogue_candidates(self) -> tuple[Float[Array, "R D"], Float[Array, " R"]]:
        """v(y) and b_y (0 where the model has none) of all items, in physical row order."""
        assert self.catalogue is not None, "the step hands the tables to tasks that need the catalogue"
        vectors = self.model.candidate_vectors(self.catalogue[self.model.config.scored_table])
        bias = self.catalogue.get(ITEM_BIAS)
        return vectors, jnp.zeros(len(vectors), jnp.float32) if bias is None else bias[:, 0]

    def event_vectors(self) -> Float[Array, "B L D"]:
        """v(y) of the events' items, as candidates."""
        return self.model.candidate_vectors(self.scored)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Base of the tasks.

    Attributes:
      weight: of the task's mean loss in the sum over tasks.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"{type(self).__name__}.weight={self.weight} must not be negative.")

    @property
    def needs_catalogue(self) -> bool:
        """Whether `loss` reads the whole item table (full softmax)."""
        return False

    @property
    def needs_behaviour_head(self) -> bool:
        """Whether `loss` asks the model for behaviour logits."""
        return False

    @property
    def needs_value_head(self) -> bool:
        """Whether `loss` asks the model for values."""
        return False

    def learned_behaviours(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of the dataset's behaviours, which are `names`, that the task learns."""
        return ()

    @property
    def conditional_behaviours(self) -> tuple[str, ...]:
        """Those whose logit of the head is one given another behaviour; no other task may learn them."""
        return ()

    def predicted_logits(self, logits: Float[Array, "*b K"], facts: DataFacts) -> Float[Array, "*b K"]:
        """What the head's logits say of the behaviours, once the task has trained them."""
        return logits

    @property
    def takes_mixture(self) -> bool:
        """Whether the loss scores by `TwoTower.score`, or not at all: a mixture is no product."""
        return False

    @property
    def encodings(self) -> frozenset[str]:
        """Passes of the encoder that the loss asks for, by name; tasks share those of the same name."""
        return frozenset({"causal"})

    def scored_pairs(self, batch_rows: int, length: int, num_items: int) -> float:
        """(query, item) pairs that a batch scores, for the count of operations."""
        return 0.0

    @property
    def reads_queries(self) -> bool:
        """Whether the loss encodes texts of its own, beside those of the items; such a task needs `model.text`."""
        return False

    def masked_tokens(self, num_text_tokens: int) -> int:
        """Words of an item's text that the loss hides and predicts, at most; 0 = none, as most tasks."""
        return 0

    def check_data(self, facts: DataFacts) -> None:
        """Raises ValueError, naming the task and the column, where the dataset lacks what the task needs."""

    def plan(self, batch: Batch, facts: DataFacts, key: jax.Array) -> Plan:
        """Targets and look-ups; labels may appear in `arrays` and nowhere else."""
        raise TypeError(f"{type(self).__name__} must define plan")

    def loss(self, forward: Forward, plan: Plan, key: jax.Array) -> TaskLoss:
        """The loss over the plan's targets."""
        raise TypeError(f"{type(self).__name__} must define loss")
