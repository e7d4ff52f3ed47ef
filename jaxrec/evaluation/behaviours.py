"""How good are the predicted behaviours, after calibration on the validation targets?

U = users, K = behaviours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxrec.evaluation.user_ranking import BehaviourPredictions
from jaxrec.metrics.binary import (
    Calibration,
    binary_metrics,
    choose_threshold,
    expected_calibration_error,
    fit_platt,
    reliability_curve,
)

NUM_BINS = 15
_FEWEST_LABELS = 20  # fewer known validation labels of a behaviour calibrate nothing


def learned_behaviours(tasks: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    """Those of the dataset's behaviours that a task of the run learns: no others are worth a number."""
    wanted: set[str] = set()
    for task in tasks.values():
        if hasattr(task, "behaviours"):
            wanted |= set(task.behaviours or names)
    return tuple(name for name in names if name in wanted)


def behaviour_metrics(
    names: Sequence[str],
    predicted: BehaviourPredictions,
    reference: BehaviourPredictions | None,
    learned: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Metrics of each learned behaviour on `predicted`.

    Calibration (Platt) and the threshold alpha come from `reference` alone; where that has too few known labels
    of a behaviour, its logits are taken as they are and alpha is 0.5.

    Args:
      names: of the columns of the predictions.
    """
    found = {}
    for column, name in enumerate(names):
        if name not in learned:
            continue
        calibration, alpha = Calibration(), 0.5
        if reference is not None:
            calibration, alpha = _calibrate(reference.logits[:, column], reference.labels[:, column])
        found[name] = _measure(predicted.logits[:, column], predicted.labels[:, column], calibration, alpha)
    return found


def _calibrate(logits: Float[np.ndarray, " u"], labels: Int[np.ndarray, " u"]) -> tuple[Calibration, float]:
    if np.count_nonzero(labels >= 0) < _FEWEST_LABELS:
        return Calibration(), 0.5
    calibration = fit_platt(logits, labels)
    return calibration, choose_threshold(calibration.probabilities(logits), labels)


def _measure(
    logits: Float[np.ndarray, " u"], labels: Int[np.ndarray, " u"], calibration: Calibration, alpha: float
) -> dict[str, Any]:
    probabilities = calibration.probabilities(logits)
    values: dict[str, Any] = binary_metrics(probabilities, labels, alpha, NUM_BINS)
    values |= {"alpha": alpha, "calibration": {"scale": calibration.scale, "bias": calibration.bias}}
    if np.any(labels >= 0):
        before = expected_calibration_error(Calibration().probabilities(logits), labels, NUM_BINS)
        values["expected_calibration_error_before"] = before
        curve = reliability_curve(probabilities, labels, NUM_BINS)
        values["calibration"] |= dict(
            zip(("predicted", "observed", "count"), (c.tolist() for c in curve), strict=True)
        )
    return values
