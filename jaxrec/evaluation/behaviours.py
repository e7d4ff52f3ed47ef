"""How good are the predicted behaviours, after calibration on the validation targets?

U = target events, K = behaviours.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from jaxrec.core.files import replacing
from jaxrec.data.dataset import PreparedDataset
from jaxrec.evaluation.user_ranking import BehaviourPredictions
from jaxrec.metrics.binary import (
    Calibration,
    binary_metrics,
    choose_threshold,
    expected_calibration_error,
    fit_platt,
    reliability_curve,
)
from jaxrec.tasks.base import Task
from jaxrec.tasks.behaviour import Behaviour
from jaxrec.tasks.funnel import Funnel

PREDICTIONS_FILE = "behaviours.parquet"
NUM_BINS = 15
_FEWEST_LABELS = 20  # fewer known validation labels of a behaviour calibrate nothing


def learned_behaviours(tasks: Mapping[str, Task], names: Sequence[str]) -> tuple[str, ...]:
    """Those of the dataset's behaviours that a task of the run learns: no others are worth a number."""
    wanted = {name for task in tasks.values() for name in task.learned_behaviours(names)}
    return tuple(name for name in names if name in wanted)


def asked_labels(
    tasks: Mapping[str, Task], names: Sequence[str], labels: Int[np.ndarray, "u k"]
) -> Int[np.ndarray, "u k"]:
    """The labels that the predictions speak of: none of a behaviour that is learned given one that did not happen."""
    asked = labels.copy()
    for task in tasks.values():
        if isinstance(task, Behaviour) and task.given:
            columns = [names.index(name) for name in task.behaviours]
            asked[np.ix_(labels[:, names.index(task.given)] != 1, columns)] = -1
    return asked


def funnel_counts(
    tasks: Mapping[str, Task],
    names: Sequence[str],
    predicted: BehaviourPredictions,
    measured: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """How often each funnel's second behaviour goes without the first: in the labels, and by the probabilities.

    Args:
      measured: what `behaviour_metrics` found; its calibrations know no funnel, so that they may break its order.
    """
    found = {}
    for task in tasks.values():
        if not isinstance(task, Funnel):
            continue
        columns = [names.index(name) for name in (task.first, task.second)]
        labels, logits = predicted.labels[:, columns], predicted.logits[:, columns]
        fits = [measured[name]["calibration"] for name in (task.first, task.second)]
        calibrated = [
            Calibration(fit["scale"], fit["bias"]).probabilities(column)
            for fit, column in zip(fits, logits.T, strict=True)
        ]
        found[task.second] = {
            "first": task.first,
            "num_events": int(np.count_nonzero((labels >= 0).all(axis=1))),
            "labels": int(np.count_nonzero((labels == [0, 1]).all(axis=1))),
            "predicted": int(np.count_nonzero(logits[:, 1] > logits[:, 0])),
            "calibrated": int(np.count_nonzero(calibrated[1] > calibrated[0])),
        }
    return found


def write_predictions(
    workdir: Path, dataset: PreparedDataset, predicted: BehaviourPredictions, learned: Sequence[str]
) -> None:
    """Writes `behaviours.parquet` at once: ids of user and item, and of each learned behaviour label and logit."""
    columns = {
        "user_id": pa.array(dataset.user_keys[predicted.user_indices]),
        "item_id": pa.array(dataset.item_keys[predicted.targets - 1]),
    }
    for name in learned:
        column = dataset.metadata.behaviours.index(name)
        columns[name] = pa.array(predicted.labels[:, column])
        columns[f"{name}_logit"] = pa.array(predicted.logits[:, column])
    with replacing(workdir / PREDICTIONS_FILE) as temporary:
        pq.write_table(pa.table(columns), temporary)


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
