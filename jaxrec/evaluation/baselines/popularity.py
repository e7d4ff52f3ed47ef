"""Popularity: the items that most users have taken, ever and lately.

V = num_items + 1.
"""

import dataclasses

import numpy as np

from jaxrec.data.dataset import UNKNOWN_TIME, Histories
from jaxrec.data.transitions import ages
from jaxrec.evaluation.baselines.base import ItemScores

__all__ = ["Popularity", "RecentPopularity"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Popularity:
    """Training events of an item."""

    def fit(self, train: Histories, num_items: int) -> ItemScores:
        """Counts."""
        return ItemScores(np.bincount(train.item_ids, minlength=num_items + 1).astype(np.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecentPopularity:
    """Events of an item in the last window of the training time.

    The window is the latest share of the training events, not a number of days, so that one setting suits
    data of any pace. Where no event has a time, it is the latest share of each history.

    Attributes:
      share: of the training events.
    """

    share: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"share={self.share} must be above 0 and at most 1.")

    def fit(self, train: Histories, num_items: int) -> ItemScores:
        """Counts inside the window. Items without an event there tie, and rank by their id."""
        known = train.timestamps != UNKNOWN_TIME
        if known.any():
            start = np.quantile(train.timestamps[known], 1.0 - self.share, method="inverted_cdf")
            recent = known & (train.timestamps >= start)
        else:
            lengths = np.diff(train.offsets)
            recent = ages(train) < np.repeat(np.ceil(lengths * self.share), lengths)
        return ItemScores(np.bincount(train.item_ids[recent], minlength=num_items + 1).astype(np.float32))
