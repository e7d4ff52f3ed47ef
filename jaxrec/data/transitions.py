"""Transition counts: how often which item followed which, a few events later.

E = events, V = num_items + 1, K = successors that are kept.
"""

import numpy as np
import scipy.sparse as sparse
from jaxtyping import Float32, Int32, Int64

from jaxrec.data.histories import Histories

__all__ = ["ages", "count_transitions", "top_successors"]


def ages(histories: Histories) -> Int64[np.ndarray, " e"]:
    """How many events of the same history follow each event: 0 for the last one."""
    lengths = np.diff(histories.offsets)
    return np.repeat(histories.offsets[1:], lengths) - 1 - np.arange(len(histories.item_ids))


def count_transitions(histories: Histories, num_items: int, *, window: int, decay: float) -> sparse.csr_array:
    """`C_ij = sum over pairs (i at t, j at t + g), g = 1 .. window, of decay^(g - 1)`, `[V, V]` float32.

    One gap after the other, so that memory holds one gap's pairs at a time.
    """
    counts = sparse.csr_array((num_items + 1, num_items + 1), dtype=np.float32)
    followers = ages(histories)
    for gap in range(1, window + 1):
        sources = np.flatnonzero(followers >= gap)
        pairs = (histories.item_ids[sources], histories.item_ids[sources + gap])
        weights = np.full(len(sources), decay ** (gap - 1), np.float32)
        counts = counts + sparse.coo_array((weights, pairs), shape=counts.shape).tocsr()
    return counts


def top_successors(
    counts: sparse.csr_array, num_successors: int
) -> tuple[Int32[np.ndarray, "v k"], Float32[np.ndarray, "v k_plus_1"]]:
    """The largest counts of each row, falling; ties go to the smaller id.

    Returns:
      Ids, 0 where a row has fewer; their counts, and in the last column the sum of the whole row.
    """
    counts = counts.sorted_indices()
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    order = np.lexsort((counts.indices, -counts.data, rows))
    place = np.arange(len(order)) - np.repeat(counts.indptr[:-1], np.diff(counts.indptr))
    kept = place < num_successors
    ids = np.zeros((counts.shape[0], num_successors), np.int32)
    values = np.zeros((counts.shape[0], num_successors + 1), np.float32)
    at = (rows[kept], place[kept])
    ids[at], values[at] = counts.indices[order][kept], counts.data[order][kept]
    values[:, -1] = np.asarray(counts.sum(axis=1)).ravel()
    return ids, values
