"""Orders of a pool that weigh an item against those before it: diversity, and calibration to what the user takes.

Both are greedy, so that a longer list begins as a shorter one does. C = candidates, D = item dim, G = categories.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

__all__ = ["calibrated", "dpp", "mmr"]

LEAST_WEIGHT = 1e-3  # what comes of less are numbers too small to tell apart
OWN = 0.01  # of an item's likeness to itself is its own: a list may be longer than vectors have dimensions
SMOOTHING = 0.01  # of the list's shares by the user's: a category that is missing costs much, not everything


def mmr(
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


def dpp(
    scores: Float[np.ndarray, " c"], unit: Float[np.ndarray, "c d"], weight: float, most: int
) -> Int[np.ndarray, " c"]:
    """The likeliest set of a determinantal point process, greedily: places by the volume that an item adds.

    The kernel is `exp(a r_i) s_ij exp(a r_j)`, with likeness `s`, relevance `r` as in `mmr` and `a = (1 - w) / (2 w)`
    for the weight `w`; 0 = by score alone. Unlike `mmr`, an item is held against all that stand before it at once.

    Source: Chen, Zhang and Zhou, NeurIPS 2018 (fast greedy MAP inference).
    """
    if not weight:
        return np.argsort(-scores, kind="stable")
    weight = max(weight, LEAST_WEIGHT)
    pull = np.exp((1.0 - weight) / (2.0 * weight) * (_relevance(scores) - 1.0))
    count = min(most, len(scores))
    rows = np.zeros((count, len(scores)))  # of the Cholesky factor: of each place, against all candidates
    gain = pull**2
    left = np.ones(len(scores), bool)
    places: list[int] = []
    for number in range(count):
        place = int(np.argmax(np.where(left, gain, -np.inf)))
        likeness = (1.0 - OWN) * (unit @ unit[place])
        likeness[place] += OWN
        rows[number] = pull * pull[place] * likeness - rows[:number, place] @ rows[:number]
        rows[number] /= np.sqrt(max(gain[place], np.finfo(np.float64).tiny))
        places.append(place)
        left[place] = False
        gain = gain - rows[number] ** 2
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
      most: as in `mmr`.

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
