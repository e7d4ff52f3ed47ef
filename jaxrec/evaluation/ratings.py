"""How near are the predicted values (ratings, counts) to the given ones, and to those of simple means?

U = target events.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from jaxrec.data.dataset import PreparedDataset
from jaxrec.evaluation.significance import paired_comparison
from jaxrec.evaluation.user_ranking import ValuePredictions
from jaxrec.tasks.base import Task

# Events by which the deviation of an item, and then of a user, is drawn to 0.
ITEM_PRIOR, USER_PRIOR = 10.0, 5.0


def learns_values(tasks: Mapping[str, Task]) -> bool:
    """Whether a task of the run predicts the number beside an event."""
    return any(task.needs_value_head for task in tasks.values())


def value_metrics(dataset: PreparedDataset, predicted: ValuePredictions, split: str) -> dict[str, Any]:
    """Errors of the model and of two simple predictions, by the name of the column; {} where no value is known.

    `difference` is the model's squared error less that of the user's and item's means, with its 95 % interval: below
    0 the model is nearer.
    """
    known = ~np.isnan(predicted.values)
    if not known.any() or dataset.metadata.value is None:
        return {}
    values = predicted.values[known].astype(np.float64)
    simple = mean_predictions(dataset, predicted, split)
    systems = {"model": predicted.predicted} | simple
    errors = {name: values - found[known] for name, found in systems.items()}
    squares = {name: error**2 for name, error in errors.items()}
    paired = paired_comparison(squares["user_item_means"], squares["model"])
    return {
        dataset.metadata.value.name: {
            "num_values": int(np.count_nonzero(known)),
            "rmse": {name: float(np.sqrt(square.mean())) for name, square in squares.items()},
            "mae": {name: float(np.abs(error).mean()) for name, error in errors.items()},
            "difference": {"mean": paired.difference, "interval": [paired.low, paired.high]},
        }
    }


def mean_predictions(
    dataset: PreparedDataset, predicted: ValuePredictions, split: str
) -> dict[str, Float64[np.ndarray, " u"]]:
    """The mean of all events before the split, and the mean with what the item and then the user add to it.

    Source: Koren, KDD 2008 (baseline estimates, by shrunk means).
    """
    ends = dataset.validation_end if split == "test" else dataset.train_end
    users = np.arange(len(ends))
    before = dataset.prefixes(users, ends)
    known = ~np.isnan(before.values)
    values = before.values[known].astype(np.float64)
    items, owners = before.item_ids[known], np.repeat(users, np.diff(before.offsets))[known]
    mean = float(values.mean()) if len(values) else 0.0
    of_item = _shrunk(values - mean, items, dataset.metadata.num_items + 1, ITEM_PRIOR)
    of_user = _shrunk(values - mean - of_item[items], owners, len(users), USER_PRIOR)
    both = mean + of_item[predicted.targets] + of_user[predicted.user_indices]
    return {"mean": np.full(len(both), mean), "user_item_means": both}


def _shrunk(
    deviations: Float64[np.ndarray, " e"], groups: np.ndarray, size: int, prior: float
) -> Float[np.ndarray, " g"]:
    total = np.bincount(groups, weights=deviations, minlength=size)
    return total / (np.bincount(groups, minlength=size) + prior)
