"""Items by the words of their titles and categories: search for models that read no text, and a place for new items.

N = items, W = words.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np
import scipy.sparse as sparse
from jaxtyping import Float

__all__ = ["TextIndex"]

_WORD = re.compile(r"\w+")


class TextIndex:
    """TF-IDF over words, rows of length 1; row 0 is empty.

    Source: Salton and Buckley, Information Processing & Management 1988.
    """

    def __init__(self, texts: Sequence[Iterable[str]]):
        """`texts[i]` are the texts of item i + 1."""
        rows = [_words(" ".join(parts)) for parts in texts]
        self._numbers = {
            word: number for number, word in enumerate(sorted({word for row in rows for word in row}))
        }
        counts = self._counted(rows)
        with_word = np.bincount(counts.indices, minlength=len(self._numbers))
        self._weights = np.log((1 + len(rows)) / (1 + with_word)) + 1.0
        self._rows = sparse.vstack([sparse.csr_array((1, len(self._numbers))), self._scaled(counts)]).tocsr()

    def likeness(self, text: str) -> Float[np.ndarray, " n_plus_1"]:
        """Cosine of every item with a text, 0 for padding and for items that share no word with it."""
        asked = self._scaled(self._counted([_words(text)]))
        return np.asarray((self._rows @ asked.T).toarray())[:, 0]

    def _counted(self, rows: Sequence[list[str]]) -> sparse.csr_array:
        found = [[self._numbers[word] for word in row if word in self._numbers] for row in rows]
        ends = np.cumsum([0, *map(len, found)])
        flat = np.array([number for row in found for number in row], np.int64)
        counts = sparse.csr_array((np.ones(len(flat)), flat, ends), shape=(len(rows), len(self._numbers)))
        counts.sum_duplicates()
        return counts

    def _scaled(self, counts: sparse.csr_array) -> sparse.csr_array:
        weighted = sparse.csr_array(counts * self._weights[None, :])
        lengths = np.sqrt(np.asarray(weighted.multiply(weighted).sum(axis=1))).reshape(-1, 1)
        return sparse.csr_array(weighted.multiply(1.0 / np.maximum(lengths, 1e-12)))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
