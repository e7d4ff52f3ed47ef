"""Which items may be shown: hard rules on the whole catalogue, caps within a list, boosts, and rules of a graph.

Hard rules are applied before the best items are taken, so that a list is full as long as anything is left. Ids are the
catalogue's internal ones, 1 .. N; 0 = none.

Rules are asked of the whole catalogue, or of some items of it. N = items, C = items that are asked about, E = edges of
a graph.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Self

import numpy as np
import scipy.sparse as sparse
from jaxtyping import Bool, Float, Int

__all__ = ["CategoryFilter", "ItemFacts", "Prerequisites", "Rules", "capped"]

Ids = Int[np.ndarray, " c"] | slice
EVERY = slice(None)  # every item, and padding


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ItemFacts:
    """What rules may know of items.

    Attributes:
      categories: names.
      membership: which item is in which category, row = item id.
      added_at: seconds since 1970 when the item came in; 0 = unknown.
    """

    categories: tuple[str, ...]
    membership: sparse.csr_array
    added_at: Int[np.ndarray, " n_plus_1"]

    @classmethod
    def of(
        cls,
        item_categories: Sequence[Collection[str]],
        *,
        added_at: Int[np.ndarray, " n_plus_1"] | None = None,
    ) -> Self:
        """From the names of each item's categories, item 1 first."""
        names = tuple(sorted({name for row in item_categories for name in row}))
        number = {name: index for index, name in enumerate(names)}
        columns = [sorted(number[name] for name in set(row)) for row in item_categories]
        ends = np.cumsum([0, 0, *map(len, columns)])
        flat = np.array([column for row in columns for column in row], np.int32)
        size = len(item_categories) + 1
        membership = sparse.csr_array((np.ones(len(flat), bool), flat, ends), shape=(size, len(names)))
        return cls(
            categories=names,
            membership=membership,
            added_at=np.zeros(size, np.int64) if added_at is None else added_at,
        )

    def in_any(self, names: Collection[str], item_ids: Ids = EVERY) -> Bool[np.ndarray, " c"]:
        """Which items are in one of these categories.

        Raises:
          ValueError: there is no such category.
        """
        number = {name: index for index, name in enumerate(self.categories)}
        unknown = sorted(set(names) - set(number))
        if unknown:
            some = ", ".join(self.categories[:20]) or "none"
            raise ValueError(f"category {unknown[0]!r}: the catalogue has {some}.")
        found = np.zeros(len(self.added_at), bool)
        starts, rows = self._items_of.indptr, self._items_of.indices
        for name in names:
            found[rows[starts[number[name]] : starts[number[name] + 1]]] = True
        return found[item_ids]

    @functools.cached_property
    def _items_of(self) -> sparse.csc_array:
        """The membership, by category."""
        return self.membership.tocsc()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CategoryFilter:
    """By category.

    Attributes:
      any_of: an item must be in one of these; () = need not.
      none_of: and in none of these.
    """

    any_of: tuple[str, ...] = ()
    none_of: tuple[str, ...] = ()

    def allowed(self, facts: ItemFacts, item_ids: Ids = EVERY) -> Bool[np.ndarray, " c"]:
        """Which items pass."""
        passed = np.ones(len(facts.added_at[item_ids]), bool)
        if self.any_of:
            passed &= facts.in_any(self.any_of, item_ids)
        if self.none_of:
            passed &= ~facts.in_any(self.none_of, item_ids)
        return passed


@dataclasses.dataclass(frozen=True, eq=False)
class Prerequisites:
    """Rules of a graph: an item is not shown to those who lack what comes before it ("never a sequel before its first
    part").

    Attributes:
      items, needed: each edge's item, and an item that must be in the history.
    """

    items: Int[np.ndarray, " e"]
    needed: Int[np.ndarray, " e"]

    @classmethod
    def of(cls, edges: Sequence[tuple[int, int]]) -> Self:
        """From (item, needed): an item that needs the unknown 0 is never shown."""
        columns = np.array(edges, np.int64).reshape(-1, 2)
        return cls(columns[:, 0], columns[:, 1])

    def blocked(self, history: Int[np.ndarray, " l"]) -> Int[np.ndarray, " b"]:
        """Items that the owner of this history must not be shown yet."""
        return np.unique(self.items[~np.isin(self.needed, history) | (self.needed == 0)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """What holds for one list.

    Attributes:
      exclude: items that are not shown: seen, owned, given by the request, hidden.
      allow: if not None, nothing else is shown.
      categories: by category.
      added_after: items that came in earlier, or nobody knows when, are not shown; 0 = no rule.
      max_per_category: items of one category in a list; an item of several counts in each. 0 = no limit.
      boosts: category -> what is added to the score of its items, and of none other.
      threshold: scores below it are not shown: the alpha of the model.
    """

    exclude: Int[np.ndarray, " x"] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    allow: Int[np.ndarray, " a"] | None = None
    categories: CategoryFilter = CategoryFilter()
    added_after: int = 0
    max_per_category: int = 0
    boosts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    threshold: float = -np.inf

    @property
    def reorder(self) -> bool:
        """Whether the best lie elsewhere than by score alone: boosts move them, and few are let pass."""
        return bool(self.boosts or self.allow is not None or self.categories.any_of or self.added_after)

    def allowed(self, facts: ItemFacts, item_ids: Ids = EVERY) -> Bool[np.ndarray, " c"]:
        """Which items a list may have, before scores are looked at."""
        allowed = self.categories.allowed(facts, item_ids)
        if self.added_after:
            allowed &= facts.added_at[item_ids] >= self.added_after
        if not isinstance(item_ids, slice):
            if self.allow is not None:
                allowed &= np.isin(item_ids, self.allow)
            return allowed & ~np.isin(item_ids, self.exclude) & (item_ids > 0)
        if self.allow is not None:
            only = np.zeros_like(allowed)
            only[self.allow] = True
            allowed &= only
        allowed[self.exclude] = False
        allowed[0] = False
        return allowed

    def scores(
        self, scores: Float[np.ndarray, " c"], facts: ItemFacts, item_ids: Ids = EVERY
    ) -> Float[np.ndarray, " c"]:
        """The scores with boosts, -infinity for what may not be shown or lies below the threshold."""
        kept = np.where(self.allowed(facts, item_ids) & (scores >= self.threshold), scores, -np.inf)
        for name, added in self.boosts.items():
            kept = kept + added * facts.in_any([name], item_ids)
        return kept


def capped(
    item_ids: Int[np.ndarray, " m"], facts: ItemFacts, max_per_category: int, size: int
) -> Int[np.ndarray, " k"]:
    """The first `size` places of a ranked list at which no category has more than `max_per_category`; 0 = no limit."""
    if not max_per_category:
        return np.arange(min(size, len(item_ids)))
    counts: Counter[int] = Counter()
    kept: list[int] = []
    indptr, indices = facts.membership.indptr, facts.membership.indices
    for place, item in enumerate(item_ids.tolist()):
        if len(kept) == size:
            break
        own = indices[indptr[item] : indptr[item + 1]].tolist()
        if all(counts[category] < max_per_category for category in own):
            counts.update(own)
            kept.append(place)
    return np.array(kept, np.int64)
