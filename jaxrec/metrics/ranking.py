"""Ranking metrics, from the rank of each user's target in the full catalogue.

A rank is 0-based: how many items stand before the target. Every function here takes ranks and returns one
value a user, so that intervals, paired tests and slices can be computed from what it returns; the mean over
users is the metric. Each user has one target, so recall and hit rate are the same number; both names are
kept because papers use both.

U = users, V = num_items + 1 score columns (column 0 is the padding item), P = seen pairs.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64, Int, Int64

__all__ = [
    "hit_at_k",
    "mean_metrics",
    "ndcg_at_k",
    "per_user_metrics",
    "rank_targets",
    "recall_at_k",
    "reciprocal_rank",
]


def hit_at_k(ranks: Int[np.ndarray, " u"], k: int) -> Float64[np.ndarray, " u"]:
    """1 where the target is among the first k, else 0."""
    return (_checked(ranks, k) < k).astype(np.float64)


def recall_at_k(ranks: Int[np.ndarray, " u"], k: int) -> Float64[np.ndarray, " u"]:
    """The share of a user's targets among the first k: with one target a user, `hit_at_k`."""
    return hit_at_k(ranks, k)


def ndcg_at_k(ranks: Int[np.ndarray, " u"], k: int) -> Float64[np.ndarray, " u"]:
    """1 / log2(rank + 2) where the target is among the first k, else 0.

    The ideal list has the one target first, so its gain, the denominator, is 1.
    Source: Jarvelin & Kekalainen, TOIS 2002 (discounted cumulated gain).
    """
    ranks = _checked(ranks, k)
    return np.where(ranks < k, 1.0 / np.log2(ranks + 2.0), 0.0)


def reciprocal_rank(ranks: Int[np.ndarray, " u"], k: int | None = None) -> Float64[np.ndarray, " u"]:
    """1 / (rank + 1), or 0 beyond the first k; without k, over the whole catalogue."""
    ranks = _checked(ranks, k)
    values = 1.0 / (ranks + 1.0)
    return values if k is None else np.where(ranks < k, values, 0.0)


def per_user_metrics(ranks: Int[np.ndarray, " u"], ks: Sequence[int]) -> dict[str, Float64[np.ndarray, " u"]]:
    """`hr@k`, `recall@k`, `ndcg@k` and `mrr@k` for each k, and `mrr`: one value a user."""
    metrics: dict[str, Float64[np.ndarray, " u"]] = {}
    for name, values in (("hr", hit_at_k), ("recall", recall_at_k), ("ndcg", ndcg_at_k)):
        metrics |= {f"{name}@{k}": values(ranks, k) for k in ks}
    metrics |= {f"mrr@{k}": reciprocal_rank(ranks, k) for k in ks}
    return metrics | {"mrr": reciprocal_rank(ranks)}


def mean_metrics(ranks: Int[np.ndarray, " u"], ks: Sequence[int]) -> dict[str, float]:
    """The means over the users of `per_user_metrics`.

    Raises:
        ValueError: there is no user to take a mean over.
    """
    if not len(ranks):
        raise ValueError("there are 0 users with a target in this split; prepare the data with more events.")
    return {name: float(values.mean()) for name, values in per_user_metrics(ranks, ks).items()}


def rank_targets(
    scores: Float[np.ndarray, "u v"],
    targets: Int[np.ndarray, " u"],
    seen_users: Int[np.ndarray, " p"],
    seen_items: Int[np.ndarray, " p"],
    *,
    filter_seen: bool = True,
) -> Int64[np.ndarray, " u"]:
    """The 0-based rank of each user's target among the items 1 .. num_items.

    Before the target stand the items with a higher score, and those with the same score and a lower id.
    Seen items are left out, the target itself never. The answer for a user does not depend on the other
    users of the chunk. `scores` is not changed.

    Args:
      seen_users, seen_items: pairs (row of `scores`, item id); repeats are harmless, item 0 is padding.
      filter_seen: False ranks the target among all items, as sessions with repeats want.

    Raises:
        ValueError: a target is not an item, or a score is not a number.
    """
    users = np.arange(len(targets))
    if len(targets) and (targets.min() < 1 or targets.max() >= scores.shape[1]):
        raise ValueError(
            f"target {targets.min() if targets.min() < 1 else targets.max()} is not one of the items "
            f"1 .. {scores.shape[1] - 1}; leave users without a target out."
        )
    masked = np.array(scores, order="C")
    if np.isnan(masked[:, 1:]).any():
        raise ValueError("a score is NaN; the model or the baseline that gave it has diverged.")
    own = masked[users, targets][:, None]
    masked[:, 0] = np.nan  # NaN is neither above nor equal to anything, so a masked item never counts
    if filter_seen:
        masked[seen_users, seen_items] = np.nan
        masked[users, targets] = own[:, 0]
    ranks = np.count_nonzero(masked > own, axis=1)
    # The target always ties with itself; few users have further ties, and only those pay for the order.
    tied = np.flatnonzero(np.count_nonzero(masked == own, axis=1) > 1)
    lower = np.arange(scores.shape[1]) < targets[tied, None]
    ranks[tied] += np.count_nonzero((masked[tied] == own[tied]) & lower, axis=1)
    return ranks.astype(np.int64)


def _checked(ranks: Int[np.ndarray, " u"], k: int | None) -> Int[np.ndarray, " u"]:
    if k is not None and k < 1:
        raise ValueError(f"k={k} must be at least 1.")
    if len(ranks) and ranks.min() < 0:
        raise ValueError(f"rank {ranks.min()} is negative; ranks count from 0, leave out users without one.")
    return ranks
