"""Slates: sets of items that are chosen together, for what each is worth and for how they differ.

A set S of a user's candidates is worth `sum of relevance + weight * diversity(S)`, and is chosen greedily, the item
that adds most first. Both measures of diversity here are monotone and submodular, so that the set is worth at least
1 - 1/e of the best one, and at least half of it where an item has one category and each may come a few times only.

U = users, N = candidates of a user, K = places of a slate, C = categories, D = dim of the item vectors.

Source: Nemhauser, Wolsey & Fisher, Mathematical Programming 1978 (the bound), and Fisher, Nemhauser & Wolsey, ibid.
(under a partition).
"""

import dataclasses
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """What slates are chosen from.

    Attributes:
      relevance: at least 0; what is not there has 0 and `there` False.
      vectors: of length 1.
    """

    relevance: Float[np.ndarray, "u n"]
    there: Bool[np.ndarray, "u n"]
    vectors: Float[np.ndarray, "u n d"]
    categories: Bool[np.ndarray, "u n c"]


class Chosen(Protocol):
    """The diversity of what has been chosen for each user so far."""

    def gains(self) -> Float[np.ndarray, "u n"]:
        """What each candidate would add."""
        ...

    def add(self, places: Int[np.ndarray, " u"]) -> None:
        """Takes one candidate more for each user."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diversity:
    """Base of the measures."""

    @property
    def needs_categories(self) -> bool:
        """Whether it means nothing for items without categories."""
        return False

    def start(self, pool: Pool) -> Chosen:
        """Nothing is chosen."""
        raise TypeError(f"{type(self).__name__} must define start")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coverage(Diversity):
    """How many categories the set has."""

    @property
    def needs_categories(self) -> bool:
        """It counts them."""
        return True

    def start(self, pool: Pool) -> Chosen:
        """See `Diversity`."""
        return _Covered(pool)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogDeterminant(Diversity):
    """log det(I + V V^T) of the item vectors: the log volume that they span, as in a determinantal point process.

    With I added it never falls when an item comes in, which a plain determinant does.

    Source: Kulesza & Taskar, Foundations and Trends in Machine Learning 2012; Chen, Zhang & Zhou, NeurIPS 2018 (the
    factor that grows by a row an item).
    """

    def start(self, pool: Pool) -> Chosen:
        """See `Diversity`."""
        return _Spanned(pool)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slate:
    """What a set of items is chosen for, from how many, under what limit.

    Attributes:
      size: items of a set.
      pool: the best items of a user, from which the set is chosen.
      weight: of the diversity beside the relevance, which is 1 for the best item and falls with e^(score).
      max_per_category: items of any one category in a set, at most; 0 = no limit. An item of several counts in each.
    """

    size: int = 10
    pool: int = 100
    diversity: Diversity = LogDeterminant()
    weight: float = 0.1
    max_per_category: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.pool:
            raise ValueError(f"slate.size={self.size} must lie in 1 .. pool={self.pool}: raise the pool.")
        if self.weight < 0 or self.max_per_category < 0:
            raise ValueError(
                f"slate.weight={self.weight} and max_per_category={self.max_per_category} must not be negative."
            )


def relevance_of(
    scores: Float[np.ndarray, "u n"], best: Float[np.ndarray, "u one"]
) -> Float[np.ndarray, "u n"]:
    """How likely items are against the user's best one: e^(score - best score); 0 for a score of -inf."""
    return np.exp(scores - np.where(np.isfinite(best), best, 0.0))


def choose(slate: Slate, pool: Pool) -> Int[np.ndarray, "u k"]:
    """The places in the pool of each user's set, in the order of choice; -1 where no candidate is left."""
    users = np.arange(len(pool.relevance))
    chosen = slate.diversity.start(pool)
    free = pool.there.copy()
    counts = np.zeros((len(users), pool.categories.shape[2]), np.int64)
    places = np.full((len(users), slate.size), -1, np.int64)
    for column in range(slate.size):
        allowed = free
        if slate.max_per_category:
            full = counts >= slate.max_per_category
            allowed = free & ~np.any(pool.categories & full[:, None, :], axis=2)
        worth = np.where(allowed, pool.relevance + slate.weight * chosen.gains(), -np.inf)
        best = np.argmax(worth, axis=1)
        found = allowed[users, best]
        places[found, column] = best[found]
        # Users without a candidate keep adding one that counts for nothing: nothing is read of them any more.
        chosen.add(best)
        free[users, best] = False
        counts += pool.categories[users, best]
        free[~found] = False
    return places


def worth(slate: Slate, pool: Pool, places: Int[np.ndarray, "u k"]) -> Float[np.ndarray, " u"]:
    """What each user's set is worth; -1 = no item."""
    users, real = np.arange(len(places))[:, None], places >= 0
    relevance = np.where(real, pool.relevance[users, places], 0.0).sum(axis=1)
    total = np.zeros(len(places))
    chosen = slate.diversity.start(pool)
    for column in range(places.shape[1]):
        total += np.where(real[:, column], chosen.gains()[users[:, 0], places[:, column]], 0.0)
        chosen.add(places[:, column])
    return relevance + slate.weight * total


class _Covered:
    def __init__(self, pool: Pool):
        self._categories = pool.categories
        self._covered = np.zeros((len(pool.categories), pool.categories.shape[2]), bool)

    def gains(self) -> Float[np.ndarray, "u n"]:
        return np.count_nonzero(self._categories & ~self._covered[:, None, :], axis=2).astype(np.float64)

    def add(self, places: Int[np.ndarray, " u"]) -> None:
        self._covered |= self._categories[np.arange(len(places)), places]


class _Spanned:
    """The Cholesky factor of I + V V^T over the chosen, and what each candidate would add to its diagonal."""

    def __init__(self, pool: Pool):
        self._vectors = pool.vectors.astype(np.float64)
        self._squares = 1.0 + np.sum(np.square(self._vectors), axis=2)
        self._rows: list[np.ndarray] = []

    def gains(self) -> Float[np.ndarray, "u n"]:
        return np.log(np.maximum(self._squares, 1.0))

    def add(self, places: Int[np.ndarray, " u"]) -> None:
        users = np.arange(len(places))
        row = np.einsum("und,ud->un", self._vectors, self._vectors[users, places])
        for earlier in self._rows:
            row -= earlier * earlier[users, places][:, None]
        row /= np.sqrt(self._squares[users, places])[:, None]
        self._rows.append(row)
        self._squares = self._squares - np.square(row)
