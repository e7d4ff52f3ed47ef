"""Transition counts: what followed the items of the query's end, in other histories.

V = num_items + 1.
"""

import dataclasses

import numpy as np
import scipy.sparse as sparse
from jaxtyping import Float32

from jaxrec.data.dataset import Histories
from jaxrec.data.transitions import ages, count_transitions
from jaxrec.evaluation.baselines.base import product, select

__all__ = ["FittedTransition", "Transition"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transition:
    """Decayed counts of item j after item i, as shrunken rates, summed over the end of the query.

    C are the counts of `data.transitions`;
    `score_j = sum over the last events of the query, of age a < window, of decay^a C_ij / (C_i + shrinkage)`
    where `C_i` is the sum of row i. Without the division popular items drown the others; without the
    shrinkage an item seen once speaks as loudly as one seen a thousand times.

    Attributes:
      window: events over which a count and a query reach.
      decay: weight of a gap or an age, relative to the one before.
      shrinkage: counts that an item needs to be trusted by half.
    """

    window: int = 10
    decay: float = 0.7
    shrinkage: float = 100.0

    def __post_init__(self) -> None:
        if self.window < 1 or not 0.0 < self.decay <= 1.0 or self.shrinkage < 0.0:
            raise ValueError(
                f"window={self.window}, decay={self.decay}, shrinkage={self.shrinkage}: say window >= 1, "
                "0 < decay <= 1, shrinkage >= 0."
            )

    def fit(self, train: Histories, num_items: int) -> "FittedTransition":
        """Counts, and divides each row by its sum."""
        counts = count_transitions(train, num_items, window=self.window, decay=self.decay)
        totals = np.asarray(counts.sum(axis=1)).ravel() + self.shrinkage
        scale = np.divide(1.0, totals, out=np.zeros_like(totals), where=totals > 0)
        counts.data *= np.repeat(scale, np.diff(counts.indptr)).astype(np.float32)
        return FittedTransition(self, counts)


@dataclasses.dataclass(frozen=True)
class FittedTransition:
    """Shrunken transition rates."""

    settings: Transition
    rates: sparse.csr_array | Float32[np.ndarray, "v v"]

    def scores(self, queries: Histories) -> Float32[np.ndarray, "q v"]:
        """The decayed end of each query times the rates."""
        age = ages(queries)
        end = select(queries, age < self.settings.window)
        weights = (self.settings.decay ** age[age < self.settings.window]).astype(np.float32)
        query = sparse.csr_array(
            (weights, end.item_ids, end.offsets), shape=(len(queries), self.rates.shape[0])
        )
        return product(query, self.rates)
