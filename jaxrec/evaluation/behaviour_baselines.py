"""Beside the predicted behaviours: an item's rate and a logistic regression, on the same events, with intervals.

N = events.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxrec.data.dataset import PreparedDataset
from jaxrec.evaluation.baselines.behaviour_rates import (
    BehaviourBaseline,
    Features,
    ItemRate,
    LogisticRegression,
)
from jaxrec.evaluation.behaviours import behaviour_metrics
from jaxrec.evaluation.user_ranking import BehaviourPredictions
from jaxrec.metrics.binary import Calibration, auc, log_loss

BASELINES: Mapping[str, BehaviourBaseline] = {
    "item_rate": ItemRate(),
    "logistic_regression": LogisticRegression(),
}
_SHOWN = ("auc", "log_loss", "expected_calibration_error")
_TAILS = (0.025, 0.975)


def compare_behaviours(
    dataset: PreparedDataset,
    predicted: BehaviourPredictions,
    reference: BehaviourPredictions,
    measured: Mapping[str, Mapping[str, Any]],
    baselines: Sequence[str],
    *,
    num_samples: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """By learned behaviour and system, the model among them: AUC, log-loss and calibration error, with intervals.

    Baselines learn from the training events and are calibrated on `reference` as the model is. The intervals (95 %)
    are over the events, drawn anew, the same for all systems; `auc_gain` is that of the model's AUC less a baseline's.
    Without any known label of a behaviour in `predicted` all of them are None, as those of `binary_metrics`.
    """
    names = dataset.metadata.behaviours
    train = dataset.prefixes(np.arange(len(dataset.lengths)), dataset.train_end)
    features = _features(train.item_ids, train.context)
    systems = {"model": (predicted, reference)}
    for name in baselines:
        logits_of = [np.zeros_like(part.logits) for part in (predicted, reference)]
        for column, behaviour in enumerate(names):
            known = train.labels[:, column] >= 0
            if behaviour in measured and known.any():
                fitted = BASELINES[name].fit(features[known], train.labels[known, column])
                for part, logits in zip((predicted, reference), logits_of, strict=True):
                    logits[:, column] = fitted.logits(_features(part.targets, part.context))
        systems[name] = (
            dataclasses.replace(predicted, logits=logits_of[0]),
            dataclasses.replace(reference, logits=logits_of[1]),
        )
    found: dict[str, dict[str, Any]] = {behaviour: {} for behaviour in measured}
    for behaviour in measured:
        column = names.index(behaviour)
        known = predicted.labels[:, column] >= 0
        if not known.any():
            found[behaviour] = {system: dict.fromkeys(_undefined(system)) for system in systems}
            continue
        labels = predicted.labels[known, column]
        scores, probabilities = {}, {}
        for system, (asked, calibrating) in systems.items():
            values = behaviour_metrics(names, asked, calibrating, [behaviour])[behaviour]
            fit = Calibration(values["calibration"]["scale"], values["calibration"]["bias"])
            scores[system] = asked.logits[known, column]
            probabilities[system] = fit.probabilities(scores[system])
            # By the logits: where they say nothing on `reference`, the calibrated probabilities are all alike.
            found[behaviour][system] = {name: values[name] for name in _SHOWN}
            found[behaviour][system]["auc"] = _defined(auc(scores[system], labels))
        drawn = _resampled(scores, probabilities, labels, num_samples, seed)
        for system in systems:
            of_system = drawn[system]
            found[behaviour][system] |= {
                f"{metric}_interval": _interval(of_system[:, index])
                for index, metric in enumerate(_SHOWN[:2])
            }
            if system != "model":
                found[behaviour][system]["auc_gain"] = _interval(drawn["model"][:, 0] - of_system[:, 0])
    return found


def _features(item_ids: Int[np.ndarray, " n"], context: Int[np.ndarray, "n f"] | None) -> Features:
    columns = [item_ids[:, None]] if context is None else [item_ids[:, None], context]
    return np.concatenate(columns, axis=1)


def _resampled(
    logits: Mapping[str, Float[np.ndarray, " n"]],
    probabilities: Mapping[str, Float[np.ndarray, " n"]],
    labels: Int[np.ndarray, " n"],
    num_samples: int,
    seed: int,
) -> dict[str, Float[np.ndarray, "s two"]]:
    """AUC and log-loss of each system on events that are drawn anew."""
    rows: dict[str, list[tuple[float, float]]] = {system: [] for system in probabilities}
    for chosen in _draws(len(labels), num_samples, seed):
        drawn = labels[chosen]
        for system, values in probabilities.items():
            rows[system].append((auc(logits[system][chosen], drawn), log_loss(values[chosen], drawn)))
    return {system: np.array(values) for system, values in rows.items()}


def _draws(size: int, num_samples: int, seed: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng(seed)
    for _ in range(num_samples):
        yield random.integers(0, size, size)


def _undefined(system: str) -> tuple[str, ...]:
    """What has no value where no label is known."""
    intervals = tuple(f"{metric}_interval" for metric in _SHOWN[:2])
    return _SHOWN + intervals + (() if system == "model" else ("auc_gain",))


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else value


def _interval(values: Float[np.ndarray, " s"]) -> list[float] | None:
    """None where no draw has both classes."""
    defined = values[~np.isnan(values)]
    return [float(value) for value in np.quantile(defined, _TAILS)] if len(defined) else None
