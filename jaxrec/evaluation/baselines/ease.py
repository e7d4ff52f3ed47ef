"""EASE: the best linear item-to-item model, in closed form.

V = num_items + 1, N = items, U = training users, Q = queries.
"""

import dataclasses

import numpy as np
import scipy.linalg
import scipy.sparse as sparse
from jaxtyping import Float32

from jaxrec.data.dataset import Histories
from jaxrec.evaluation.baselines.base import (
    BaselineRefusedError,
    Fitted,
    ItemWeights,
    interactions,
    pad_column,
)

__all__ = ["EASE", "FittedDualEASE"]

BLOCK = 512  # rows that are mirrored at a time
BLOCK_ELEMENTS = 1 << 24  # dense entries beside the inverse: 64 MiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class EASE:
    """Ridge regression of every item on all the others.

    `P = (X^T X + regularization I)^-1`, `B_ij = -P_ij / P_jj`, `B_jj = 0`; a query's scores are its binary
    history times B. With fewer users than items the same scores come from a U x U inverse instead.

    Source: Steck, WWW 2019 (embarrassingly shallow autoencoders).

    Attributes:
      regularization: the ridge.
      max_size: a larger inverse than this would take too long and too much memory; one of 20,000 takes
        minutes on 2 cores and 3.2 GB.
    """

    regularization: float = 200.0
    max_size: int = 20_000

    def __post_init__(self) -> None:
        if self.regularization <= 0.0:
            raise ValueError(f"regularization={self.regularization} must be above 0.")

    def fit(self, train: Histories, num_items: int) -> Fitted:
        """One symmetric inverse, of the items or of the users, whichever are fewer."""
        by_user = interactions(train, num_items)
        by_user = by_user[np.diff(by_user.indptr) > 0]
        num_users = by_user.shape[0]
        size = min(num_users, num_items)
        if size > self.max_size:
            raise BaselineRefusedError(
                f"{num_items} items and {num_users} users are both more than max_size={self.max_size}: the "
                f"inverse would need {8e-9 * size**2:.1f} GB; raise EASE.max_size where there is memory and time "
                "for it."
            )
        if num_users < num_items:
            return self._fit_users(by_user)
        gram = _gram(by_user.T.tocsr()[1:], self.regularization)
        _invert(gram)
        weights = np.zeros((num_items + 1, num_items + 1), np.float32)
        np.divide(gram, -np.diag(gram), out=weights[1:, 1:])
        np.fill_diagonal(weights, 0.0)
        return ItemWeights(weights)

    def _fit_users(self, by_user: sparse.csr_array) -> "FittedDualEASE":
        """`P = (I - X^T M X) / regularization` with `M = (X X^T + regularization I)^-1` (Woodbury)."""
        inverse = _gram(by_user, self.regularization)
        _invert(inverse)
        unexplained = np.ones(by_user.shape[1], np.float32)
        block_size = max(1, BLOCK_ELEMENTS // by_user.shape[1])
        for first in range(0, by_user.shape[0], block_size):
            rows = slice(first, first + block_size)
            unexplained -= by_user[rows].multiply(inverse[rows] @ by_user).sum(axis=0)
        return FittedDualEASE(by_user, inverse, unexplained)


@dataclasses.dataclass(frozen=True)
class FittedDualEASE:
    """EASE by its users: X, M, and `1 - diag(X^T M X)`, which is the diagonal of P up to the ridge."""

    by_user: sparse.csr_array
    inverse: Float32[np.ndarray, "u u"]
    unexplained: Float32[np.ndarray, " v"]

    def scores(self, queries: Histories) -> Float32[np.ndarray, "q v"]:
        """`(Q B)_j = Q_j - (Q P)_j / P_jj`, without ever forming P."""
        history = interactions(queries, len(self.unexplained) - 1)
        shared = (history @ self.by_user.T).toarray() @ self.inverse
        explained = shared @ self.by_user
        scores = explained / self.unexplained
        # An item of the history must not speak for itself: it loses the part that it explains of itself.
        rows = np.repeat(np.arange(len(queries)), np.diff(history.indptr))
        scores[rows, history.indices] += 1.0 - 1.0 / self.unexplained[history.indices]
        return pad_column(scores)


def _gram(rows: sparse.csr_array, regularization: float) -> Float32[np.ndarray, "n n"]:
    """Inner products of the rows, with the ridge."""
    gram = (rows @ rows.T).toarray()
    gram[np.diag_indices(len(gram))] += np.float32(regularization)
    return gram


def _invert(matrix: Float32[np.ndarray, "n n"]) -> None:
    """Inverts a positive definite matrix in place.

    By its Cholesky factor: block-wise elimination is nearly twice as fast, but in float32 its errors are a
    hundred times as large on co-occurrence counts, which moves ranks.

    Raises:
        BaselineRefusedError: it is not positive definite to float32 precision.
    """
    # LAPACK counts by columns: the transpose of a symmetric matrix is the same memory without a copy.
    factor, failed = scipy.linalg.lapack.spotrf(matrix.T, lower=True, overwrite_a=True)
    if not failed:
        _, failed = scipy.linalg.lapack.spotri(factor, lower=True, overwrite_c=True)
    if failed:
        raise BaselineRefusedError(
            "the matrix of EASE is not positive definite in float32; raise EASE.regularization."
        )
    # LAPACK filled one half; the other still holds the input.
    for first in range(0, len(matrix), BLOCK):
        rows = slice(first, first + BLOCK)
        corner = matrix[rows, rows]
        corner[:] = np.triu(corner) + np.triu(corner, 1).T
        matrix[first + BLOCK :, rows] = matrix[rows, first + BLOCK :].T
