"""Ranking metrics where a user has several targets, from one list a user.

One value a user, as in `metrics.ranking`; with one target a user they are the same numbers.

U = users, T = length of a list, P = targets of all users.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int

__all__ = ["hits_of_lists", "set_metrics"]


def hits_of_lists(
    lists: Int[np.ndarray, "u t"], targets: Int[np.ndarray, " p"], offsets: Int[np.ndarray, " u_plus_1"]
) -> Bool[np.ndarray, "u t"]:
    """Which places of each user's list hold one of the user's targets.

    Args:
      lists: item ids, best first; 0 = none.
      targets: user `i` has `targets[offsets[i] : offsets[i + 1]]`.
    """
    users = np.repeat(np.arange(len(lists)), np.diff(offsets))
    base = 1 + max(int(lists.max(initial=0)), int(targets.max(initial=0)))
    wanted = users.astype(np.int64) * base + targets
    shown = np.arange(len(lists), dtype=np.int64)[:, None] * base + lists
    return np.isin(shown, wanted) & (lists > 0)


def set_metrics(
    hits: Bool[np.ndarray, "u t"], num_targets: Int[np.ndarray, " u"], ks: Sequence[int]
) -> dict[str, Float64[np.ndarray, " u"]]:
    """`hr@k` (any target among the first k), `recall@k` and `ndcg@k` for each k.

    Recall is the share of the targets that are among the first k, of at most k of them: it can be 1 for everybody. The
    ideal list of NDCG has all targets first.

    Source: Jarvelin & Kekalainen, TOIS 2002; the bound of recall: Liang et al., WWW 2018.

    Raises:
      ValueError: a user has no target, or lists are shorter than the largest k.
    """
    if len(num_targets) and num_targets.min() < 1:
        raise ValueError("a user without a target has no metric; leave it out.")
    if hits.shape[1] < max(ks):
        raise ValueError(f"lists of {hits.shape[1]} items say nothing of k={max(ks)}; make them longer.")
    gains = 1.0 / np.log2(np.arange(hits.shape[1]) + 2.0)
    ideal = np.concatenate([[0.0], np.cumsum(gains)])
    metrics: dict[str, Float64[np.ndarray, " u"]] = {}
    metrics |= {f"hr@{k}": np.asarray(hits[:, :k].any(axis=1), np.float64) for k in ks}
    metrics |= {f"recall@{k}": hits[:, :k].sum(axis=1) / np.minimum(num_targets, k) for k in ks}
    metrics |= {f"ndcg@{k}": hits[:, :k] @ gains[:k] / ideal[np.minimum(num_targets, k)] for k in ks}
    return metrics
