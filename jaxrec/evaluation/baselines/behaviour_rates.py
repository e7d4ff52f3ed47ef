"""Simple models of a behaviour, from an event's item and context alone.

N = events, F = columns: the item, then those of the context. Their entries are any whole numbers; 0 = unknown.
"""

import dataclasses
from typing import Protocol

import numpy as np
import scipy.optimize
import scipy.sparse as sparse
from jaxtyping import Float64, Int

Features = Int[np.ndarray, "n f"]


class FittedRate(Protocol):
    """A baseline after its fit."""

    def logits(self, features: Features) -> Float64[np.ndarray, " n"]:
        """Of the behaviour."""
        ...


class BehaviourBaseline(Protocol):
    """A baseline before its fit: a frozen dataclass of hyper-parameters."""

    def fit(self, features: Features, labels: Int[np.ndarray, " n"]) -> FittedRate:
        """Learns from events whose label, 1 or 0, is known."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ItemRate:
    """The share of an item's events with the behaviour, drawn to that of all events.

    Attributes:
      prior_events: events that the common share counts for.
    """

    prior_events: float = 200.0

    def fit(self, features: Features, labels: Int[np.ndarray, " n"]) -> FittedRate:
        """See the class."""
        items = features[:, 0]
        counts = np.bincount(items)
        positives = np.bincount(items, labels)
        common = (labels.sum() + 1.0) / (len(labels) + 2.0)
        rates = (positives + self.prior_events * common) / (counts + self.prior_events)
        return _ItemLogits(_logit(rates), float(_logit(common)))


@dataclasses.dataclass(frozen=True)
class _ItemLogits:
    of_items: Float64[np.ndarray, " v"]
    common: float

    def logits(self, features: Features) -> Float64[np.ndarray, " n"]:
        items = features[:, 0]
        known = items < len(self.of_items)
        return np.where(known, self.of_items[np.where(known, items, 0)], self.common)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogisticRegression:
    """One weight for each value of each column, and a bias.

    Attributes:
      l2: penalty on half the squared weights, beside the sum of log-losses; the bias bears none.
    """

    l2: float = 1.0

    def fit(self, features: Features, labels: Int[np.ndarray, " n"]) -> FittedRate:
        """See the class."""
        values = [np.unique(column) for column in features.T]
        model = _Weights(values, np.zeros(1 + sum(map(len, values))))
        ones, signs = model.one_hot(features), np.where(labels == 1, 1.0, -1.0)

        def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
            margins = signs * (ones @ weights)
            penalised = np.append(0.0, weights[1:])
            loss = np.logaddexp(0.0, -margins).sum() + 0.5 * self.l2 * np.square(penalised).sum()
            gradient = ones.T @ (-signs * np.exp(-np.logaddexp(0.0, margins)))
            return float(loss), gradient + self.l2 * penalised

        found = scipy.optimize.minimize(objective, model.weights, jac=True, method="L-BFGS-B")
        return dataclasses.replace(model, weights=found.x)


@dataclasses.dataclass(frozen=True)
class _Weights:
    values: list[np.ndarray]
    weights: Float64[np.ndarray, " w"]

    def logits(self, features: Features) -> Float64[np.ndarray, " n"]:
        return np.asarray(self.one_hot(features) @ self.weights)

    def one_hot(self, features: Features) -> sparse.csr_array:
        """The bias, and a column for each value that was there at the fit."""
        rows, columns, start = [np.arange(len(features))], [np.zeros(len(features), np.int64)], 1
        for values, column in zip(self.values, features.T, strict=True):
            place = np.minimum(np.searchsorted(values, column), len(values) - 1)
            known = np.flatnonzero(values[place] == column)
            rows.append(known)
            columns.append(start + place[known])
            start += len(values)
        row, column = np.concatenate(rows), np.concatenate(columns)
        return sparse.csr_array((np.ones(len(row)), (row, column)), shape=(len(features), start))


def _logit(rates: Float64[np.ndarray, "*n"] | float) -> Float64[np.ndarray, "*n"]:
    return np.log(rates) - np.log1p(-np.asarray(rates))
