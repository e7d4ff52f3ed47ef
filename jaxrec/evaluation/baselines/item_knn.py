"""Item-kNN: items whose users are alike.

V = num_items + 1.
"""

import dataclasses
import itertools

import numpy as np
import scipy.sparse as sparse
from jaxtyping import Float32

from jaxrec.data.dataset import Histories
from jaxrec.evaluation.baselines.base import ItemWeights, interactions

__all__ = ["ItemKNN"]

BLOCK_ELEMENTS = 1 << 25  # bounds the similarities that are in memory before they are cut


@dataclasses.dataclass(frozen=True, kw_only=True)
class ItemKNN:
    """The shrunken cosine between the users of two items, kept for the nearest neighbours of each.

    `s_ij = n_ij / (sqrt(n_i n_j) + shrinkage)`; a query's score of j sums over the items of its history
    that are neighbours of j.

    Source: Deshpande & Karypis, TOIS 2004 (item-based top-N); Bell & Koren, ICDM 2007 (the shrinkage).

    Attributes:
      num_neighbours: kept for each item j.
      shrinkage: added to the denominator: a few common users are no proof.
    """

    num_neighbours: int = 20
    shrinkage: float = 10.0

    def __post_init__(self) -> None:
        if self.num_neighbours < 1 or self.shrinkage < 0.0:
            raise ValueError(
                f"num_neighbours={self.num_neighbours}, shrinkage={self.shrinkage}: say num_neighbours >= 1 "
                "and shrinkage >= 0."
            )

    def fit(self, train: Histories, num_items: int) -> ItemWeights:
        """Similarities, a block of items at a time."""
        by_user = interactions(train, num_items)
        by_item = by_user.T.tocsr()
        norms = np.sqrt(np.diff(by_item.indptr)).astype(np.float32)
        block_size = max(1, BLOCK_ELEMENTS // (num_items + 1))
        blocks = [
            self._neighbours(by_item, by_user, norms, first, min(first + block_size, num_items + 1))
            for first in range(0, num_items + 1, block_size)
        ]
        return ItemWeights(sparse.vstack(blocks, format="csr").T.tocsr())

    def _neighbours(
        self,
        by_item: sparse.csr_array,
        by_user: sparse.csr_array,
        norms: Float32[np.ndarray, " v"],
        first: int,
        last: int,
    ) -> sparse.csr_array:
        """Rows `first .. last - 1` of the similarity matrix, each cut to its nearest neighbours."""
        similar = by_item[first:last] @ by_user
        rows = np.repeat(np.arange(first, last), np.diff(similar.indptr))
        similar.data /= norms[rows] * norms[similar.indices] + np.float32(self.shrinkage)
        similar.data[rows == similar.indices] = 0.0  # nobody is one's own neighbour
        for start, end in itertools.pairwise(similar.indptr.tolist()):
            if end - start > self.num_neighbours:
                row = similar.data[start:end]
                # Ties with the last neighbour stay: no order of items decides.
                row[row < np.partition(row, -self.num_neighbours)[-self.num_neighbours]] = 0.0
        similar.eliminate_zeros()
        return similar
