"""Every baseline on the same targets: fits, then ranks the users' targets in chunks of bounded memory.

U = users, T = recommended items, V = num_items + 1.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64

from jaxrec.data.dataset import Histories, PreparedDataset
from jaxrec.data.evaluation_batches import split_ends
from jaxrec.data.packing import Windows
from jaxrec.evaluation.baselines.base import Baseline, BaselineRefusedError, Fitted
from jaxrec.evaluation.baselines.ease import EASE
from jaxrec.evaluation.baselines.ials import IALS
from jaxrec.evaluation.baselines.item_knn import ItemKNN
from jaxrec.evaluation.baselines.popularity import Popularity, RecentPopularity
from jaxrec.evaluation.baselines.transition import Transition
from jaxrec.metrics.ranking import rank_targets

__all__ = ["DEFAULT_BASELINES", "BaselineResults", "Queries", "evaluate_baselines", "split_queries"]

DEFAULT_BASELINES: Mapping[str, Baseline] = {
    "popularity": Popularity(),
    "recent_popularity": RecentPopularity(),
    "transition": Transition(),
    "item_knn": ItemKNN(),
    "ease": EASE(),
    "ials": IALS(),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselineResults:
    """What the baselines did.

    Attributes:
      user_indices: the users with a target and a history before it, rising; each as often as it has targets.
      targets: their targets.
      ranks: by baseline: the 0-based rank of each target; see `rank_targets`.
      recommended: by baseline: the T best items of those that the ranks count, best first; 0 fills up where fewer are
        left.
      refused: by baseline that did not run: why.
      seconds: by baseline: fit and ranking together.
    """

    user_indices: Int64[np.ndarray, " u"]
    targets: Int32[np.ndarray, " u"]
    ranks: dict[str, Int64[np.ndarray, " u"]]
    recommended: dict[str, Int32[np.ndarray, "u t"]]
    refused: dict[str, str]
    seconds: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Queries:
    """Users of a split, the ends of their histories, and their targets; a user comes as often as it has targets."""

    dataset: PreparedDataset
    user_indices: Int64[np.ndarray, " u"]
    ends: Int64[np.ndarray, " u"]  # the target is the event at this position, the history all before it
    targets: Int32[np.ndarray, " u"]

    def chunks(self, size: int) -> Iterator[tuple[slice, Histories]]:
        """Stretches of users and their histories."""
        for first in range(0, len(self.user_indices), size):
            part = slice(first, first + size)
            yield part, self.dataset.prefixes(self.user_indices[part], self.ends[part])


def evaluate_baselines(
    dataset: PreparedDataset,
    split: str,
    baselines: Mapping[str, Baseline] | None = None,
    *,
    user_indices: Int[np.ndarray, " u"] | None = None,
    every_event: bool = False,
    fit_with_validation: bool = False,
    filter_seen: bool | None = None,
    num_recommended: int = 0,
    max_scores: int = 1 << 25,
) -> BaselineResults:
    """Fits each baseline on every user's training part and ranks the targets of `split`.

    Args:
      split: "validation" or "test"; the target is a user's first event of that part.
      every_event: of that part is a target, from all events before it.
      baselines: by the name they are reported under; by default DEFAULT_BASELINES.
      user_indices: evaluate these users only; the fit always sees everybody.
      fit_with_validation: the fit sees the validation events, too (for "test" only).
      filter_seen: by default as the dataset says.
      num_recommended: also return that many items a user; 0 saves the time.
      max_scores: scores in memory at one time, which bounds it whatever the catalogue.

    Raises:
        ValueError: the split is unknown, or there is nothing to fit or to rank.
    """
    baselines = DEFAULT_BASELINES if baselines is None else baselines
    if fit_with_validation and split != "test":
        raise ValueError(f'fit_with_validation shows the targets of split={split!r} to the fit; say "test".')
    queries = split_queries(dataset, split, user_indices, every_event=every_event)
    fit_ends = dataset.validation_end if fit_with_validation else dataset.train_end
    train = dataset.prefixes(np.arange(len(fit_ends)), fit_ends)
    if not len(train.item_ids) or not len(queries.user_indices):
        raise ValueError(
            f"dataset {dataset.metadata.name!r} has {len(train.item_ids)} training events and "
            f"{len(queries.user_indices)} users with a target in split {split!r}; prepare it with more events."
        )
    filter_seen = dataset.metadata.filter_seen if filter_seen is None else filter_seen
    ranker = _Ranker(queries, filter_seen, num_recommended, max_scores)
    results = BaselineResults(
        user_indices=queries.user_indices,
        targets=queries.targets,
        ranks={},
        recommended={},
        refused={},
        seconds={},
    )
    for name, baseline in baselines.items():
        start = time.perf_counter()
        try:
            fitted = baseline.fit(train, dataset.metadata.num_items)
        except BaselineRefusedError as reason:
            results.refused[name] = str(reason)
            continue
        ranks, recommended = ranker.rank(fitted)
        results.ranks[name] = ranks
        if num_recommended:
            results.recommended[name] = recommended
        results.seconds[name] = time.perf_counter() - start
    return results


def split_queries(
    dataset: PreparedDataset,
    split: str,
    user_indices: Int[np.ndarray, " u"] | None = None,
    *,
    every_event: bool = False,
) -> Queries:
    """The users that have a target in `split` and a history before it; with `every_event` all their targets there.

    Raises:
        ValueError: the split is unknown.
    """
    ends, stops = split_ends(dataset, split)
    asked = np.arange(len(ends)) if user_indices is None else np.unique(user_indices)
    counts = stops[asked] - ends[asked]
    counts = counts if every_event else np.minimum(counts, 1)
    users = np.repeat(asked, counts).astype(np.int64)
    ends = ends[users] + np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts)
    users, ends = users[ends > 0], ends[ends > 0]
    targets = dataset.windows(Windows(users=users, starts=ends, lengths=np.ones_like(ends))).item_ids
    return Queries(dataset=dataset, user_indices=users, ends=ends, targets=targets)


@dataclasses.dataclass(frozen=True)
class _Ranker:
    """Ranks the targets of all queries by a fitted baseline, chunk by chunk, in the own domain or kind."""

    queries: Queries
    filter_seen: bool
    num_recommended: int
    max_scores: int

    def rank(self, fitted: Fitted) -> tuple[Int64[np.ndarray, " u"], Int32[np.ndarray, "u t"]]:
        queries = self.queries
        num_users, num_items = len(queries.user_indices), queries.dataset.metadata.num_items
        ranks = np.zeros(num_users, np.int64)
        recommended = np.zeros((num_users, self.num_recommended), np.int32)
        for part, histories in queries.chunks(max(1, self.max_scores // (num_items + 1))):
            scores = fitted.scores(histories)
            groups = queries.dataset.item_groups
            if groups is not None:
                asked = queries.dataset.asked_groups(queries.user_indices[part], queries.targets[part])
                scores[asked[:, None] != groups] = -np.inf
            seen_users = np.repeat(np.arange(len(histories)), np.diff(histories.offsets))
            ranks[part] = rank_targets(
                scores, queries.targets[part], seen_users, histories.item_ids, filter_seen=self.filter_seen
            )
            if self.num_recommended:
                if self.filter_seen:  # the target is never left out, as in the model's lists
                    masked = histories.item_ids != queries.targets[part][seen_users]
                    scores[seen_users[masked], histories.item_ids[masked]] = -np.inf
                recommended[part] = top_items(scores, self.num_recommended)
        return ranks, recommended


def top_items(scores: Float32[np.ndarray, "u v"], count: int) -> Int32[np.ndarray, "u t"]:
    """The best items of each row, best first; ties by lower id; 0 where only masked items are left.

    `scores` is changed.
    """
    count_here = min(count, scores.shape[1])
    bounds = np.partition(scores, scores.shape[1] - count_here, axis=1)[:, -count_here]
    items = np.zeros((len(scores), count), np.int32)
    for row, bound in enumerate(bounds):
        candidates = np.flatnonzero(scores[row] >= bound)
        best = candidates[np.argsort(-scores[row, candidates], kind="stable")][:count]
        best = best[np.isfinite(scores[row, best])]
        items[row, : len(best)] = best
    return items
