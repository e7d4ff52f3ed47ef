"""What is exported: the towers as pure functions of weights, which are codes, and of plain arrays, one history a row.

A history is a row of item ids, oldest first; 0, and whatever the catalogue does not know, is no event, at either end
of the row. Of longer histories the latest `max_events` count. The last block of the encoder computes one position.

B = users, L = events of a history, N = items, C = candidates, X = items to leave out, D = item dim, E = encoder width,
K = behaviours, F = context columns, T = tokens of a text, M = places of sparse logits, W = window of the memory.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxrec.compression.codes import Code
from jaxrec.core.batch import NUM_TIME_GAPS, UNKNOWN_SECONDS, Batch, ValueFacts
from jaxrec.core.sparse_logits import SparseLogits
from jaxrec.models.memory import COUNTS, SUCCESSORS, MemoryRows
from jaxrec.models.two_tower import Outputs, TwoTower, TwoTowerConfig
from jaxrec.nn.layers import unit_vectors
from jaxrec.nn.positions import bit_lengths
from jaxrec.tasks.base import DataFacts, Task
from jaxrec.training.state import merge_model, split_model

Weights = Mapping[str, Code]
Inputs = Mapping[str, jax.Array]

# Names of the weights that are no dense parameters; row = item id (or user index + 1), row 0 is padding.
VECTORS, BIAS, EVENTS, DOMAINS = "items/vectors", "items/bias", "items/events", "items/domains"
USER_ROWS, MEMORY = "users/rows", "memory/"
DENSE = "dense/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedModel:
    """The model of a run, as it is asked.

    Attributes:
      config: of the towers; see `serving_config`.
      masked: the model is asked by a mask vector put after the history (masked item), not by its last event.
      temperature: of the ranking task; queries are divided by it.
      max_events: the latest events that are read.
      tasks: they tell what the logits of the behaviour head mean.
      has_domains: there are several catalogues, and a user is recommended items of one.
    """

    config: TwoTowerConfig
    outputs: Outputs
    facts: DataFacts
    tasks: Mapping[str, Task]
    masked: bool
    temperature: float
    max_events: int
    has_domains: bool

    def user_tower(self, weights: Weights, inputs: Inputs) -> dict[str, jax.Array]:
        """M(x) W over the temperature: `query` `[B, D]`; zeros for an empty history, whose scores are then the biases.

        With a memory of transitions also what it adds to the scores: `memory_item_ids` and `memory_values` `[B, M]`;
        0 = an empty place, and an item that is named twice gets both.
        """
        query, extra = self._query(weights, inputs)
        found = {"query": query}
        if extra is not None:
            found |= {"memory_item_ids": extra.item_ids, "memory_values": extra.values}
        return found

    def item_tower(self, weights: Weights, inputs: Inputs) -> dict[str, jax.Array]:
        """v(y) and b_y: `vectors` `[B, D]` and `bias` `[B]` of `item_ids` `[B]`.

        Where the model reads text, an item of id 0 is what its `token_ids` `[B, T]` say; else its vector is zeros.
        """
        item_ids = self._known(inputs["item_ids"])
        vectors, bias = weights[VECTORS].rows(item_ids), weights[BIAS].rows(item_ids)
        if self.config.text is not None:
            model, token_ids = self._model(weights), inputs["token_ids"]
            texts = model.text.project(model.text.encode(token_ids, key=None))
            texts = jnp.where(jnp.any(token_ids > 0, axis=-1, keepdims=True), texts, 0.0)
            vectors = jnp.where((item_ids > 0)[:, None], vectors, model.candidate_vectors(texts))
        return {"vectors": vectors, "bias": bias}

    def recommend(self, weights: Weights, inputs: Inputs, *, k: int) -> dict[str, jax.Array]:
        """The best items that are not among `exclude_ids` `[B, X]`: `top_item_ids`, `top_scores` `[B, k]`.

        The best come first, ties go to the smaller id. Places that no item fills hold id 0 and -infinity.
        """
        query, extra = self._query(weights, inputs)
        scores = jnp.einsum("bd,nd->bn", query, weights[VECTORS].decode()) + weights[BIAS].decode()
        users = jnp.arange(query.shape[0], dtype=jnp.int32)[:, None]
        if extra is not None:
            scores = scores.at[users, extra.item_ids].add(extra.values)
        if self.has_domains:
            # 0 = the user's domain is unknown: nothing is masked.
            own = inputs["domain_ids"][:, None]
            scores = jnp.where((weights[DOMAINS].decode()[None, :] == own) | (own == 0), scores, -jnp.inf)
        scores = scores.at[users, self._known(inputs["exclude_ids"])].set(-jnp.inf)
        return _best(scores, k)

    def rank(self, weights: Weights, inputs: Inputs) -> dict[str, jax.Array]:
        """The scores of `candidate_ids` `[B, C]`: `scores` `[B, C]`; -infinity for what the catalogue does not know."""
        query, extra = self._query(weights, inputs)
        candidates = self._known(inputs["candidate_ids"])
        vectors, bias = weights[VECTORS].rows(candidates), weights[BIAS].rows(candidates)
        scores = jnp.einsum("bd,bcd->bc", query, vectors) + bias
        if extra is not None:
            same = extra.item_ids[:, None, :] == candidates[:, :, None]
            scores = scores + jnp.sum(jnp.where(same, extra.values[:, None, :], 0.0), axis=-1)
        return {"scores": jnp.where(candidates > 0, scores, -jnp.inf)}

    def behaviours(self, weights: Weights, inputs: Inputs) -> dict[str, jax.Array]:
        """What the user will do with each candidate: `probabilities` `[B, C, K]`, by the data's columns."""
        model = self._model(weights)
        logits = model.behaviour_logits(*self._pairs(model, weights, inputs))
        for task in self.tasks.values():
            logits = task.predicted_logits(logits, self.facts)
        return {"probabilities": jax.nn.sigmoid(logits)}

    def values(self, weights: Weights, inputs: Inputs) -> dict[str, jax.Array]:
        """The number that the user will give each candidate: `values` `[B, C]`, in the data's own unit."""
        facts = self.facts.value
        assert isinstance(facts, ValueFacts), "a task of values has checked that there are some"
        model = self._model(weights)
        found = model.values(*self._pairs(model, weights, inputs))
        return {"values": facts.mean + facts.deviation * found}

    def search(self, weights: Weights, inputs: Inputs, *, k: int) -> dict[str, jax.Array]:
        """The items nearest to a text, `token_ids` `[B, T]`, by cosine: `top_item_ids`, `top_scores` `[B, k]`."""
        queries = self._model(weights).text_queries(inputs["token_ids"], key=None)
        return _best(jnp.einsum("bd,nd->bn", queries, unit_vectors(weights[VECTORS].decode())), k)

    def _model(self, weights: Weights) -> TwoTower:
        """The towers; parameters that no program reads are not among the weights, and stand as zeros."""
        graphdef, abstract = split_model(self.config, self.outputs)
        return merge_model(graphdef, abstract, unflatten_dense(abstract, weights))

    def _known(self, item_ids: Int[Array, "*b"]) -> Int[Array, "*b"]:
        """Ids of the catalogue, 0 in the place of others."""
        return jnp.where((item_ids >= 0) & (item_ids <= self.facts.num_items), item_ids, 0)

    def _query(self, weights: Weights, inputs: Inputs) -> tuple[Float[Array, "B D"], SparseLogits | None]:
        model, history = self._model(weights), self._history(inputs)
        if self.masked:
            history = history.with_slot()
        states = self._states(model, weights, inputs, history, causal=not self.masked)
        query = model.queries(states) / self.temperature
        if not self.masked:
            query = jnp.where(history.any_event[:, None], query, 0.0)
        if self.config.memory is None:
            return query, None
        extra = self._memory(model, weights, states, history, self.config.memory.window)
        return query, dataclasses.replace(extra, values=extra.values * history.any_event[:, None])

    def _pairs(
        self, model: TwoTower, weights: Weights, inputs: Inputs
    ) -> tuple[Float[Array, "B C D"], Float[Array, "B C D"]]:
        """The query after the history in the context of each candidate, and the candidate's vector."""
        history = self._history(inputs)
        candidates = self._known(inputs["candidate_ids"])
        query = model.queries(self._states(model, weights, inputs, history, causal=True))
        items = weights[VECTORS].rows(candidates)
        queries = jnp.broadcast_to(query[:, None], items.shape)
        if self.config.context_rows:
            queries = model.in_context(queries, inputs["candidate_context"])
        return queries, items

    def _states(
        self, model: TwoTower, weights: Weights, inputs: Inputs, history: "History", *, causal: bool
    ) -> Float[Array, "B E"]:
        item_ids = history.item_ids
        events = weights[EVENTS if EVENTS in weights else VECTORS].rows(item_ids)
        batch = history.batch(inputs, self.outputs.read_behaviours)
        user_rows = None
        if self.config.user_dim:
            rows = weights[USER_ROWS]
            known = (batch.user_ids >= 0) & (batch.user_ids < rows.shape[0])
            user_rows = rows.rows(jnp.where(known, batch.user_ids, 0))
        states = model.encode(
            events, batch, causal=causal, key=None, user_rows=user_rows,
            masked=history.slot, last_positions=history.last[:, None],
        )  # fmt: skip
        # Nobody says when a list will be read: the gap to it is unknown, as it sometimes is in training.
        return model.at_time(states[:, 0], jnp.zeros_like(states[:, 0, 0], jnp.int32))

    def _memory(
        self, model: TwoTower, weights: Weights, states: Float[Array, "B E"], history: "History", window: int
    ) -> SparseLogits:
        """From the rows of the latest events, newest first."""
        columns = history.last[:, None] - jnp.arange(window, dtype=jnp.int32)
        at = jnp.maximum(columns, 0)
        found = jnp.take_along_axis(history.item_ids, at, axis=1)
        event_ids = jnp.where(columns >= 0, found, 0)
        successors, counts = (weights[MEMORY + name].rows(event_ids) for name in (SUCCESSORS, COUNTS))
        return model.memory(states, MemoryRows(event_ids, successors, counts))

    def _history(self, inputs: Inputs) -> "History":
        item_ids = self._known(inputs["item_ids"])
        # A slot takes one of the places.
        places = self.max_events - self.masked
        later = jnp.cumsum((item_ids > 0).astype(jnp.int32)[:, ::-1], axis=1)[:, ::-1]
        return History(jnp.where(later <= places, item_ids, 0))


@dataclasses.dataclass(frozen=True)
class History:
    """Rows of events, and where one may be an empty slot behind the last event.

    Attributes:
      item_ids: 0 = no event.
      slot: True = the empty slot; None = there are no slots.
    """

    item_ids: Int[Array, "B L"]
    slot: Bool[Array, "B L"] | None = None

    @property
    def columns(self) -> Int[Array, "1 L"]:
        """0, 1, ..."""
        return jnp.arange(self.item_ids.shape[1], dtype=jnp.int32)[None, :]

    @property
    def used(self) -> Bool[Array, "B L"]:
        """True = an event or the slot."""
        events = self.item_ids > 0
        return events if self.slot is None else events | self.slot

    @property
    def last(self) -> Int[Array, "B"]:
        """The column of the last event, or of the slot; 0 where there is neither."""
        return jnp.max(jnp.where(self.used, self.columns, 0), axis=1)

    @property
    def any_event(self) -> Bool[Array, "B"]:
        """Whether there is an event."""
        return jnp.any(self.item_ids > 0, axis=1)

    def with_slot(self) -> "History":
        """One column more, and the slot right behind the last event."""
        item_ids = jnp.concatenate([self.item_ids, jnp.zeros_like(self.item_ids[:, :1])], axis=1)
        longer = History(item_ids)
        place = jnp.where(self.any_event, self.last + 1, 0)
        return History(item_ids, longer.columns == place[:, None])

    def batch(self, inputs: Inputs, read_behaviours: int) -> Batch:
        """As the encoder reads it: each row is one segment."""
        used = self.used
        segments = used.astype(jnp.int32)
        positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
        absent = jnp.zeros_like(self.item_ids)
        seconds, labels = absent - 1, jnp.zeros((*absent.shape, 0), jnp.int32)
        if "seconds" in inputs:
            seconds = self._widened(inputs["seconds"], UNKNOWN_SECONDS)
        if read_behaviours:
            labels = self._widened(inputs["labels"], -1)
        spread = lambda name: jnp.where(used, inputs[name][:, None], 0) if name in inputs else absent  # noqa: E731
        return Batch(
            item_ids=self.item_ids,
            user_ids=spread("user_ids"),
            segment_ids=segments,
            positions=positions,
            time_gaps=_time_gaps(seconds, used, positions == 0),
            times=jnp.maximum(seconds, UNKNOWN_SECONDS),
            labels=labels,
            values=absent.astype(jnp.float32),
            domain_ids=spread("domain_ids"),
        )

    def _widened(self, values: Int[Array, "B l *k"], padding: int) -> Int[Array, "B L *k"]:
        if self.slot is None:
            return values
        return jnp.concatenate([values, jnp.full_like(values[:, :1], padding)], axis=1)


def serving_config(config: TwoTowerConfig) -> TwoTowerConfig:
    """The towers as they are asked of one history a row: float32, whole parameters, attention written out.

    All paths of the attention give the same; the one that is written out is the one that other runtimes know.
    """
    how = {"attention": "full", "dtype": "float32", "gather_dtype": "float32", "layout": "replicated"}
    served: dict[str, Any] = how | {"remat": False, "scan_layers": False}
    text = config.text
    if text is not None:
        text = dataclasses.replace(text, encoder=dataclasses.replace(text.encoder, **served))
    return dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, **served), text=text)


def flatten_dense(dense: Mapping[str, Any]) -> dict[str, Any]:
    """The dense parameters by their path: `dense/encoder/blocks/0/...`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(dict(dense))
    return {DENSE + "/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def unflatten_dense(abstract: nnx.State, weights: Weights) -> dict[str, Any]:
    """Inverse of `flatten_dense`; zeros for what is not there."""
    pure = nnx.to_pure_dict(abstract)
    leaves = {
        name: weights[name].decode() if name in weights else jnp.zeros(leaf.shape, leaf.dtype)
        for name, leaf in flatten_dense(pure).items()
    }
    return jax.tree.unflatten(jax.tree.structure(pure), list(leaves.values()))


def _best(scores: Float[Array, "B V"], k: int) -> dict[str, jax.Array]:
    padding = jnp.arange(scores.shape[1], dtype=jnp.int32) == 0
    values, places = jax.lax.top_k(jnp.where(padding, -jnp.inf, scores), k)
    return {"top_item_ids": jnp.where(jnp.isneginf(values), 0, places), "top_scores": values}


def _time_gaps(
    seconds: Int[Array, "B L"], used: Bool[Array, "B L"], first: Bool[Array, "B L"]
) -> Int[Array, "B L"]:
    """Buckets of the time since the column before, as `data.rows` makes them."""
    before = jnp.pad(seconds[:, :-1], ((0, 0), (1, 0)), constant_values=UNKNOWN_SECONDS)
    unknown = first | ~used | (seconds <= UNKNOWN_SECONDS) | (before <= UNKNOWN_SECONDS)
    gaps = jnp.maximum(seconds - before, 0)
    return jnp.where(unknown, 0, jnp.minimum(bit_lengths(gaps) + 1, NUM_TIME_GAPS - 1))


Program = Callable[[Weights, Inputs], dict[str, jax.Array]]
