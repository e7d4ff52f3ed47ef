"""Groups: one list for several people, out of what each of them would like.

Each member's relevance of an item is the model's chance of it among the member's best ones, so that no member weighs
more for having larger scores. An aggregation says what the group thinks of an item, or of a list.

M = members, N = candidates, K = places of the list.

Source: Masthoff, UMUAI 2004 (the strategies); Serbos et al., WWW 2017 (fairness over the list, chosen greedily).
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

__all__ = ["Aggregation", "Average", "Fair", "Group", "LeastMisery", "MostPleasure", "Multiplicative"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aggregation:
    """Base of the aggregations."""

    def worth(self, relevance: Float[np.ndarray, "m n"]) -> Float[np.ndarray, " n"]:
        """What the group thinks of each item alone.

        Args:
          relevance: above 0; the larger the better.
        """
        raise TypeError(f"{type(self).__name__} must define worth")

    def choose(self, relevance: Float[np.ndarray, "m n"], size: int) -> Int[np.ndarray, " k"]:
        """The places of the group's best items, best first, ties by place; fewer than `size` where there are fewer."""
        return np.argsort(-self.worth(relevance), kind="stable")[:size]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Average(Aggregation):
    """The mean over members: most relevance in sum, whoever has it."""

    def worth(self, relevance: Float[np.ndarray, "m n"]) -> Float[np.ndarray, " n"]:
        """See the class."""
        return relevance.mean(axis=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multiplicative(Aggregation):
    """The geometric mean: a member who cares little takes an item far down, and no other makes up for it alone."""

    def worth(self, relevance: Float[np.ndarray, "m n"]) -> Float[np.ndarray, " n"]:
        """See the class."""
        return np.exp(np.log(relevance).mean(axis=0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeastMisery(Aggregation):
    """The least of the members: as good as the one who likes it least finds it."""

    def worth(self, relevance: Float[np.ndarray, "m n"]) -> Float[np.ndarray, " n"]:
        """See the class."""
        return relevance.min(axis=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MostPleasure(Aggregation):
    """The most of the members: as good as the one who likes it most finds it."""

    def worth(self, relevance: Float[np.ndarray, "m n"]) -> Float[np.ndarray, " n"]:
        """See the class."""
        return relevance.max(axis=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fair(Aggregation):
    """A list of which each member gets a share: `sum over members of log(patience + relevance of the list so far)`.

    The item that adds most comes next. Whoever has got little so far counts more; the sum is monotone and submodular,
    so that the list is worth at least 1 - 1/e of the best one.

    Attributes:
      patience: relevance that a member does without: the larger, the nearer to Average.
    """

    patience: float = 0.01

    def __post_init__(self) -> None:
        if not self.patience > 0:
            raise ValueError(f"Fair.patience={self.patience} must be above 0, e.g. 0.01.")

    def worth(self, relevance: Float[np.ndarray, "m n"]) -> Float[np.ndarray, " n"]:
        """Of lists of one item."""
        return np.log1p(relevance / self.patience).sum(axis=0)

    def choose(self, relevance: Float[np.ndarray, "m n"], size: int) -> Int[np.ndarray, " k"]:
        """Greedily."""
        got, free = np.zeros((len(relevance), 1)), np.ones(relevance.shape[1], bool)
        chosen = []
        for _ in range(min(size, relevance.shape[1])):
            gains = np.log1p(relevance / (self.patience + got)).sum(axis=0)
            best = int(np.argmax(np.where(free, gains, -np.inf)))
            chosen.append(best)
            free[best] = False
            got += relevance[:, best : best + 1]
        return np.array(chosen, np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """How groups are served.

    Attributes:
      pool: the best items of each member, of which the group's are chosen. An item beyond a member's pool counts as its
        last one: no more than that, and so never too little.
    """

    aggregation: Aggregation = Average()
    pool: int = 500

    def __post_init__(self) -> None:
        if self.pool < 1:
            raise ValueError(f"group.pool={self.pool} must be at least 1.")
