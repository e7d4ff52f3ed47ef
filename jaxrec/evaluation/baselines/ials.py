"""Implicit matrix factorisation by alternating least squares.

Q = queries, V = num_items + 1.
"""

import dataclasses
from typing import Any

import numpy as np
import scipy.sparse as sparse
import threadpoolctl
from jaxtyping import Float32

from jaxrec.data.dataset import Histories
from jaxrec.evaluation.baselines.base import interactions, pad_column

__all__ = ["IALS", "FittedIALS"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class IALS:
    """Factors fitted to ones where a user took an item, of high weight, and zeros elsewhere, of weight 1.

    A query user's factors are solved for from the query's history, so users need not be known to the fit.

    Source: Hu, Koren, Volinsky, ICDM 2008 (implicit feedback); the `implicit` library does the work.

    Attributes:
      num_factors: embedding dim.
      positive_weight: of a pair that was taken.
      regularization: of both sides.
      num_iterations: of alternation.
      seed: of the first factors.
    """

    num_factors: int = 64
    positive_weight: float = 10.0
    regularization: float = 50.0
    num_iterations: int = 15
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_factors < 1 or self.num_iterations < 1 or self.regularization <= 0.0:
            raise ValueError(
                f"num_factors={self.num_factors}, num_iterations={self.num_iterations}, "
                f"regularization={self.regularization} must all be above 0."
            )
        if self.positive_weight <= 1.0:
            raise ValueError(f"positive_weight={self.positive_weight} must be above 1, the weight of a zero.")

    def fit(self, train: Histories, num_items: int) -> "FittedIALS":
        """Alternates between users and items."""
        from implicit.cpu.als import AlternatingLeastSquares

        # The library runs its own threads over users; threads of BLAS inside each would fight them.
        with threadpoolctl.threadpool_limits(1, user_api="blas"):
            model = AlternatingLeastSquares(
                factors=self.num_factors,
                alpha=self.positive_weight,
                regularization=self.regularization,
                iterations=self.num_iterations,
                random_state=self.seed,
            )
            model.fit(sparse.csr_matrix(interactions(train, num_items)), show_progress=False)
        return FittedIALS(model)


@dataclasses.dataclass(frozen=True)
class FittedIALS:
    """The library's model, of which the items' factors are used."""

    model: Any

    def scores(self, queries: Histories) -> Float32[np.ndarray, "q v"]:
        """Solves for each query's factors, then takes inner products."""
        history = sparse.csr_matrix(interactions(queries, len(self.model.item_factors) - 1))
        with threadpoolctl.threadpool_limits(1, user_api="blas"):
            users = self.model.recalculate_user(np.arange(len(queries)), history)
        return pad_column(users @ self.model.item_factors.T)
