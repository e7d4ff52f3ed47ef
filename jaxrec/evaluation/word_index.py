"""Items by the words of their texts: TF-IDF and BM25.

Q = queries, V = num_items + 1 (entry 0 is the padding item), W = words, L = events of a history, C = candidates.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
import scipy.sparse as sparse
from jaxtyping import Float32, Int

_WORD = re.compile(r"\w+")


@dataclasses.dataclass(frozen=True)
class WordIndex:
    """Weights of the words of each item's text.

    Attributes:
      columns: of the words.
      weights: `[V, W]`.
      query_weights: what a word is worth in a query, `[W]`.
    """

    columns: dict[str, int]
    weights: sparse.csr_array
    query_weights: Float32[np.ndarray, " w"]

    def scores(self, queries: Sequence[str]) -> Float32[np.ndarray, "q v"]:
        """A score of every item for every query; words that no item has count for nothing."""
        scores = self._products(self._weighted(queries))
        scores[:, 0] = -np.inf
        return scores

    def cosines(self, text: str) -> Float32[np.ndarray, " v"]:
        """Of every item with a text, as TfIdf has them; 0 for padding, and where no word is shared."""
        weighted = self._weighted([text])
        length = float(np.sqrt(weighted.multiply(weighted).sum()))
        return self._products(weighted)[0] / np.float32(max(length, 1e-12))

    def with_items(self, texts: Sequence[str]) -> "WordIndex":
        """Further items after those that are there, as TfIdf has them; a new word weighs as much as the rarest."""
        new = sorted({word for text in texts for word in words(text)} - self.columns.keys())
        columns = self.columns | {word: len(self.columns) + number for number, word in enumerate(new)}
        rarest = self.query_weights.max(initial=1.0)
        query_weights = np.append(self.query_weights, np.full(len(new), rarest, np.float32))
        counts = _counts(texts, columns)
        rows = _unit_rows(sparse.csr_array(counts.multiply(query_weights[None, :])))
        there = sparse.csr_array(
            (self.weights.data, self.weights.indices, self.weights.indptr),
            shape=(self.weights.shape[0], len(columns)),
        )
        return WordIndex(columns, sparse.csr_array(sparse.vstack([there, rows])), query_weights)

    def likeness(
        self, history: Int[np.ndarray, " l"], items: Int[np.ndarray, " c"]
    ) -> Float32[np.ndarray, " c"]:
        """Cosines of items' words with those of a history, all its items alike."""
        profile = np.asarray(self.weights[history].sum(axis=0), np.float32).ravel()
        length = float(np.sqrt(profile @ profile))
        return np.asarray(self.weights[items] @ profile, np.float32) / np.float32(max(length, 1e-12))

    def _weighted(self, queries: Sequence[str]) -> sparse.csr_array:
        return sparse.csr_array(_counts(queries, self.columns).multiply(self.query_weights[None, :]))

    def _products(self, weighted: sparse.csr_array) -> Float32[np.ndarray, "q v"]:
        return np.asarray((weighted @ self.weights.T).toarray(), np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfIdf:
    """Cosines of TF-IDF vectors, with smoothed inverse document frequencies.

    Source: Salton & Buckley, Information Processing & Management 1988.
    """

    def fit(self, texts: Sequence[str]) -> WordIndex:
        """`texts` are those of items 1, 2, ..."""
        columns = _columns(texts)
        counts = _counts(["", *texts], columns)
        there = np.bincount(counts.indices, minlength=len(columns))
        idf = (np.log((1.0 + len(texts)) / (1.0 + there)) + 1.0).astype(np.float32)
        weights = sparse.csr_array(counts.multiply(idf[None, :]))
        return WordIndex(columns, _unit_rows(weights), idf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BM25:
    """Okapi BM25.

    Attributes:
      saturation: k1, how soon a word that comes again counts no more.
      length: b, how far long texts are marked down: 0 = not, 1 = in proportion.

    Source: Robertson & Zaragoza, Foundations and Trends in Information Retrieval 2009.
    """

    saturation: float = 1.2
    length: float = 0.75

    def fit(self, texts: Sequence[str]) -> WordIndex:
        """`texts` are those of items 1, 2, ..."""
        columns = _columns(texts)
        counts = _counts(["", *texts], columns)
        there = np.bincount(counts.indices, minlength=len(columns))
        idf = np.log1p((len(texts) - there + 0.5) / (there + 0.5)).astype(np.float32)
        sizes = np.asarray(counts.sum(axis=1)).ravel()
        norms = 1.0 - self.length + self.length * sizes / max(float(sizes[1:].mean()), 1e-12)
        of_entry = np.repeat(norms, np.diff(counts.indptr))
        counts.data = counts.data * (1.0 + self.saturation) / (counts.data + self.saturation * of_entry)
        return WordIndex(columns, counts, idf)


def words(text: str) -> list[str]:
    """Of a text, in lower case."""
    return _WORD.findall(text.lower())


def _unit_rows(weights: sparse.csr_array) -> sparse.csr_array:
    """Rows of length 1; empty ones stay."""
    norms = np.sqrt(np.asarray(weights.multiply(weights).sum(axis=1)).ravel())
    return sparse.csr_array(weights.multiply(1.0 / np.maximum(norms, 1e-12)[:, None]))


def _columns(texts: Sequence[str]) -> dict[str, int]:
    return {
        word: column for column, word in enumerate(sorted({word for text in texts for word in words(text)}))
    }


def _counts(texts: Sequence[str], columns: dict[str, int]) -> sparse.csr_array:
    """How often each text has each word, as float32."""
    found = [[columns[word] for word in words(text) if word in columns] for text in texts]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in found])])
    indices = np.array([column for row in found for column in row], np.int32)
    matrix = sparse.csr_array(
        (np.ones(len(indices), np.float32), indices, offsets), shape=(len(texts), len(columns))
    )
    matrix.sum_duplicates()
    return matrix
