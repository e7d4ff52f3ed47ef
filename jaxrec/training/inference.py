"""A trained state put to use: queries of users, vectors of items, logits of behaviours.

N = users of an evaluation batch, Q = text queries, D = item dim, R = physical rows, K = behaviours.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxrec.core.sparse_logits import SparseLogits
from jaxrec.data.evaluation_batches import EvaluationBatch
from jaxrec.embedding.engine import in_rows, join_shared, look_up, lookup, split_shared
from jaxrec.models.memory import COUNTS, SUCCESSORS, MemoryRows
from jaxrec.models.two_tower import ITEM, ITEM_BIAS, USER, TwoTower
from jaxrec.training.item_text import kept_texts, looked_up_arrays, with_texts
from jaxrec.training.setup import Setup, evaluation_parameters, place_batch, table_bias
from jaxrec.training.state import TrainState
from jaxrec.training.text_cache import VECTORS
from jaxrec.training.text_refresh import TextEncoding


class Inference:
    """Asks the model of `state`; call its methods under `jax.set_mesh(setup.mesh)`."""

    def __init__(self, setup: Setup, state: TrainState):
        self.setup = setup
        self.dense, tables = evaluation_parameters(state)
        # Tables that live on the host stay there; the rows that a batch wants go with it.
        self.tables = {name: table for name, table in tables.items() if name not in setup.cache_rows}
        self.memory = state.memory
        # Encoded with the parameters that are asked, the averages where the run keeps them.
        self.texts = {}
        if setup.model.text is not None:
            vectors = TextEncoding(setup).vectors(self.dense, state)
            self.texts = looked_up_arrays(state.texts | {VECTORS: vectors})
        self._host_users = np.asarray(tables[USER]) if USER in setup.cache_rows else None
        self._replicated = NamedSharding(setup.mesh, PartitionSpec())
        self._queries = jax.jit(self._query, out_shardings=self._replicated)
        self._behaviours = jax.jit(self._behaviour, out_shardings=self._replicated)
        self._values = jax.jit(self._value, out_shardings=self._replicated)
        self._whole = jax.jit(self._with_texts)
        self._text_queries = jax.jit(self._text_query, out_shardings=self._replicated)

    @property
    def appends_slot(self) -> bool:
        """Whether histories must end with an empty slot that the mask vector fills (masked query mode)."""
        return self.setup.ranking_task.query_mode == "masked"

    def queries(
        self, batch: EvaluationBatch, *, dense: Any = None
    ) -> tuple[Float[Array, "N D"], SparseLogits | None]:
        """M(x) W of every user of the batch, and what the memory adds to the scores; replicated.

        Args:
          dense: parameters to ask in the place of the state's; None = the state's.
        """
        dense = self.dense if dense is None else dense
        return self._queries(dense, self.tables, self.memory, self.texts, self.place(batch))

    def text_queries(self, token_ids: Int[np.ndarray, "q t"]) -> Float[Array, "q D"]:
        """Unit vectors of texts that items are searched by, as the task QueryItem trains them; replicated.

        Raises:
          ValueError: the model reads no text.
        """
        if self.setup.model.text is None:
            raise ValueError("model.text is none: the run reads no text, and cannot be searched by one.")
        missing = -len(token_ids) % self.setup.mesh.size
        placed = jax.device_put(np.pad(token_ids, ((0, missing), (0, 0))), self._replicated)
        return self._text_queries(self.dense, placed)[: len(token_ids)]

    def catalogue(self) -> tuple[Float[Array, "R D"], Float[Array, "R"]]:
        """v(y) and b_y of every physical row, sharded as the table is."""
        tables = self._whole_tables(self.setup.model.scored_table, ITEM_BIAS)
        vectors = self.model_of(self.dense).candidate_vectors(tables[self.setup.model.scored_table])
        return vectors, table_bias(tables, ITEM_BIAS, vectors)

    def event_vectors(self) -> Float[Array, "R D"]:
        """Every physical row's item as the user tower reads it in an event, sharded as the table is."""
        return self._whole_tables(ITEM)[ITEM]

    def _whole_tables(self, *names: str) -> dict[str, jax.Array]:
        """Those of the tables that the model has, the items' with their text."""
        tables = {
            name: in_rows(
                self.tables[name], self.setup.tables[name].num_rows, self.setup.tables[name].placement
            )
            for name in names
            if name in self.setup.tables
        }
        return tables | self._whole(self.dense, tables, self.texts) if self.texts else tables

    def behaviour_logits(self, batch: EvaluationBatch) -> Float[Array, "N K"]:
        """Logits of the target event's behaviours, from the history before it and its item.

        Raises:
          ValueError: the run has no behaviour task.
        """
        if not self.setup.outputs.num_behaviours:
            raise ValueError(f"tasks={', '.join(self.setup.step.tasks)}: none of them learns behaviours.")
        return self._behaviours(self.dense, self.tables, self.texts, self.place(batch))

    def values(self, batch: EvaluationBatch) -> Float[Array, "N"]:
        """The number beside the target event, as the history before it and its item let expect.

        Raises:
          ValueError: the run has no task of values.
        """
        if not self.setup.outputs.values:
            raise ValueError(f"tasks={', '.join(self.setup.step.tasks)}: none of them learns values.")
        return self._values(self.dense, self.tables, self.texts, self.place(batch))

    def place(self, batch: EvaluationBatch) -> dict[str, Any]:
        """Histories are split over the devices, what is asked about them is replicated."""
        placed: dict[str, Any] = {"batch": place_batch(batch.batch, self.setup.mesh)}
        placed["last_positions"] = place_batch(batch.last_positions, self.setup.mesh)
        if self._host_users is not None:
            ids = np.asarray(batch.batch.user_ids)
            rows = self._host_users[np.where(ids < len(self._host_users), ids, 0)]
            placed["user_rows"] = place_batch(rows, self.setup.mesh)
        for name in ("rows", "columns", "slots", "targets", "target_gaps"):
            placed[name] = gather_to_all(getattr(batch, name), self._replicated)
        if batch.target_context is not None:
            placed["target_context"] = gather_to_all(batch.target_context, self._replicated)
        return placed

    def model_of(self, dense: Any) -> TwoTower:
        """The model with these dense parameters, whole on every device."""
        return self.setup.step.model(dense)

    def _look_up(self, tables: dict[str, jax.Array], name: str, ids: jax.Array) -> jax.Array:
        return lookup(tables[name], ids, self.setup.tables[name].placement)

    def _item_vectors(
        self,
        model: TwoTower,
        tables: dict[str, jax.Array],
        texts: dict[str, jax.Array],
        ids: jax.Array,
        name: str = ITEM,
    ) -> Float[Array, "*b D"]:
        """Vectors of items, from table `name`; the leading dim of the ids is split over the devices."""
        rows = self._look_up(tables, name, ids)
        if not texts:
            return rows
        found, _, _ = look_up(texts, {"": ids})
        of_ids = {name: of_array[""] for name, of_array in found.items()}
        return model.item_vectors(rows, kept_texts(model.text, of_ids))

    def _with_texts(
        self, dense: Any, tables: dict[str, jax.Array], texts: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        model = self.model_of(dense)
        return with_texts(model, tables, kept_texts(model.text, texts))

    def _user_rows(
        self, tables: dict[str, jax.Array], placed: dict[str, Any]
    ) -> Float[Array, "B L U"] | None:
        if "user_rows" in placed:
            return placed["user_rows"]
        return self._look_up(tables, USER, jnp.asarray(placed["batch"].user_ids)) if USER in tables else None

    def _query(
        self,
        dense: Any,
        tables: dict[str, jax.Array],
        memory: dict[str, jax.Array],
        texts: dict[str, jax.Array],
        placed: dict[str, Any],
    ) -> tuple[jax.Array, SparseLogits | None]:
        model = self.model_of(dense)
        events = self._item_vectors(model, tables, texts, placed["batch"].item_ids)
        asked, queries = self.ask(model, events, self._user_rows(tables, placed), placed)
        return queries, self._memory_logits(model, memory, asked, placed) if memory else None

    def ask(
        self,
        model: TwoTower,
        events: Float[Array, "B L D"],
        users: Float[Array, "B L U"] | None,
        placed: dict[str, Any],
    ) -> tuple[Float[Array, "N E"], Float[Array, "N D"]]:
        """The states that are asked, and the queries made of them, from the rows of a batch that `place` has placed."""
        batch = placed["batch"]
        masked = (batch.segment_ids > 0) & (batch.item_ids == 0) if self.appends_slot else None
        states = model.encode(
            events, batch, user_rows=users, causal=not self.appends_slot, key=None, masked=masked,
            last_positions=placed["last_positions"],
        )  # fmt: skip
        at = placed["rows"], placed["slots"]
        asked = model.at_time(states[at], placed["target_gaps"])
        return asked, model.queries(asked) / self.setup.ranking_task.temperature

    def _text_query(self, dense: Any, token_ids: jax.Array) -> jax.Array:
        return self.model_of(dense).text_queries(token_ids, key=None)

    def _memory_logits(
        self,
        model: TwoTower,
        memory: dict[str, jax.Array],
        states: Float[Array, "N E"],
        placed: dict[str, Any],
    ) -> SparseLogits:
        """From the rows of each user's latest events, newest first."""
        batch, window = placed["batch"], model.memory.config.window
        rows, columns = placed["rows"][:, None], placed["columns"][:, None] - jnp.arange(window)
        there = (columns >= 0) & (batch.segment_ids[rows, columns] == batch.segment_ids[rows, columns[:, :1]])
        event_ids = jnp.where(there, batch.item_ids[rows, columns], 0)
        found, _, _ = look_up(memory, {"": split_shared(event_ids.reshape(-1))})
        successors, counts = (
            join_shared(found[name][""], event_ids.size).reshape(*event_ids.shape, -1)
            for name in (SUCCESSORS, COUNTS)
        )
        return model.memory(states, MemoryRows(event_ids, successors, counts))

    def _behaviour(
        self, dense: Any, tables: dict[str, jax.Array], texts: dict[str, jax.Array], placed: dict[str, Any]
    ) -> jax.Array:
        model = self.model_of(dense)
        logits = model.behaviour_logits(*self._pairs(model, tables, texts, placed))
        for task in self.setup.step.tasks.values():
            logits = task.predicted_logits(logits, self.setup.step.facts)
        return logits

    def _value(
        self, dense: Any, tables: dict[str, jax.Array], texts: dict[str, jax.Array], placed: dict[str, Any]
    ) -> jax.Array:
        model, facts = self.model_of(dense), self.setup.step.facts.value
        assert facts is not None, "a task of values has checked that there are some"
        return facts.mean + facts.deviation * model.values(*self._pairs(model, tables, texts, placed))

    def _pairs(
        self,
        model: TwoTower,
        tables: dict[str, jax.Array],
        texts: dict[str, jax.Array],
        placed: dict[str, Any],
    ) -> tuple[Float[Array, "N D"], Float[Array, "N D"]]:
        """Of each user the query after the whole history, and the vector of the target."""
        batch = placed["batch"]
        events, users = (
            self._item_vectors(model, tables, texts, batch.item_ids),
            self._user_rows(tables, placed),
        )
        states = model.encode(events, batch, user_rows=users, causal=True, key=None)
        # The slot of a masked query is empty: the state before it has seen the whole history.
        columns = placed["columns"] - 1 if self.appends_slot else placed["columns"]
        asked = model.at_time(states[placed["rows"], columns], placed["target_gaps"])
        queries = model.queries(asked)
        if "target_context" in placed:
            queries = model.in_context(queries, placed["target_context"])
        targets = split_shared(placed["targets"])
        vectors = self._item_vectors(model, tables, texts, targets, self.setup.model.scored_table)
        items = model.candidate_vectors(join_shared(vectors, placed["targets"].size))
        return queries, items.astype(queries.dtype)


def gather_to_all(local: Any, replicated: NamedSharding) -> jax.Array:
    """Every process' part of an array, joined in the order of the processes, on every device."""
    if jax.process_count() == 1:
        return jax.device_put(local, replicated)
    joined = multihost_utils.process_allgather(local, tiled=True)
    return jax.make_array_from_callback(joined.shape, replicated, lambda index: joined[index])
