"""One version of a model, ready to be asked: the user tower in a few fixed sizes, and the catalogue as arrays.

The tower is compiled for each size of batch and of history that it will be asked with, before the first request comes.
N = items, D = item dim, B = users, L = events.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Self

import jax
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from jaxrec.evaluation.word_index import TfIdf, WordIndex
from jaxrec.export.bundle import Bundle
from jaxrec.export.candidates import read_candidates
from jaxrec.export.catalogue import Catalogue, Key, read_histories
from jaxrec.export.compiled import Shared
from jaxrec.export.events import EventLabels, UserEvents
from jaxrec.export.item_index import ItemIndex
from jaxrec.export.layout import BATCH_SIZES, USER_TOWER, history_lengths
from jaxrec.serving.rules import ItemFacts

__all__ = ["History", "Query", "Version", "unit_rows"]


@dataclasses.dataclass(frozen=True, eq=False)
class History:
    """What the tower reads of a user.

    Attributes:
      user_id: own id; None = a guest.
    """

    events: UserEvents
    user_id: Key | None = None


@dataclasses.dataclass(frozen=True)
class Query:
    """The user's side of the score.

    Attributes:
      vector: M(x) W.
      extra_ids, extra_values: what the memory adds to the scores of a few items; 0 = none.
      scores: of all items of the version; None = an index is asked instead.
    """

    vector: Float[np.ndarray, " d"]
    extra_ids: Int[np.ndarray, " m"]
    extra_values: Float[np.ndarray, " m"]
    scores: Float[np.ndarray, " n_plus_1"] | None = None


class _Words:
    """What titles and categories say of items: made once for all versions whose items have the same ones."""

    def __init__(self, catalogue: Catalogue):
        titles = catalogue.titles[1:]
        categories: list[list[str]] = catalogue.table["categories"].to_pylist()
        self.facts = ItemFacts.of(categories)
        self.index = TfIdf().fit(
            [" ".join((title, *names)) for title, names in zip(titles, categories, strict=True)]
        )

    @classmethod
    def of(cls, catalogue: Catalogue) -> "_Words":
        table = catalogue.table.select(["title", "categories"])
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return _WORDS.of(sink.getvalue(), lambda: cls(catalogue))


_WORDS: Shared[_Words] = Shared()


class Version:
    """A bundle in use; made by `open`.

    Attributes:
      name: of the version.
      popularity: training events of each item.
      others: other methods that know the items.
      event_labels: how events become labels; None = the model reads none.
    """

    def __init__(self, bundle: Bundle):
        self.bundle = bundle
        self.name = bundle.manifest.version
        table = bundle.catalogue.table
        self.popularity = np.append(0, table["train_count"].to_numpy()).astype(np.int64)
        self.others = read_candidates(bundle.directory)
        self._of_texts: dict[str, np.ndarray] = {}
        self._tower = bundle.program(USER_TOWER)
        self.event_labels = EventLabels.of_facts(bundle.facts) if bundle.facts["reads"]["labels"] else None

    @classmethod
    def open(cls, directory: str | Path) -> Self:
        """Checks every file, compiles every size.

        Raises:
          ValueError: a file is damaged, or the format is another one.
        """
        version = cls(Bundle.open(directory))
        version.warm_up()
        return version

    @property
    def num_items(self) -> int:
        """N."""
        return len(self.bundle.catalogue.vocabulary)

    @functools.cached_property
    def vectors(self) -> Float[np.ndarray, "n_plus_1 d"]:
        """v(y) by item id."""
        return np.ascontiguousarray(self.bundle.item_vectors)

    @functools.cached_property
    def unit(self) -> Float[np.ndarray, "n_plus_1 d"]:
        """The vectors over their lengths."""
        return unit_rows(self.vectors)

    @functools.cached_property
    def bias(self) -> Float[np.ndarray, " n_plus_1"]:
        """b_y by item id."""
        return np.asarray(self.bundle.item_bias, np.float32)

    @functools.cached_property
    def by_popularity(self) -> Int[np.ndarray, " n"]:
        """All items, the most popular first."""
        return 1 + np.argsort(-self.popularity[1:], kind="stable")

    @functools.cached_property
    def index(self) -> ItemIndex | None:
        """None = all items are looked at."""
        return ItemIndex.read(self.bundle.directory, self.bundle.facts)

    @functools.cached_property
    def _words(self) -> _Words:
        return _Words.of(self.bundle.catalogue)

    @property
    def facts(self) -> ItemFacts:
        """What rules know of the items."""
        return self._words.facts

    @property
    def word_index(self) -> WordIndex:
        """Of titles and categories."""
        return self._words.index

    @property
    def reads_text(self) -> bool:
        """Whether a new item's text says what its vector is."""
        return bool(self.bundle.facts["reads"]["text_tokens"])

    def vector_of(self, text: str) -> Float[np.ndarray, " d"]:
        """v(y) of a new item; each text is encoded once, until `keep_texts` leaves it out."""
        if text not in self._of_texts:
            self._of_texts[text] = self.bundle.vectors_of_texts([text])[0]
        return self._of_texts[text]

    def keep_texts(self, texts: Set[str]) -> None:
        """Forgets the vectors of all other texts: an item's may change without end."""
        self._of_texts = {text: vector for text, vector in self._of_texts.items() if text in texts}

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """Sizes of histories that the tower is compiled for."""
        return history_lengths(self.bundle.facts["max_events"])

    def history(self, user_id: str) -> UserEvents:
        """The events that the user had when the version was exported, where it was exported with histories."""
        row = self._rows_of_users.get(user_id)
        if row is None:
            return UserEvents.of_items(np.zeros(0, np.int64))
        offsets, events = self._events
        its = np.arange(offsets[row], offsets[row + 1])
        return events.at(its[events.item_ids[its] > 0])

    @property
    def known_users(self) -> list[str]:
        """Those that the version has histories of."""
        return list(self._rows_of_users)

    @functools.cached_property
    def _rows_of_users(self) -> dict[str, int]:
        keys = self._histories["user_id"].to_pylist()
        return {str(key): row for row, key in enumerate(keys)}

    @functools.cached_property
    def _events(self) -> tuple[np.ndarray, UserEvents]:
        """Where each user's begin, and those of all users; item 0 = it is not in the catalogue."""
        table = self._histories
        lists = {name: table[name].combine_chunks() for name in table.column_names if name != "user_id"}
        flat = {name: array.values for name, array in lists.items()}
        keys = flat["item_ids"]
        ids = pc.fill_null(
            pc.index_in(keys, value_set=self.bundle.catalogue.vocabulary.keys.cast(keys.type)), -1
        )
        labels = None
        if self.event_labels is not None and "labels" in flat:
            labels = flat["labels"].to_numpy().reshape(-1, len(self.event_labels.behaviours))
        events = UserEvents(
            ids.to_numpy(zero_copy_only=False).astype(np.int64) + 1,
            flat["seconds"].to_numpy(zero_copy_only=False).astype(np.int64),
            labels,
        )
        return lists["item_ids"].offsets.to_numpy(), events

    @functools.cached_property
    def _histories(self) -> pa.Table:
        return read_histories(self.bundle.directory)

    def warm_up(self) -> None:
        """Compiles; reads what would be read at the first request that asks."""
        self.compile()
        _ = self.unit, self.bias, self.by_popularity, self.index, self._words, self.known_users, self._events

    def compile(self) -> None:
        """Compiles every size that no version has had, and reads no more than that takes."""
        if self.reads_text:
            self.bundle.vectors_of_texts([""])
        for batch_size in BATCH_SIZES:
            for length in self.lengths:
                histories = [History(UserEvents.of_items(np.ones(length, np.int64)))] * batch_size
                self._tower.warm_up(self.inputs(USER_TOWER, histories, batch_size, length))

    def encode(self, histories: Sequence[History]) -> list[Query]:
        """The queries of users, each with its own history; those of about the same length are computed together."""
        found: dict[int, Query] = {}
        for rows, num_rows, length in self.batches(histories):
            queries = self._run([histories[row] for row in rows], num_rows, length)
            found.update(zip(rows, queries, strict=True))
        return [found[row] for row in range(len(histories))]

    def batches(self, histories: Sequence[History]) -> Iterator[tuple[list[int], int, int]]:
        """Which of the histories are computed together, and the compiled size: rows and events."""
        size_of = [self._length_of(history) for history in histories]
        for length in sorted(set(size_of)):
            group = [row for row, size in enumerate(size_of) if size == length]
            while group:
                num_rows = _batch_size(len(group))
                rows, group = group[:num_rows], group[num_rows:]
                yield rows, num_rows, length

    def _length_of(self, history: History) -> int:
        """The smallest compiled size that holds it; of longer ones the latest events are read."""
        return next((size for size in self.lengths if size >= len(history.events)), self.lengths[-1])

    def inputs(
        self, program: str, histories: Sequence[History], num_rows: int, length: int
    ) -> dict[str, np.ndarray]:
        """What a program reads of users."""
        inputs = self.bundle.history_inputs(
            [history.events for history in histories],
            num_rows=num_rows,
            length=length,
            user_ids=[history.user_id for history in histories],
        )
        inputs["domain_ids"] = np.zeros(num_rows, np.int32)
        return {name: array for name, array in inputs.items() if name in self._read_by[program]}

    @functools.cached_property
    def _read_by(self) -> dict[str, set[str]]:
        """The inputs of each program."""
        programs = self.bundle.manifest.programs
        return {name: {array["name"] for array in told["inputs"]} for name, told in programs.items()}

    def _run(self, histories: Sequence[History], num_rows: int, length: int) -> list[Query]:
        found = jax.device_get(self._tower(self.inputs(USER_TOWER, histories, num_rows, length)))
        count = len(histories)
        vectors = found["query"][:count]
        ids = found.get("memory_item_ids", np.zeros((count, 0), np.int32))
        values = found.get("memory_values", np.zeros((count, 0), np.float32))
        if self.index is not None:
            return [Query(vectors[row], ids[row], values[row]) for row in range(count)]
        # Here, and not where lists are made: this thread leaves the interpreter to the others while it multiplies.
        scores = vectors @ self.vectors.T
        scores += self.bias
        for row in range(count):
            np.add.at(scores[row], ids[row], values[row])
        return [Query(vectors[row], ids[row], values[row], scores[row]) for row in range(count)]


def unit_rows(vectors: Float[np.ndarray, "r d"]) -> Float[np.ndarray, "r d"]:
    """Rows over their lengths; zeros stay."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _batch_size(num_histories: int) -> int:
    """The largest size that is filled, or the next one where no more than a quarter of it stays empty."""
    filled = max(size for size in BATCH_SIZES if size <= num_histories)
    return next((size for size in BATCH_SIZES if num_histories < size <= num_histories * 4 / 3), filled)
