"""Metrics of predicted probabilities against binary labels, their calibration, and the threshold alpha.

Labels are 1, 0 or -1; -1 is unknown and is left out everywhere. A metric that the labels leave undefined (the AUC
of one class, the recall without a positive) is NaN in the single functions and None in `binary_metrics`, which is
what JSON wants. Calibrations and thresholds are fitted on validation and applied to test.

N = predictions.
"""

import dataclasses

import numpy as np
import scipy.special
import scipy.stats
from jaxtyping import Bool, Float, Float64, Int, Int64

__all__ = [
    "Calibration",
    "auc",
    "auc_by_user",
    "binary_metrics",
    "choose_threshold",
    "expected_calibration_error",
    "fit_platt",
    "fit_temperature",
    "log_loss",
    "reliability_curve",
    "threshold_metrics",
    "user_auc",
]

NEWTON_STEPS = 100


@dataclasses.dataclass(frozen=True)
class Calibration:
    """probability = sigmoid(scale * logit + bias). A scale below 0 never occurs, so the order stays."""

    scale: float = 1.0
    bias: float = 0.0

    def probabilities(self, logits: Float[np.ndarray, "*n"]) -> Float64[np.ndarray, "*n"]:
        """Calibrated probabilities."""
        return scipy.special.expit(self.scale * np.asarray(logits, np.float64) + self.bias)


def fit_platt(logits: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> Calibration:
    """The scale and bias of least log-loss on smoothed labels, which stay finite on separable data.

    Source: Platt 1999 (the labels become (n+ + 1) / (n+ + 2) and 1 / (n- + 2)); Lin, Lin, Weng 2007.

    Raises:
        ValueError: no label is known, or a logit is not finite.
    """
    logits, known = _known(logits, labels)
    num_positive, num_negative = np.count_nonzero(known), np.count_nonzero(~known)
    smoothed = np.where(known, (num_positive + 1.0) / (num_positive + 2.0), 1.0 / (num_negative + 2.0))
    scale, bias = _newton(np.stack([logits, np.ones_like(logits)], axis=1), smoothed)
    if scale < 0.0:  # the optimum over scale >= 0 is then at 0, where only the base rate is left
        return Calibration(0.0, float(scipy.special.logit(smoothed.mean())))
    return Calibration(float(scale), float(bias))


def fit_temperature(logits: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> Calibration:
    """The scale (1 / temperature) of least log-loss; the bias stays 0, so 0.5 stays the even bet.

    Source: Guo, Pleiss, Sun, Weinberger, ICML 2017; the labels are smoothed as Platt's.

    Raises:
        ValueError: no label is known, or a logit is not finite.
    """
    logits, known = _known(logits, labels)
    num_positive, num_negative = np.count_nonzero(known), np.count_nonzero(~known)
    smoothed = np.where(known, (num_positive + 1.0) / (num_positive + 2.0), 1.0 / (num_negative + 2.0))
    (scale,) = _newton(logits[:, None], smoothed)
    return Calibration(max(float(scale), 0.0), 0.0)


def auc(scores: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> float:
    """The chance that a positive scores above a negative, ties counting half; NaN with one class alone."""
    scores, positive = _known(scores, labels)
    num_positive, num_negative = np.count_nonzero(positive), np.count_nonzero(~positive)
    if not num_positive or not num_negative:
        return float("nan")
    ranks = scipy.stats.rankdata(scores)
    above = ranks[positive].sum() - num_positive * (num_positive + 1) / 2.0
    return float(above / num_positive / num_negative)


def auc_by_user(
    scores: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"], users: Int[np.ndarray, " n"]
) -> Float64[np.ndarray, " u"]:
    """One value a user, in the order of their ids, whose mean is the AUC over all predictions.

    They make the AUC a mean over users, to first order, so that intervals and paired tests over users hold for it.
    Source: DeLong, DeLong, Clarke-Pearson, Biometrics 1988 (placements); Obuchowski, Biometrics 1997 (clusters).

    Raises:
        ValueError: the known labels are all of one class.
    """
    users = users[labels >= 0]
    scores, positive = _known(scores, labels)
    if positive.all() or not positive.any():
        raise ValueError("the known labels are all of one class, for which no AUC is defined.")
    # The share of the other class that is on the right side of each prediction; ties count half.
    placements = np.empty(len(scores))
    ranks = scipy.stats.rankdata(scores)
    for side in (positive, ~positive):
        placements[side] = (ranks[side] - scipy.stats.rankdata(scores[side])) / np.count_nonzero(~side)
    placements[~positive] = 1.0 - placements[~positive]
    mean = placements[positive].mean()
    parts = (placements - mean) / np.where(positive, np.count_nonzero(positive), np.count_nonzero(~positive))
    _, place = np.unique(users, return_inverse=True)
    summed = np.bincount(place, weights=parts)
    return mean + len(summed) * summed


def user_auc(
    scores: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"], users: Int[np.ndarray, " n"]
) -> Float64[np.ndarray, " u"]:
    """The AUC of each user with labels of both classes, in the order of their ids: what a user's own list sees."""
    order = np.argsort(users, kind="stable")
    starts = np.flatnonzero(np.diff(users[order])) + 1
    parts = np.split(order, starts)
    values = np.array(
        [auc(scores[part], labels[part]) if (labels[part] >= 0).any() else np.nan for part in parts]
    )
    return values[~np.isnan(values)]


def log_loss(probabilities: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> float:
    """Mean negative log-likelihood in nats; a probability of 0 or 1 counts as 1e-7 away from it."""
    probabilities, positive = _known_probabilities(probabilities, labels)
    clipped = np.clip(probabilities, 1e-7, 1.0 - 1e-7)
    return float(-np.where(positive, np.log(clipped), np.log1p(-clipped)).mean())


def expected_calibration_error(
    probabilities: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"], num_bins: int = 15
) -> float:
    """The gap between the mean probability and the rate of positives, over equally wide bins of probability.

    Source: Naeini, Cooper, Hauskrecht, AAAI 2015 (bins weighted by their size).
    """
    predicted, observed, sizes = reliability_curve(probabilities, labels, num_bins)
    return float((np.abs(predicted - observed) * sizes).sum() / sizes.sum())


def reliability_curve(
    probabilities: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"], num_bins: int = 15
) -> tuple[Float64[np.ndarray, " b"], Float64[np.ndarray, " b"], Int64[np.ndarray, " b"]]:
    """Mean probability, rate of positives and size of each bin of equal width that is not empty.

    Raises:
        ValueError: no label is known, a prediction is not a probability, or there is no bin.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins={num_bins} must be at least 1.")
    probabilities, positive = _known_probabilities(probabilities, labels)
    bins = np.minimum((probabilities * num_bins).astype(np.int64), num_bins - 1)
    sizes = np.bincount(bins, minlength=num_bins)
    filled = sizes > 0
    predicted, observed = (
        np.bincount(bins, weights=values, minlength=num_bins)[filled] / sizes[filled]
        for values in (probabilities, positive)
    )
    return predicted, observed, sizes[filled]


def threshold_metrics(
    probabilities: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"], alpha: float
) -> dict[str, float]:
    """`accuracy`, `precision`, `recall` and `f1` of saying yes above alpha.

    Precision without a yes and recall without a positive are NaN; F1 is 0 when one of them is NaN or both are 0,
    unless there is neither a yes nor a positive: then it is NaN, too.
    """
    probabilities, positive = _known_probabilities(probabilities, labels)
    yes = probabilities > alpha
    hits = float(np.count_nonzero(yes & positive))
    num_yes, num_positive = np.count_nonzero(yes), np.count_nonzero(positive)
    return {
        "accuracy": float(np.mean(yes == positive)),
        "precision": hits / num_yes if num_yes else float("nan"),
        "recall": hits / num_positive if num_positive else float("nan"),
        "f1": 2.0 * hits / (num_yes + num_positive) if num_yes + num_positive else float("nan"),
    }


def choose_threshold(
    probabilities: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"], criterion: str = "f1"
) -> float:
    """The alpha with the best F1 or accuracy; of equals the highest, which says yes least often.

    Raises:
        ValueError: an unknown criterion, or no label is known.
    """
    if criterion not in ("f1", "accuracy"):
        raise ValueError(f'criterion={criterion!r} is unknown; say "f1" or "accuracy".')
    probabilities, positive = _known_probabilities(probabilities, labels)
    order = np.argsort(-probabilities, kind="stable")
    ranked, hits = probabilities[order], np.cumsum(positive[order])
    num_yes = np.arange(1, len(ranked) + 1)
    num_positive = int(hits[-1])
    if criterion == "f1":
        values = 2.0 * hits / (num_yes + num_positive)
    else:
        values = (hits + (len(ranked) - num_positive) - (num_yes - hits)) / len(ranked)
    # A threshold cannot part equal probabilities; alpha lies half-way to the next lower one.
    ends = np.flatnonzero(np.append(ranked[1:] < ranked[:-1], True))
    best = ends[np.argmax(values[ends])]
    none_is_right = criterion == "accuracy" and (len(ranked) - num_positive) / len(ranked) >= values[best]
    if none_is_right:
        return float((ranked[0] + 1.0) / 2.0)
    below = ranked[best + 1] if best + 1 < len(ranked) else min(0.0, ranked[best] - 1e-9)
    middle = (ranked[best] + below) / 2.0
    return float(middle if middle < ranked[best] else below)


def binary_metrics(
    probabilities: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"], alpha: float, num_bins: int = 15
) -> dict[str, float | int | None]:
    """Every metric of this module, with `num_labels` and `positive_rate`; None where undefined.

    Without any known label all metrics are None and `num_labels` is 0.
    """
    known = labels >= 0
    names = ("auc", "log_loss", "expected_calibration_error", "accuracy", "precision", "recall", "f1")
    if not known.any():
        return {"num_labels": 0, "positive_rate": None, **dict.fromkeys(names)}
    values = {
        "positive_rate": float(np.mean(labels[known] > 0)),
        "auc": auc(probabilities, labels),
        "log_loss": log_loss(probabilities, labels),
        "expected_calibration_error": expected_calibration_error(probabilities, labels, num_bins),
        **threshold_metrics(probabilities, labels, alpha),
    }
    defined = {name: None if np.isnan(value) else value for name, value in values.items()}
    return {"num_labels": int(np.count_nonzero(known)), **defined}


def _newton(
    features: Float64[np.ndarray, "n f"], targets: Float64[np.ndarray, " n"]
) -> Float64[np.ndarray, " f"]:
    """Logistic regression on probabilities as targets: Newton's method with halved steps (convex)."""
    # Scaled features: logits in the hundreds would make the Hessian singular at the start.
    sizes = np.maximum(np.abs(features).max(axis=0), 1e-12)
    features = features / sizes
    weights = np.zeros(features.shape[1])

    def loss(weights: Float64[np.ndarray, " f"]) -> float:
        logits = features @ weights
        return float(np.mean(np.logaddexp(0.0, logits) - targets * logits))

    current = loss(weights)
    for _ in range(NEWTON_STEPS):
        probabilities = scipy.special.expit(features @ weights)
        gradient = features.T @ (probabilities - targets) / len(targets)
        curvature = probabilities * (1.0 - probabilities) / len(targets)
        hessian = (features * curvature[:, None]).T @ features + 1e-12 * np.eye(len(weights))
        step = np.linalg.solve(hessian, gradient)
        rate = 1.0
        while loss(weights - rate * step) > current and rate > 1e-8:
            rate /= 2.0
        weights = weights - rate * step
        improved = current - loss(weights)
        current -= improved
        if improved < 1e-14:
            break
    return weights / sizes


def _known(
    scores: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"]
) -> tuple[Float64[np.ndarray, " m"], Bool[np.ndarray, " m"]]:
    """Scores in float64 and whether they are of positives, where the label is known."""
    known = labels >= 0
    if not known.any():
        raise ValueError(
            f"none of the {len(labels)} labels is known (all are -1); there is nothing to measure."
        )
    scores = np.asarray(scores, np.float64)[known]
    if not np.isfinite(scores).all():
        raise ValueError("a prediction is NaN or infinite; the model has diverged.")
    return scores, labels[known] > 0


def _known_probabilities(
    probabilities: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"]
) -> tuple[Float64[np.ndarray, " m"], Bool[np.ndarray, " m"]]:
    probabilities, positive = _known(probabilities, labels)
    if probabilities.min() < 0.0 or probabilities.max() > 1.0:
        raise ValueError(
            f"predictions between {probabilities.min():.3g} and {probabilities.max():.3g} are not "
            "probabilities; apply a Calibration to logits first."
        )
    return probabilities, positive
