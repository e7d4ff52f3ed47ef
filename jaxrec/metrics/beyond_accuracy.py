"""Beyond accuracy: how much of the catalogue is shown, how new, how varied, how popular.

Everything is computed from the recommended lists, best first; 0 = no item (fewer than k were left). Averages are
over the places that hold an item.

U = users, K = places of a list, V = num_items + 1 (entry 0 is the padding item), C = categories, D = embed dim.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int

__all__ = [
    "average_popularity",
    "catalogue_coverage",
    "category_diversity",
    "category_matrix",
    "gini",
    "list_metrics",
    "novelty",
    "popularity_lift",
    "vector_diversity",
]

CHUNK = 1 << 24  # entries of the users' stacked item rows in memory at one time


def catalogue_coverage(recommended: Int[np.ndarray, "u k"], num_items: int) -> float:
    """The share of the catalogue that somebody is shown."""
    return float(np.count_nonzero(_exposures(recommended, num_items)) / num_items)


def gini(recommended: Int[np.ndarray, "u k"], num_items: int) -> float:
    """How unequally items are shown: 0 = all alike, towards 1 = one item takes every place.

    The Gini index of the items' exposures over the whole catalogue, items never shown included.
    Source: Fleder & Hosanagar, Management Science 2009 (concentration of recommendations).
    """
    exposures = np.sort(_exposures(recommended, num_items)).astype(np.float64)
    total = exposures.sum()
    if not total:
        return float("nan")
    rank = np.arange(1, num_items + 1)
    return float(((2.0 * rank - num_items - 1.0) * exposures).sum() / (num_items * total))


def average_popularity(
    recommended: Int[np.ndarray, "u k"], item_counts: Int[np.ndarray, " v"]
) -> Float64[np.ndarray, " u"]:
    """Mean training events of a user's recommended items; the mean over users is known as ARP.

    Source: Yin et al., VLDB 2012 (average recommendation popularity).
    """
    return _row_means(np.asarray(item_counts, np.float64)[recommended], recommended > 0)


def novelty(
    recommended: Int[np.ndarray, "u k"], item_counts: Int[np.ndarray, " v"]
) -> Float64[np.ndarray, " u"]:
    """Mean surprise of a user's recommended items: -log2 of an item's share of the training events.

    Counts are raised by one, so that items without an event have a finite surprise, the highest there is.
    Source: Zhou et al., PNAS 2010 (self-information), with add-one smoothing.
    """
    counts = np.asarray(item_counts, np.float64) + 1.0
    surprise = -np.log2(counts / counts[1:].sum())
    return _row_means(surprise[recommended], recommended > 0)


def category_matrix(categories: Sequence[Sequence[str]]) -> Bool[np.ndarray, "v c"]:
    """Which item is in which category, from the categories of items 1, 2, ...; row 0 is empty."""
    names = {name: column for column, name in enumerate(sorted({c for row in categories for c in row}))}
    matrix = np.zeros((len(categories) + 1, len(names)), np.bool_)
    for item_id, row in enumerate(categories, start=1):
        matrix[item_id, [names[name] for name in row]] = True
    return matrix


def category_diversity(
    recommended: Int[np.ndarray, "u k"], item_categories: Bool[np.ndarray, "v c"]
) -> Float64[np.ndarray, " u"]:
    """Mean over the pairs of a list of 1 - |shared categories| / |categories of either|.

    Pairs where an item has no category are left out; a user without any other pair gets NaN.
    Source: Ziegler et al., WWW 2005 (intra-list similarity), with the Jaccard distance.
    """
    table = item_categories.astype(np.float32)
    sizes = table.sum(axis=1)
    known = sizes > 0.0
    parts = []
    for lists in _chunks(recommended, table.shape[1]):
        shared = _pairwise(table[lists])
        either = sizes[lists][:, :, None] + sizes[lists][:, None, :] - shared
        parts.append(_mean_distance(1.0 - shared / np.maximum(either, 1.0), known[lists] & (lists > 0)))
    return np.concatenate(parts) if parts else np.zeros(0)


def vector_diversity(
    recommended: Int[np.ndarray, "u k"], item_vectors: Float[np.ndarray, "v d"]
) -> Float64[np.ndarray, " u"]:
    """Mean over the pairs of a list of 1 - cosine of the item vectors; NaN for lists without a pair."""
    norms = np.linalg.norm(item_vectors, axis=1, keepdims=True)
    unit = (item_vectors / np.maximum(norms, 1e-12)).astype(np.float32)
    parts = [
        _mean_distance(1.0 - _pairwise(unit[lists]), lists > 0)
        for lists in _chunks(recommended, unit.shape[1])
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def list_metrics(
    recommended: Int[np.ndarray, "u k"],
    item_counts: Int[np.ndarray, " v"],
    *,
    item_categories: Bool[np.ndarray, "v c"] | None = None,
    item_vectors: Float[np.ndarray, "v d"] | None = None,
    history_means: Float[np.ndarray, " u"] | None = None,
) -> dict[str, float | None]:
    """Every metric of this module at k = the length of the lists; None where no list allows a value.

    `coverage@k`, `gini@k`, `novelty@k`, `popularity@k`; and `category_diversity@k`, `vector_diversity@k` and
    `popularity_lift@k` where what they need is given.
    """
    k, num_items = recommended.shape[1], len(item_counts) - 1
    metrics = {
        f"coverage@{k}": catalogue_coverage(recommended, num_items),
        f"gini@{k}": gini(recommended, num_items),
        f"novelty@{k}": _defined_mean(novelty(recommended, item_counts)),
        f"popularity@{k}": _defined_mean(average_popularity(recommended, item_counts)),
    }
    if item_categories is not None:
        metrics[f"category_diversity@{k}"] = _defined_mean(category_diversity(recommended, item_categories))
    if item_vectors is not None:
        metrics[f"vector_diversity@{k}"] = _defined_mean(vector_diversity(recommended, item_vectors))
    if history_means is not None:
        metrics[f"popularity_lift@{k}"] = popularity_lift(recommended, history_means, item_counts)
    return {name: None if np.isnan(value) else value for name, value in metrics.items()}


def popularity_lift(
    recommended: Int[np.ndarray, "u k"],
    history_means: Float[np.ndarray, " u"],
    item_counts: Int[np.ndarray, " v"],
) -> float:
    """How much more popular the lists are than what their users took: 0 = alike, 1 = twice as popular.

    Args:
      history_means: mean training events of the items in each user's own history.

    Source: Abdollahpouri et al., RecSys 2019 (group average popularity, over one group of all users).
    """
    shown = average_popularity(recommended, item_counts)
    defined = np.isfinite(shown) & np.isfinite(history_means)
    own = history_means[defined].sum()
    return float(shown[defined].sum() / own - 1.0) if own > 0.0 else float("nan")


def _exposures(recommended: Int[np.ndarray, "u k"], num_items: int) -> Int[np.ndarray, " n"]:
    """How often each item 1 .. num_items is shown.

    Raises:
        ValueError: there is no item, or a recommended one is not among them.
    """
    if num_items < 1 or recommended.max(initial=0) > num_items:
        raise ValueError(
            f"item {recommended.max(initial=0)} is recommended, but the catalogue holds 1 .. {num_items}."
        )
    return np.bincount(recommended.ravel(), minlength=num_items + 1)[1:]


def _row_means(
    values: Float64[np.ndarray, "u k"], real: Bool[np.ndarray, "u k"]
) -> Float64[np.ndarray, " u"]:
    """Means over the places that hold an item; NaN for an empty list."""
    sizes = real.sum(axis=1)
    sums = np.where(real, values, 0.0).sum(axis=1)
    return np.divide(sums, sizes, out=np.full(len(sums), np.nan), where=sizes > 0)


def _pairwise(rows: Float32[np.ndarray, "u k c"]) -> Float32[np.ndarray, "u k k"]:
    return rows @ rows.transpose(0, 2, 1)


def _mean_distance(
    distances: Float[np.ndarray, "u k k"], real: Bool[np.ndarray, "u k"]
) -> Float64[np.ndarray, " u"]:
    """Means over the unordered pairs of real items."""
    pairs = real[:, :, None] & real[:, None, :] & ~np.eye(real.shape[1], dtype=np.bool_)
    flat = (len(real), -1)
    return _row_means(distances.astype(np.float64).reshape(flat), pairs.reshape(flat))


def _chunks(recommended: Int[np.ndarray, "u k"], width: int) -> Iterator[Int[np.ndarray, "b k"]]:
    k = recommended.shape[1]
    size = max(1, CHUNK // max(1, k * max(width, k)))
    for first in range(0, len(recommended), size):
        yield recommended[first : first + size]


def _defined_mean(values: Float64[np.ndarray, " u"]) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")
