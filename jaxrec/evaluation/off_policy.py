"""What would another policy have earned? Estimates from the log of the policy that did the choosing.

The mean reward in a log is that of the logging policy, and of nobody else. Where the log says how likely each choice
was (its propensity), the rewards can be weighed as another policy would have come by them:

- inverse propensities (`ips`): `mean(w r)` with `w = pi(a) / propensity`; unbiased, of a large variance;
- self-normalised (`snips`): `sum(w r) / sum(w)`; a little biased, calmer, and never outside the rewards;
- by a model of the rewards (`direct`): `mean(sum over a of pi(a) q(a))`; as biased as the model;
- doubly robust (`doubly_robust`): `direct` plus the weighed residuals, `mean(w (r - q(a)))`; right where either the
  propensities or the model are, and calmer than `ips` as far as the model explains the rewards.

The model must not have seen the reward that it is compared with: `cross_fitted` sees to that.

N = logged choices, A = actions.

Source: Horvitz and Thompson, JASA 1952; Swaminathan and Joachims, NeurIPS 2015; Dudik, Langford and Li, ICML 2011;
intervals by the central limit theorem, those of the ratio by the delta method.
"""

import dataclasses
import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from jaxtyping import Float64, Int, Real

__all__ = ["Estimate", "Log", "cross_fitted", "direct", "doubly_robust", "ips", "naive", "snips"]


@dataclasses.dataclass(frozen=True)
class Log:
    """What a policy chose, and what came of it.

    Attributes:
      actions: 0 .. A - 1.
      rewards: finite.
      propensities: of the choices when they were made, above 0 and at most 1.
    """

    actions: Int[np.ndarray, " n"]
    rewards: Real[np.ndarray, " n"]
    propensities: Real[np.ndarray, " n"]

    def __post_init__(self) -> None:
        if not len(self.actions) == len(self.rewards) == len(self.propensities):
            raise ValueError(
                f"{len(self.actions)} actions, {len(self.rewards)} rewards and {len(self.propensities)} propensities: "
                "give one of each for every choice."
            )
        if len(self.actions) < 2:
            raise ValueError(f"a log of {len(self.actions)} choices has no interval; give at least 2.")
        if not np.isfinite(self.rewards).all():
            raise ValueError("rewards must be finite; leave out choices whose reward is unknown.")
        outside = ~((self.propensities > 0) & (self.propensities <= 1))
        if outside.any():
            at = int(np.argmax(outside))
            raise ValueError(
                f"propensities[{at}]={self.propensities[at]} must be above 0 and at most 1: a choice that could not be "
                "made cannot be weighed."
            )

    def weights(self, policy: Real[np.ndarray, "n A"]) -> Float64[np.ndarray, " n"]:
        """How much more likely the policy is to make each choice than the logging one was.

        Args:
          policy: its probabilities of every action at every choice.

        Raises:
          ValueError: they are none.
        """
        policy = np.asarray(policy, np.float64)
        if (
            len(policy) != len(self.actions)
            or self.actions.min() < 0
            or self.actions.max() >= policy.shape[1]
        ):
            raise ValueError(
                f"policy {policy.shape} has no probability for {len(self.actions)} choices among actions 0 .. "
                f"{int(self.actions.max())}."
            )
        if (policy < 0).any() or not np.allclose(policy.sum(axis=1), 1.0, atol=1e-6):
            raise ValueError("policy: the probabilities of a choice must not be negative, and sum to 1.")
        return policy[np.arange(len(policy)), self.actions] / self.propensities


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A policy's mean reward.

    Attributes:
      low, high: of the interval.
      effective_choices: `sum(w)^2 / sum(w^2)`: unweighted choices that would be as uncertain; nan where nothing is
        weighed.
    """

    value: float
    low: float
    high: float
    effective_choices: float = math.nan


def naive(log: Log, *, confidence: float = 0.95) -> Estimate:
    """The mean reward in the log: that of the logging policy."""
    return _of_scores(log.rewards, None, confidence)


def ips(log: Log, policy: Real[np.ndarray, "n A"], *, confidence: float = 0.95) -> Estimate:
    """By inverse propensities."""
    weights = log.weights(policy)
    return _of_scores(weights * log.rewards, weights, confidence)


def snips(log: Log, policy: Real[np.ndarray, "n A"], *, confidence: float = 0.95) -> Estimate:
    """By inverse propensities, self-normalised.

    Raises:
      ValueError: the policy makes none of the log's choices.
    """
    weights = log.weights(policy)
    if not weights.any():
        raise ValueError("the policy makes none of the log's choices; nothing can be said of it.")
    value = float(np.sum(weights * log.rewards) / np.sum(weights))
    found = _of_scores(weights / weights.mean() * (log.rewards - value), weights, confidence)
    return dataclasses.replace(found, value=value, low=value + found.low, high=value + found.high)


def direct(
    policy: Real[np.ndarray, "n A"], rewards: Real[np.ndarray, "n A"], *, confidence: float = 0.95
) -> Estimate:
    """By a model: what it expects of every action. Its interval knows nothing of the model's own error."""
    return _of_scores(np.sum(np.asarray(policy, np.float64) * rewards, axis=1), None, confidence)


def doubly_robust(
    log: Log,
    policy: Real[np.ndarray, "n A"],
    rewards: Real[np.ndarray, "n A"],
    *,
    confidence: float = 0.95,
) -> Estimate:
    """By a model of the rewards, and the weighed residuals of the log.

    Args:
      rewards: what the model expects of every action; `cross_fitted`.
    """
    weights = log.weights(policy)
    of_choices = np.asarray(rewards, np.float64)[np.arange(len(weights)), log.actions]
    scores = np.sum(np.asarray(policy, np.float64) * rewards, axis=1) + weights * (log.rewards - of_choices)
    return _of_scores(scores, weights, confidence)


def cross_fitted(
    fit: Callable[[Int[np.ndarray, " f"]], Callable[[Int[np.ndarray, " g"]], Float64[np.ndarray, "g A"]]],
    num_choices: int,
    *,
    folds: int = 5,
    seed: int = 0,
) -> Float64[np.ndarray, "n A"]:
    """What a model expects of every action at every choice, fitted to the other folds' choices each time.

    Args:
      fit: takes the choices to learn from, by number, and gives a function from choices to expected rewards.

    Raises:
      ValueError: fewer choices than folds, or fewer than two folds.
    """
    if not 2 <= folds <= num_choices:
        raise ValueError(f"folds={folds} must be at least 2 and at most the {num_choices} choices.")
    of_choice = np.random.default_rng(seed).permutation(num_choices) % folds
    parts = [np.flatnonzero(of_choice == fold) for fold in range(folds)]
    found = [fit(np.flatnonzero(of_choice != fold))(part) for fold, part in enumerate(parts)]
    out = np.empty((num_choices, found[0].shape[1]))
    for part, rewards in zip(parts, found, strict=True):
        out[part] = rewards
    return out


def _of_scores(
    scores: Real[np.ndarray, " n"], weights: Float64[np.ndarray, " n"] | None, confidence: float
) -> Estimate:
    value = float(np.mean(scores))
    half = NormalDist().inv_cdf((1 + confidence) / 2) * float(np.std(scores, ddof=1)) / math.sqrt(len(scores))
    effective = math.nan
    if weights is not None:
        squares = float(np.sum(weights**2))
        effective = float(np.sum(weights)) ** 2 / squares if squares else 0.0
    return Estimate(value, value - half, value + half, effective)
