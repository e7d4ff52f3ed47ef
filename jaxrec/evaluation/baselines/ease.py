"""EASE: the best linear item-to-item model, in closed form.

V = num_items + 1, N = items, U = training users, Q = queries.
"""

import dataclasses

import numpy as np
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

DIRECT_SIZE = 512  # below it the library's own inverse is as fast


@dataclasses.dataclass(frozen=True, kw_only=True)
class EASE:
    """Ridge regression of every item on all the others.

    `P = (X^T X + regularization I)^-1`, `B_ij = -P_ij / P_jj`, `B_jj = 0`; a query's scores are its binary
    history times B. With fewer users than items the same scores come from a U x U inverse instead.

    Source: Steck, WWW 2019 (embarrassingly shallow autoencoders).

    Attributes:
      regularization: the ridge.
      max_size: a larger inverse than this would take too long and too much memory.
    """

    regularization: float = 500.0
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
                f"inverse would need {8e-9 * size**2:.1f} GB and hours at worst; raise EASE.max_size where "
                "there is memory and time for it."
            )
        if num_users < num_items:
            return self._fit_users(by_user)
        gram = _gram(by_user.T.tocsr()[1:], self.regularization)
        _invert(gram)
        diagonal = _diagonal(gram)
        weights = np.zeros((num_items + 1, num_items + 1), np.float32)
        np.divide(gram, -diagonal, out=weights[1:, 1:])
        np.fill_diagonal(weights, 0.0)
        return ItemWeights(weights)

    def _fit_users(self, by_user: sparse.csr_array) -> "FittedDualEASE":
        """`P = (I - X^T M X) / regularization` with `M = (X X^T + regularization I)^-1` (Woodbury)."""
        inverse = _gram(by_user, self.regularization)
        _invert(inverse)
        _diagonal(inverse)
        explained = (by_user.multiply(inverse @ by_user)).sum(axis=0)
        return FittedDualEASE(by_user, inverse, np.asarray(1.0 - explained, np.float32).ravel())


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
    """Inverts a positive definite matrix in place, by halves (Schur complements).

    Nearly all of it is matrix products of half the size, which run several times faster than LAPACK's
    routine for symmetric inverses.
    """
    size = len(matrix)
    if size <= DIRECT_SIZE:
        matrix[:] = np.linalg.inv(matrix)
        return
    half = size // 2
    first, second, corner = matrix[:half, :half], matrix[half:, half:], matrix[half:, :half]
    _invert(first)
    explained = corner @ first
    second -= explained @ corner.T
    _invert(second)
    np.negative(second @ explained, out=corner)
    first -= explained.T @ corner
    matrix[:half, half:] = corner.T


def _diagonal(inverse: Float32[np.ndarray, "n n"]) -> Float32[np.ndarray, " n"]:
    diagonal = np.diag(inverse).copy()
    if not (np.isfinite(diagonal).all() and (diagonal > 0.0).all()):
        raise BaselineRefusedError(
            "the matrix of EASE is not positive definite in float32; raise EASE.regularization."
        )
    return diagonal
