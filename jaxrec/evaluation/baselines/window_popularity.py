"""Popularity of the moment: what everybody took in the window of time before each single prediction.

The other baselines are fitted once, on the training part, and stand still; this one knows every event before the moment
of the target, those of the validation and the test part too, as a shop's list of what sells today does. So it has no
`fit`, and it needs the time of the target, which no model is told.

T = targets, E = events, V = num_items + 1.
"""

import dataclasses

import numpy as np
from jaxtyping import Int32, Int64

from jaxrec.data.dataset import UNKNOWN_TIME, PreparedDataset
from jaxrec.data.packing import Windows
from jaxrec.evaluation.baselines.evaluate import split_queries

__all__ = ["WindowPopularity", "WindowRanks"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowRanks:
    """Ranks of the targets of a split, in the order of `evaluate_baselines`."""

    user_indices: Int64[np.ndarray, " t"]
    targets: Int32[np.ndarray, " t"]
    ranks: Int64[np.ndarray, " t"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowPopularity:
    """Events of an item in the last `seconds` before the target, the moment itself left out; ties by lower id.

    Attributes:
      seconds: length of the window. A week is usual for films; for sessions hours.
    """

    seconds: int = 7 * 24 * 3600

    def __post_init__(self) -> None:
        if self.seconds < 1:
            raise ValueError(f"seconds={self.seconds} must be at least 1.")

    def ranks(self, dataset: PreparedDataset, split: str, *, every_event: bool = False) -> WindowRanks:
        """The 0-based rank of each target; what was seen is left out where the dataset filters it.

        Raises:
          ValueError: events have no time, or the split is unknown.
        """
        asked = split_queries(dataset, split, every_event=every_event)
        ones = np.ones_like(asked.ends)
        moments = dataset.windows(
            Windows(users=asked.user_indices, starts=asked.ends, lengths=ones)
        ).timestamps
        log = dataset.histories(np.arange(dataset.metadata.num_users))
        if (log.timestamps == UNKNOWN_TIME).any():
            raise ValueError(
                f"dataset {dataset.metadata.name!r} has events without a time, so no window before a target is known; "
                "take RecentPopularity."
            )
        order = np.argsort(log.timestamps, kind="stable")
        times, items = log.timestamps[order], log.item_ids[order]
        first, last = (np.searchsorted(times, moments - before) for before in (self.seconds, 0))
        counts = np.zeros(dataset.metadata.num_items + 1, np.int64)
        counts[0] = -1  # padding never stands before anything
        ranks = np.zeros(len(moments), np.int64)
        begin = end = 0  # of the window that `counts` counts
        for at in np.argsort(moments, kind="stable"):
            np.add.at(counts, items[end : last[at]], 1)
            np.subtract.at(counts, items[begin : first[at]], 1)
            begin, end = int(first[at]), int(last[at])
            target = asked.targets[at]
            ahead = counts > counts[target]
            ahead[:target] |= counts[:target] == counts[target]
            if dataset.metadata.filter_seen:
                start = log.offsets[asked.user_indices[at]]
                ahead[log.item_ids[start : start + asked.ends[at]]] = False
            ranks[at] = np.count_nonzero(ahead)
        return WindowRanks(user_indices=asked.user_indices, targets=asked.targets, ranks=ranks)
