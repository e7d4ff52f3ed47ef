"""Text queries and the items that answer them, as the tasks see them.

Q = queries, T = tokens of a query, P = pairs of a query and an item, E = answers of the query that has most.
"""

import dataclasses

import numpy as np
from jaxtyping import Int32, Int64


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TextQueries:
    """Pairs of a query and an item that answers it: what was searched for and chosen, or an item's tags.

    Attributes:
      token_ids: word pieces of each query; 0 = padding.
      query_ids, item_ids: of each pair, by rising query; queries count from 0, items from 1.
    """

    token_ids: Int32[np.ndarray, "q t"]
    query_ids: Int32[np.ndarray, " p"]
    item_ids: Int32[np.ndarray, " p"]

    def item_counts(self, num_items: int) -> Int64[np.ndarray, " n_plus_1"]:
        """Pairs of each item id; [0] = 0."""
        return np.bincount(self.item_ids, minlength=num_items + 1)

    def answers(self) -> Int32[np.ndarray, "q e"]:
        """The items of each query; 0 fills up."""
        counts = np.bincount(self.query_ids, minlength=len(self.token_ids))
        table = np.zeros((len(counts), counts.max(initial=1)), np.int32)
        starts = np.cumsum(counts) - counts
        table[self.query_ids, np.arange(len(self.query_ids)) - starts[self.query_ids]] = self.item_ids
        return table
