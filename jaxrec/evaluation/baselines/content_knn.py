"""Content-kNN: items whose texts are alike, by the cosine of their word pieces' TF-IDF weights.

Q = queries, V = num_items + 1, T = tokens of a text.
"""

import dataclasses

import numpy as np
import scipy.sparse as sparse
from jaxtyping import Float32, Int32

from jaxrec.data.dataset import Histories
from jaxrec.data.transitions import ages
from jaxrec.evaluation.baselines.base import pad_column

__all__ = ["ContentKNN"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContentKNN:
    """A query's score of an item is the sum of its likeness to each event, weighed by the event's age.

    It learns nothing of who chose what, so that a new item is one like any other. It reads text, so that it is not
    among the defaults, which see events alone.

    Source: Salton & Buckley, Information Processing & Management 1988 (the weights).

    Attributes:
      item_tokens: of each item id, 0 = padding (`PreparedDataset.item_tokens`).
      decay: weight of an event, relative to the one after it.
    """

    item_tokens: Int32[np.ndarray, "v t"]
    decay: float = 0.8

    def __post_init__(self) -> None:
        if not 0.0 < self.decay <= 1.0:
            raise ValueError(f"decay={self.decay} must be above 0 and at most 1.")

    def fit(self, train: Histories, num_items: int) -> "TextLikeness":
        """The weights of the word pieces; of `train` nothing is used."""
        items, places = np.nonzero(self.item_tokens)
        tokens = self.item_tokens[items, places]
        shape = (num_items + 1, int(self.item_tokens.max(initial=0)) + 1)
        counts = sparse.csr_array((np.ones(len(tokens), np.float32), (items, tokens)), shape=shape)
        counts.sum_duplicates()
        frequency = np.bincount(counts.indices, minlength=shape[1])
        # A piece of every text (such as [CLS]) weighs 0.
        rarity = np.log(max(num_items, 1) / np.maximum(frequency, 1)).astype(np.float32)
        counts.data = (1.0 + np.log(counts.data)) * rarity[counts.indices]
        norms = np.sqrt(np.asarray(counts.multiply(counts).sum(axis=1)).ravel())
        scale = sparse.diags_array(1.0 / np.maximum(norms, 1e-12), dtype=np.float32)
        return TextLikeness((scale @ counts).tocsr(), self.decay)


@dataclasses.dataclass(frozen=True)
class TextLikeness:
    """The items' word weights, each row of length 1."""

    words: sparse.csr_array
    decay: float

    def scores(self, queries: Histories) -> Float32[np.ndarray, "q v"]:
        """Decayed sums of cosines."""
        weights = np.float32(self.decay) ** ages(queries)
        shape = (len(queries), self.words.shape[0])
        asked = sparse.csr_array((weights, queries.item_ids, queries.offsets), shape=shape)
        return pad_column(((asked @ self.words) @ self.words.T).toarray().astype(np.float32))
