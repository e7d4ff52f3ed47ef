"""One version of a model, ready to be asked: the user tower in a few fixed sizes, and the catalogue as arrays.

The tower is compiled for each size of batch and of history that it will be asked with, before the first request comes.
N = items, D = item dim, B = users, L = events.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import jax
import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from jaxrec.evaluation.word_index import TfIdf, WordIndex
from jaxrec.export.bundle import Bundle, Event
from jaxrec.export.catalogue import Key, read_histories
from jaxrec.serving.rules import ItemFacts

__all__ = ["History", "Query", "Version"]

BATCH_SIZES = (1, 4, 16)
SHORTEST = 16


@dataclasses.dataclass(frozen=True)
class History:
    """What the tower reads of a user.

    Attributes:
      events: oldest first, in own ids.
      user_id: None = a guest.
    """

    events: tuple[Event, ...]
    user_id: Key | None = None


@dataclasses.dataclass(frozen=True)
class Query:
    """The user's side of the score.

    Attributes:
      vector: M(x) W.
      extra_ids, extra_values: what the memory adds to the scores of a few items; 0 = none.
    """

    vector: Float[np.ndarray, " d"]
    extra_ids: Int[np.ndarray, " m"]
    extra_values: Float[np.ndarray, " m"]


class Version:
    """A bundle in use; made by `open`.

    Attributes:
      name: of the version.
      vectors, bias: v(y) and b_y by item id.
      popularity: training events of each item.
    """

    def __init__(self, bundle: Bundle):
        self.bundle = bundle
        self.name = bundle.manifest.version
        self.vectors = np.ascontiguousarray(bundle.item_vectors)
        self.bias = np.asarray(bundle.item_bias, np.float32)
        table = bundle.catalogue.table
        self.categories: list[list[str]] = table["categories"].to_pylist()
        self.popularity = np.append(0, table["train_count"].to_numpy()).astype(np.int64)
        self.facts = ItemFacts.of(self.categories)
        self._tower = bundle.program("user_tower")
        self._wanted = {array["name"] for array in bundle.manifest.programs["user_tower"]["inputs"]}

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
    def word_index(self) -> WordIndex:
        """Of titles and categories."""
        titles = self.bundle.catalogue.titles[1:]
        return TfIdf().fit(
            [" ".join((title, *names)) for title, names in zip(titles, self.categories, strict=True)]
        )

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """Sizes of histories that the tower is compiled for: four times as long each, up to the longest."""
        most = self.bundle.facts["max_events"]
        sizes = [SHORTEST]
        while sizes[-1] * 4 < most:
            sizes.append(sizes[-1] * 4)
        return (*(size for size in sizes if size < most), most)

    def history(self, user_id: str) -> list[Event]:
        """The events that the user had when the version was exported, where it was exported with histories."""
        row = self._rows_of_users.get(user_id)
        if row is None:
            return []
        found = self._histories.slice(row, 1).to_pylist()[0]
        return [
            Event(key, seconds=None if seconds < 0 else seconds)
            for key, seconds in zip(found["item_ids"], found["seconds"], strict=True)
        ]

    @property
    def known_users(self) -> list[str]:
        """Those that the version has histories of."""
        return list(self._rows_of_users)

    @functools.cached_property
    def _rows_of_users(self) -> dict[str, int]:
        keys = self._histories["user_id"].to_pylist()
        return {str(key): row for row, key in enumerate(keys)}

    @functools.cached_property
    def _histories(self) -> pa.Table:
        return read_histories(self.bundle.directory)

    def warm_up(self) -> None:
        """Compiles, and runs once, every size; makes what is made at the first use."""
        _ = self.known_users
        for batch_size in BATCH_SIZES:
            for length in self.lengths:
                key = self.bundle.catalogue.vocabulary.key_of(1)
                self._run([History((Event(key),) * length)] * batch_size)

    def encode(self, histories: Sequence[History]) -> list[Query]:
        """The queries of users, each with its own history."""
        found: list[Query] = []
        for start in range(0, len(histories), BATCH_SIZES[-1]):
            found += self._run(histories[start : start + BATCH_SIZES[-1]])
        return found

    def _run(self, histories: Sequence[History]) -> list[Query]:
        inputs = self._inputs(histories)
        found = jax.device_get(self._tower(inputs))
        vectors = found["query"]
        ids = found.get("memory_item_ids", np.zeros((len(vectors), 0), np.int32))
        values = found.get("memory_values", np.zeros((len(vectors), 0), np.float32))
        return [Query(vectors[row], ids[row], values[row]) for row in range(len(histories))]

    def _inputs(self, histories: Sequence[History]) -> dict[str, np.ndarray]:
        """Padded to the smallest size that holds them."""
        made = self.bundle.history_inputs(
            [history.events for history in histories], user_ids=[history.user_id for history in histories]
        )
        ids = made["item_ids"]
        longest = int(np.max(np.count_nonzero(ids, axis=1), initial=1))
        length = next(size for size in self.lengths if size >= longest)
        rows = next(size for size in BATCH_SIZES if size >= len(histories))
        if "domain_ids" in self._wanted:
            made["domain_ids"] = np.zeros(len(ids), np.int32)
        return {
            name: _fitted(array, rows, length if array.ndim > 1 else None)
            for name, array in made.items()
            if name in self._wanted
        }


def _fitted(array: np.ndarray, rows: int, length: int | None) -> np.ndarray:
    """Cut and padded; what stands beside an id of 0, which is no event, is never read."""
    array = array[:rows] if length is None else array[:rows, :length]
    widths = [(0, rows - len(array))]
    if length is not None:
        widths.append((0, length - array.shape[1]))
    return np.pad(array, widths + [(0, 0)] * (array.ndim - len(widths)))
