"""Orders of a pool that weigh an item against those before it: diversity, and calibration to what the user takes.

Both are greedy, so that a longer list begins as a shorter one does. C = candidates, D = item dim, G = categories.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

__all__ = ["calibrated", "diverse"]

SMOOTHING = 0.01  # of the list's shares by the user's: a category that is missing costs much, not everything


def diverse(
    scores: Float[np.ndarray, " c"], unit: Float[np.ndarray, "c d"], weight: float, most: int
) -> Int[np.ndarray, " c"]:
    """Maximal marginal relevance: places by `(1 - weight) relevance - weight * likeness to those before`.

    The first `most` are chosen so, the rest follow by score. Relevance is the score between the worst and the best.

    Source: Carbonell and Goldstein, SIGIR 1998.
    """
    relevance = _relevance(scores)
    left = np.ones(len(scores), bool)
    likeness = np.zeros(len(scores))
    places: list[int] = []
    for _ in range(min(most, len(scores))):
        worth = np.where(left, (1.0 - weight) * relevance - weight * likeness, -np.inf)
        place = int(np.argmax(worth))
        places.append(place)
        left[place] = False
        likeness = np.maximum(likeness, unit @ unit[place])
    return np.append(np.array(places, np.int64), np.flatnonzero(left))


def calibrated(
    scores: Float[np.ndarray, " c"],
    membership: Bool[np.ndarray, "c g"],
    wanted: Float[np.ndarray, " g"],
    weight: float,
    most: int,
) -> Int[np.ndarray, " c"]:
    """Places by `(1 - weight) * sum of relevance - weight * KL(wanted || shares of the list)`.

    Args:
      membership: which candidate is in which category; one of several counts for each in part.
      wanted: the user's shares of the categories, of sum 1; zeros = nothing is known, and scores alone decide.
      most: as in `diverse`.

    Source: Steck, RecSys 2018 (calibrated recommendations).
    """
    relevance = _relevance(scores)
    asked = wanted > 0  # no other category is in the divergence
    target = wanted[asked]
    parts = membership / np.maximum(membership.sum(axis=1, keepdims=True), 1)
    own = parts[:, asked]
    sizes = np.asarray(np.any(membership, axis=1), np.float64)
    sums, size = np.zeros(len(target)), 0.0
    left = np.ones(len(scores), bool)
    places: list[int] = []
    for _ in range(min(most, len(scores))):
        shares = (sums + own) / np.asarray(np.maximum(size + sizes, 1.0))[:, None]
        smooth = (1.0 - SMOOTHING) * shares + SMOOTHING * target
        divergence = np.log(target / smooth) @ target if len(target) else np.zeros(len(scores))
        worth = np.where(left, (1.0 - weight) * relevance - weight * divergence, -np.inf)
        place = int(np.argmax(worth))
        places.append(place)
        left[place] = False
        sums, size = sums + own[place], size + sizes[place]
    return np.append(np.array(places, np.int64), np.flatnonzero(left))


def _relevance(scores: Float[np.ndarray, " c"]) -> Float[np.ndarray, " c"]:
    """The scores between the worst, 0, and the best, 1."""
    span = float(np.ptp(scores)) if len(scores) else 0.0
    return (scores - scores.min()) / span if span else np.ones(len(scores))
