"""The catalogue as it is now: a version's items, those that came in since, and what is hidden.

A new item's vector is that of its text where the model reads text. Else it gets the mean of those of the items that its
words and categories are like. It has no score of its popularity. M = items of the view, D = item dim, C = candidates.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import numpy as np
import scipy.sparse as sparse
from jaxtyping import Float, Int

from jaxrec.evaluation.word_index import WordIndex
from jaxrec.export.catalogue import Key
from jaxrec.serving.rules import ItemFacts
from jaxrec.serving.store import AddedItem
from jaxrec.serving.version import Query, Version, unit_rows

__all__ = ["View"]

NEIGHBOURS = 20


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """Made by `of`; never changed.

    Attributes:
      revision: of the store.
      vectors, bias: by item id; new items come after those of the version.
      unit: the vectors over their lengths.
      titles: "" = none.
      added: the new items, in the order of their ids.
      ages: of items that came in earlier and are the version's now: id, seconds since 1970.
      words: of titles, texts and categories.
    """

    version: Version
    revision: int
    vectors: Float[np.ndarray, "m_plus_1 d"]
    bias: Float[np.ndarray, " m_plus_1"]
    unit: Float[np.ndarray, "m_plus_1 d"]
    popularity: Int[np.ndarray, " m_plus_1"]
    titles: list[str]
    facts: ItemFacts
    hidden: Int[np.ndarray, " h"]
    added: tuple[AddedItem, ...]
    ages: tuple[tuple[int, int], ...]
    words: WordIndex
    _ids: Mapping[str, int]

    @classmethod
    def of(
        cls,
        version: Version,
        items: Mapping[str, AddedItem],
        hidden: Iterable[str],
        revision: int,
        before: Self | None = None,
    ) -> Self:
        """A version with what the store says.

        Args:
          before: an earlier view of the version. Where no item has come in since, only what is hidden is made anew:
            shops hide items all the time.
        """
        vocabulary = version.bundle.catalogue.vocabulary
        rows = [(vocabulary.id_of(vocabulary.own(key)), item) for key, item in items.items()]
        new = tuple(item for row, item in rows if not row)
        # An update has given these a row since; they came in when they came in.
        ages = tuple((row, item.seconds) for row, item in rows if row)
        if before is None or (before.added, before.ages) != (new, ages):
            before = cls._with(version, new, ages)
        return dataclasses.replace(before, hidden=before.ids_of(hidden), revision=revision)

    @classmethod
    def _with(cls, version: Version, new: tuple[AddedItem, ...], ages: tuple[tuple[int, int], ...]) -> Self:
        """A version with new items, and nothing hidden."""
        whole = cls(
            version=version,
            revision=-1,
            vectors=version.vectors,
            bias=version.bias,
            unit=version.unit,
            popularity=version.popularity,
            titles=version.bundle.catalogue.titles,
            facts=_with_ages(version.facts, ages),
            hidden=np.zeros(0, np.int64),
            added=new,
            ages=ages,
            words=version.word_index,
            _ids={},
        )
        if not new:
            return whole
        vectors = np.stack([_vector(version, item) for item in new])
        version.keep_texts({_text_of(item) for item in new})
        return dataclasses.replace(
            whole,
            vectors=np.vstack([whole.vectors, vectors]),
            bias=np.append(whole.bias, np.full(len(new), np.median(whole.bias[1:]), np.float32)),
            unit=np.vstack([whole.unit, unit_rows(vectors)]),
            popularity=np.append(whole.popularity, np.zeros(len(new), np.int64)),
            titles=[*whole.titles, *(item.title for item in new)],
            facts=_facts(whole.facts, new),
            words=whole.words.with_items([_words_of(item) for item in new]),
            _ids={item.item_id: version.num_items + 1 + number for number, item in enumerate(new)},
        )

    @property
    def num_items(self) -> int:
        """M."""
        return len(self.titles) - 1

    def id_of(self, key: Key) -> int:
        """The view's id of an own id; 0 = unknown. A number as text is found where ids are numbers."""
        vocabulary = self.version.bundle.catalogue.vocabulary
        return vocabulary.id_of(vocabulary.own(key)) or self._ids.get(str(key), 0)

    def ids_of(self, keys: Iterable[Key]) -> Int[np.ndarray, " i"]:
        """Those that are known."""
        return np.array([found for key in keys if (found := self.id_of(key))], np.int64)

    def key_of(self, item_id: int) -> Key:
        """The own id: a new item's is a number, too, where ids are numbers and it is one."""
        base, vocabulary = self.version.num_items, self.version.bundle.catalogue.vocabulary
        if item_id > base:
            return vocabulary.own(self.added[item_id - base - 1].item_id)
        return vocabulary.key_of(item_id)

    @property
    def by_popularity(self) -> Int[np.ndarray, " m"]:
        """All items, the most popular first."""
        new = np.arange(self.version.num_items, self.num_items)
        return np.append(self.version.by_popularity, 1 + new) if self.added else self.version.by_popularity

    def scores_of(self, query: Query, item_ids: Int[np.ndarray, " c"]) -> Float[np.ndarray, " c"]:
        """The scores of some items, rising ids."""
        if query.scores is not None and not self.added:
            return query.scores[item_ids]
        scores = self.vectors[item_ids] @ query.vector + self.bias[item_ids]
        places = np.minimum(np.searchsorted(item_ids, query.extra_ids), len(item_ids) - 1)
        there = item_ids[places] == query.extra_ids if len(item_ids) else np.zeros(len(places), bool)
        np.add.at(scores, places[there], query.extra_values[there])
        return scores

    def scores(self, query: Query) -> Float[np.ndarray, " m_plus_1"]:
        """The score of every item; id 0 gets one that means nothing."""
        if query.scores is None:
            scores = self.vectors @ query.vector + self.bias
            np.add.at(scores, query.extra_ids, query.extra_values)
            return scores
        first = self.version.num_items + 1
        if not self.added:
            return query.scores
        return np.append(query.scores, self.vectors[first:] @ query.vector + self.bias[first:])


def _vector(version: Version, item: AddedItem) -> Float[np.ndarray, " d"]:
    """Of its text; of its words where the model reads none, or knows none of it."""
    if version.reads_text:
        vector = version.vector_of(_text_of(item))
        if vector.any():
            return vector
    return _of_words(version, item)


def _text_of(item: AddedItem) -> str:
    """As the data put it."""
    return ". ".join(part for part in (item.title, ", ".join(item.categories), item.text) if part)


def _of_words(version: Version, item: AddedItem) -> Float[np.ndarray, " d"]:
    """The mean of the vectors of the items that are most like it, by their likeness; zeros where none is."""
    likeness = version.word_index.cosines(_words_of(item))
    nearest = np.argsort(-likeness, kind="stable")[:NEIGHBOURS]
    weights = likeness[nearest]
    if not weights.sum():
        return np.zeros(version.vectors.shape[1], np.float32)
    return (weights @ version.vectors[nearest] / weights.sum()).astype(np.float32)


def _words_of(item: AddedItem) -> str:
    return " ".join((item.title, item.text, *item.categories))


def _with_ages(facts: ItemFacts, ages: Sequence[tuple[int, int]]) -> ItemFacts:
    if not ages:
        return facts
    rows, seconds = np.array(ages, np.int64).T
    added_at = facts.added_at.copy()
    added_at[rows] = seconds
    return dataclasses.replace(facts, added_at=added_at)


def _facts(there: ItemFacts, new: Sequence[AddedItem]) -> ItemFacts:
    of_new = ItemFacts.of([item.categories for item in new])
    names = tuple(sorted({*there.categories, *of_new.categories}))
    num_items = len(there.added_at) - 1
    size = num_items + 1 + len(new)
    at = {name: number for number, name in enumerate(names)}

    def widened(facts: ItemFacts, first_row: int) -> sparse.csr_array:
        parts = facts.membership.tocoo()
        places = np.array([at[name] for name in facts.categories], np.int64)
        columns = places[parts.col] if len(parts.col) else parts.col
        return sparse.csr_array((parts.data, (parts.row + first_row, columns)), shape=(size, len(names)))

    membership = widened(there, 0) + widened(of_new, num_items)
    return ItemFacts(
        categories=names,
        membership=sparse.csr_array(membership),
        added_at=np.append(there.added_at, np.array([item.seconds for item in new], np.int64)),
    )
