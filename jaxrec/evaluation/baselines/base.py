"""What every baseline shares: the interface, sparse views of histories, and scores as one matrix product.

Q = queries, E = events, V = num_items + 1 (column 0 is the padding item).
"""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np
import scipy.sparse as sparse
from jaxtyping import Bool, Float32

from jaxrec.data.dataset import Histories

__all__ = [
    "Baseline",
    "BaselineRefusedError",
    "Fitted",
    "ItemScores",
    "ItemWeights",
    "interactions",
    "pad_column",
]


class BaselineRefusedError(ValueError):
    """A baseline cannot run on this data; the message says why and what would help."""


@runtime_checkable
class Fitted(Protocol):
    """A baseline after its fit."""

    def scores(self, queries: Histories) -> Float32[np.ndarray, "q v"]:
        """A score of every item for every query history; column 0, the padding, is -inf."""
        ...


@runtime_checkable
class Baseline(Protocol):
    """A baseline before its fit: a frozen dataclass of hyper-parameters."""

    def fit(self, train: Histories, num_items: int) -> Fitted:
        """Learns from the training histories.

        Raises:
            BaselineRefusedError: the data is too large for it, or lacks what it needs.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ItemScores:
    """The same scores for everybody."""

    item_scores: Float32[np.ndarray, " v"]

    def scores(self, queries: Histories) -> Float32[np.ndarray, "q v"]:
        """One copy of the item scores a query."""
        return pad_column(np.tile(self.item_scores, (len(queries), 1)))


@dataclasses.dataclass(frozen=True)
class ItemWeights:
    """Item-to-item weights: a query's scores are the sum of the rows of the items in its history."""

    weights: sparse.csr_array | Float32[np.ndarray, "v v"]

    def scores(self, queries: Histories) -> Float32[np.ndarray, "q v"]:
        """The binary history times the weights."""
        return product(interactions(queries, self.weights.shape[0] - 1), self.weights)


def product(
    query_weights: sparse.csr_array, weights: sparse.csr_array | Float32[np.ndarray, "v v"]
) -> Float32[np.ndarray, "q v"]:
    """`query_weights @ weights`, dense, with the padding column masked."""
    scores = query_weights @ weights
    if sparse.issparse(scores):
        scores = scores.toarray()
    return pad_column(np.asarray(scores, np.float32))


def interactions(histories: Histories, num_items: int) -> sparse.csr_array:
    """Who has which item: float32 ones [Q, V]. A repeated item counts once."""
    matrix = sparse.csr_array(
        (np.ones(len(histories.item_ids), np.float32), histories.item_ids, histories.offsets),
        shape=(len(histories), num_items + 1),
        copy=True,  # repeats are merged in place
    )
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix


def pad_column(scores: Float32[np.ndarray, "q v"]) -> Float32[np.ndarray, "q v"]:
    """Masks the padding item, in place."""
    scores[:, 0] = -np.inf
    return scores


def select(histories: Histories, keep: Bool[np.ndarray, " e"]) -> Histories:
    """The histories without the events that `keep` drops."""
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(keep, dtype=np.int64)])
    return Histories(
        before[histories.offsets],
        histories.item_ids[keep],
        histories.timestamps[keep],
        histories.labels[keep],
        histories.values[keep],
        None if histories.context is None else histories.context[keep],
    )
