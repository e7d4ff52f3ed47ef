"""What the items table says of items, as sparse numbers: words of the text, categories, features.

V = num_items + 1, F = features, W = words.
"""

import functools
import itertools
import re
from collections.abc import Iterable, Sequence

import numpy as np
import scipy.sparse as sparse

from jaxrec.data.dataset import PreparedDataset

__all__ = ["item_features", "unit_rows", "word_features"]

KNOTS, VALUES_PER_KNOT = (
    20,
    3,
)  # that a column of numbers is cut at: at most, and at least so many values for each
MIN_ITEMS_OF_A_WORD = 2  # a word of one item says nothing of another


@functools.lru_cache(maxsize=1)  # of the run: asked for anew at each validation
def item_features(dataset: PreparedDataset) -> sparse.csr_array:
    """Words, categories and the columns that `columns.features` names, `[V, F]` float64; row 0 is empty.

    Each part has rows of length 1, so that the product of two rows is a likeness in which each part counts alike. A
    word counts by TF-IDF. A column of numbers is interpolated between quantiles: near numbers are alike.
    """
    parts = [word_features(dataset.item_texts), _words_alike(dataset.item_categories)]
    columns: dict[str, list[tuple[str, ...]]] = {}
    size = dataset.metadata.num_items
    for item, values in enumerate(dataset.item_features):
        for name, _, value in (text.partition("=") for text in values):
            of_items = columns.setdefault(name, [()] * size)
            of_items[item] = (*of_items[item], value)
    for of_items in columns.values():
        numbers = _numbers(of_items)
        parts.append(_words_alike(of_items) if numbers is None else unit_rows(_interpolated(numbers)))
    return sparse.csr_array(sparse.hstack([part for part in parts if part.shape[1]] or parts[:1]))


def word_features(texts: Sequence[str]) -> sparse.csr_array:
    """TF-IDF of the words of texts, `[texts + 1, W]`, rows of length 1; row 0 is empty.

    Source: Salton & Buckley, Information Processing & Management 1988.
    """
    counts = _counts(re.findall(r"\w+", text.lower()) for text in texts)
    items_of_word = np.bincount(counts.indices, minlength=counts.shape[1])
    rarity = np.log(counts.shape[0] / np.maximum(items_of_word, 1))
    rarity[items_of_word < MIN_ITEMS_OF_A_WORD] = 0.0
    counts.data = (1.0 + np.log(counts.data)) * rarity[counts.indices]
    return unit_rows(counts)


def unit_rows(matrix: sparse.csr_array) -> sparse.csr_array:
    """Rows over their lengths; a row of zeros stays."""
    lengths = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
    scale = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    return sparse.csr_array(sparse.diags_array(scale) @ matrix)


def _counts(words: Iterable[Sequence[str]]) -> sparse.csr_array:
    """How often each row has each word, in the order of their first occurrence; row 0 is empty."""
    numbers: dict[str, int] = {}
    rows = [[], *([numbers.setdefault(word, len(numbers)) for word in row] for row in words)]
    lengths = [len(row) for row in rows]
    columns = np.fromiter(itertools.chain.from_iterable(rows), np.int64, sum(lengths))
    counts = sparse.csr_array(
        (np.ones(len(columns)), columns, np.cumsum([0, *lengths])), shape=(len(rows), len(numbers))
    )
    counts.sum_duplicates()
    return counts


def _words_alike(words: Iterable[Sequence[str]]) -> sparse.csr_array:
    counts = _counts(words)
    counts.data[:] = 1.0
    return unit_rows(counts)


def _numbers(values: Sequence[Sequence[str]]) -> np.ndarray | None:
    """A number a row, NaN where it has none; None where a row has several, or words."""
    try:
        found = np.array([float(row[0]) if row else np.nan for row in values])
    except ValueError:
        return None
    found[~np.isfinite(found)] = np.nan
    return None if any(len(row) > 1 for row in values) or np.isnan(found).all() else found


def _interpolated(numbers: np.ndarray) -> sparse.csr_array:
    """The weights of the two quantiles that a number lies between; row 0 is empty, as those of unknown numbers."""
    known = np.flatnonzero(~np.isnan(numbers))
    count = np.clip(len(np.unique(numbers[known])) // VALUES_PER_KNOT, 2, KNOTS)
    knots = np.unique(np.quantile(numbers[known], np.linspace(0.0, 1.0, count)))
    above = np.clip(np.searchsorted(knots, numbers[known]), 1, max(len(knots) - 1, 1))
    if len(knots) == 1:
        weights, columns = np.ones((len(known), 1)), np.zeros((len(known), 1), np.int64)
    else:
        share = (numbers[known] - knots[above - 1]) / (knots[above] - knots[above - 1])
        weights, columns = np.stack([1.0 - share, share], 1), np.stack([above - 1, above], 1)
    rows = np.repeat(known + 1, weights.shape[1])
    return sparse.csr_array(
        sparse.coo_array((weights.ravel(), (rows, columns.ravel())), (len(numbers) + 1, len(knots)))
    )
