"""EASE: the best linear item-to-item model, in closed form.

V = num_items + 1, N = items with an event.
"""

import dataclasses

import numpy as np
import scipy.linalg
from jaxtyping import Float32

from jaxrec.data.dataset import Histories
from jaxrec.evaluation.baselines.base import BaselineRefusedError, ItemWeights, interactions

__all__ = ["EASE"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EASE:
    """Ridge regression of every item on all the others.

    `P = (X^T X + regularization I)^-1`, `B_ij = -P_ij / P_jj`, `B_jj = 0`.

    Source: Steck, WWW 2019 (embarrassingly shallow autoencoders).

    Attributes:
      regularization: the ridge.
      max_items: with more items than this the N x N inverse would take too long and too much memory.
    """

    regularization: float = 500.0
    max_items: int = 20_000

    def __post_init__(self) -> None:
        if self.regularization <= 0.0:
            raise ValueError(f"regularization={self.regularization} must be above 0.")

    def fit(self, train: Histories, num_items: int) -> ItemWeights:
        """One symmetric inverse, in place."""
        if num_items > self.max_items:
            gigabytes = 8.0 * num_items**2 / 1e9
            raise BaselineRefusedError(
                f"{num_items} items are more than max_items={self.max_items}: the inverse would need "
                f"{gigabytes:.1f} GB; raise EASE.max_items where there is memory and time for it."
            )
        by_user = interactions(train, num_items)[:, 1:]
        gram = (by_user.T @ by_user).toarray(order="F")
        gram[np.diag_indices(num_items)] += np.float32(self.regularization)
        inverse = _symmetric_inverse(gram)
        weights = np.zeros((num_items + 1, num_items + 1), np.float32)
        np.divide(inverse, -np.diag(inverse), out=weights[1:, 1:])
        np.fill_diagonal(weights, 0.0)
        return ItemWeights(weights)


def _symmetric_inverse(matrix: Float32[np.ndarray, "n n"]) -> Float32[np.ndarray, "n n"]:
    """The inverse of a positive definite matrix, which is overwritten: a third of the general cost."""
    factor, failed = scipy.linalg.lapack.spotrf(matrix, lower=True, overwrite_a=True)
    if not failed:
        inverse, failed = scipy.linalg.lapack.spotri(factor, lower=True, overwrite_c=True)
    if failed:
        raise BaselineRefusedError(
            "the matrix of EASE is not positive definite in float32; raise EASE.regularization."
        )
    upper = np.triu_indices(len(inverse), 1)
    inverse[upper] = inverse.T[upper]
    return inverse
