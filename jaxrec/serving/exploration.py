"""Lists that also try what the model is unsure of, with the propensity of every choice, for `evaluation.off_policy`.

A list is drawn place by place from a pool of candidates. The propensity of a place is the probability of its item given
the places before it: what an estimator from the log asks for.

M = candidates of the pool, K = places of the list, D = item dim, S = samples.
"""

import dataclasses
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int

__all__ = ["Drawn", "EpsilonGreedy", "Exploration", "LastLayer", "Thompson", "exploration_of"]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A drawn list.

    Attributes:
      places: of the pool, in the order of the list.
      propensities: of each choice, given those before it.
      explored: whether each is another than the best that was left.
    """

    places: Int[np.ndarray, " k"]
    propensities: Float[np.ndarray, " k"]
    explored: np.ndarray


class Exploration(Protocol):
    """A way to draw lists."""

    def draw(
        self,
        rng: np.random.Generator,
        scores: Float[np.ndarray, " m"],
        vectors: Float[np.ndarray, "m d"],
        size: int,
    ) -> Drawn:
        """At most `size` of the candidates, each once.

        Args:
          scores: of the model; -infinity = never.
          vectors: v(y) of the candidates.
        """
        ...

    def shown(self, vectors: Float[np.ndarray, "k d"]) -> None:
        """A list of these has been shown."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpsilonGreedy:
    """Each place is the best candidate that is left, or with probability `epsilon` any of those that are left.

    Attributes:
      epsilon: in [0, 1]; 0 = never.
    """

    epsilon: float = 0.05

    def __post_init__(self) -> None:
        if not 0.0 <= self.epsilon <= 1.0:
            raise ValueError(f"exploration.epsilon={self.epsilon} must lie in [0, 1].")

    def draw(
        self,
        rng: np.random.Generator,
        scores: Float[np.ndarray, " m"],
        vectors: Float[np.ndarray, "m d"],
        size: int,
    ) -> Drawn:
        """See `Exploration`."""
        left = [int(place) for place in np.argsort(-scores, kind="stable") if scores[place] > -np.inf]
        places: list[int] = []
        propensities, explored = [], []
        while left and len(places) < size:
            at = int(rng.integers(len(left))) if rng.random() < self.epsilon else 0
            places.append(left[at])
            propensities.append(self.epsilon / len(left) + (1.0 - self.epsilon) * (at == 0))
            explored.append(at != 0)
            del left[at]
        return Drawn(np.array(places, np.int64), np.array(propensities), np.array(explored, bool))

    def shown(self, vectors: Float[np.ndarray, "k d"]) -> None:
        """Nothing is learnt from it."""


@dataclasses.dataclass
class LastLayer:
    """What feedback has said of the last layer so far: the precision of a Bayesian linear model of the rewards.

    Attributes:
      precision: `prior I + sum of v v^T` over the items that were shown, `[D, D]`.
    """

    precision: Float[np.ndarray, "d d"]

    @classmethod
    def empty(cls, dim: int, prior: float = 1.0) -> "LastLayer":
        """Nothing has been shown."""
        return cls(prior * np.eye(dim))

    def add(self, vectors: Float[np.ndarray, "n d"]) -> None:
        """These have been shown."""
        self.precision = self.precision + vectors.T @ vectors

    def noise(self, rng: np.random.Generator, size: int) -> Float[np.ndarray, "size d"]:
        """Draws from N(0, precision^-1)."""
        factor = np.linalg.cholesky(self.precision)
        draws = rng.standard_normal((len(self.precision), size))
        return np.linalg.solve(factor.T, draws).T


@dataclasses.dataclass(kw_only=True)
class Thompson:
    """Each place is the best candidate under a draw of the last layer's weights: the less an item's direction has been
    shown, the more its score moves.

    Propensities are shares of `num_samples` further draws, each counted with one that was made: none is 0.

    Lists change as it learns: pages of one request fit each other only while nothing else is shown.

    Attributes:
      scale: of the noise beside the scores; 0 = never explore.
      last_layer: what has been shown; made at the first draw where there is none, or vectors have another dim.

    Source: Agrawal and Goyal, ICML 2013 (Thompson sampling with linear payoffs); Riquelme et al., ICLR 2018 (on a
    network's last layer).
    """

    scale: float
    last_layer: LastLayer | None = None
    num_samples: int = 200

    def __post_init__(self) -> None:
        if self.scale < 0 or self.num_samples < 1:
            raise ValueError(
                f"exploration.scale={self.scale} must not be negative, and num_samples={self.num_samples} at least 1."
            )

    def draw(
        self,
        rng: np.random.Generator,
        scores: Float[np.ndarray, " m"],
        vectors: Float[np.ndarray, "m d"],
        size: int,
    ) -> Drawn:
        """See `Exploration`."""
        size = min(size, int(np.count_nonzero(scores > -np.inf)))
        layer = self._layer(vectors.shape[1])
        free = scores > -np.inf
        places: list[int] = []
        propensities, explored = [], []
        for _ in range(size):  # place by place: a longer list begins as a shorter one does
            noise = layer.noise(rng, 1 + self.num_samples)
            drawn, *judged_by = scores + self.scale * (noise @ np.asarray(vectors, np.float64).T)
            place = int(np.argmax(np.where(free, drawn, -np.inf)))
            best = np.argmax(np.where(free, judged_by, -np.inf), axis=1)
            propensities.append((np.count_nonzero(best == place) + 1) / (self.num_samples + 1))
            explored.append(place != int(np.argmax(np.where(free, scores, -np.inf))))
            places.append(place)
            free[place] = False
        return Drawn(np.array(places, np.int64), np.array(propensities), np.array(explored, bool))

    def shown(self, vectors: Float[np.ndarray, "k d"]) -> None:
        """Their directions are less in doubt."""
        self._layer(vectors.shape[1]).add(np.asarray(vectors, np.float64))

    def _layer(self, dim: int) -> LastLayer:
        if self.last_layer is None or len(self.last_layer.precision) != dim:
            self.last_layer = LastLayer.empty(dim)
        return self.last_layer


def exploration_of(text: str) -> Exploration | None:
    """`0.05` = epsilon-greedy with that chance, `thompson:0.1` = Thompson sampling with that scale; None = never.

    Raises:
      ValueError: it is neither.
    """
    name, _, value = text.rpartition(":")
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if name not in ("", "epsilon", "thompson") or not 0.0 <= number < float("inf"):
        raise ValueError(f"exploration {text!r}: say a chance such as 0.05, or thompson:SCALE.")
    if not number:
        return None
    return Thompson(scale=number) if name == "thompson" else EpsilonGreedy(epsilon=number)
