"""Slates of a run: each user's best items turned into sets, and what the sets are like beside plain lists.

U = users, N = candidates of a user, K = places of a slate.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxrec.evaluation.list_quality import categories_of, vectors_of
from jaxrec.evaluation.significance import bootstrap_intervals
from jaxrec.evaluation.slates import Pool, Slate, choose, relevance_of
from jaxrec.evaluation.user_ranking import Run, UserRanks
from jaxrec.metrics.beyond_accuracy import category_diversity, vector_diversity

_USERS_AT_A_TIME = 512


class SlateChooser:
    """Chooses the sets of `slate` from lists of a run."""

    def __init__(self, run: Run, slate: Slate):
        self._run, self._slate = run, slate
        categories = categories_of(run.dataset)
        if categories is None and (slate.max_per_category or slate.diversity.needs_categories):
            raise ValueError(
                f"dataset {run.dataset.metadata.name!r} has no categories, which a slate with "
                f"max_per_category={slate.max_per_category} and {type(slate.diversity).__name__} is chosen by; name "
                "their column with data.columns.categories, or use LogDeterminant without a limit."
            )
        num_items = run.dataset.metadata.num_items
        self._categories = np.zeros((num_items + 1, 0), bool) if categories is None else categories

    def __call__(self, ranks: UserRanks) -> UserRanks:
        """The same users with their sets for lists, in the order of choice; `ranks` stay those of the whole catalogue.

        Args:
          ranks: with lists of `slate.pool` items.
        """
        parts = [
            self._choose(ranks.take(np.arange(start, min(start + _USERS_AT_A_TIME, len(ranks)))))
            for start in range(0, len(ranks), _USERS_AT_A_TIME)
        ]
        items, scores = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return dataclasses.replace(ranks, top_item_ids=items, top_scores=scores)

    def _choose(self, ranks: UserRanks) -> tuple[np.ndarray, np.ndarray]:
        item_ids = ranks.top_item_ids
        shown = np.unique(item_ids[item_ids > 0])
        vectors = vectors_of(self._run, shown)
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        there = item_ids > 0
        pool = Pool(
            relevance=relevance_of(ranks.top_scores, ranks.top_scores[:, :1]),
            there=there,
            vectors=vectors[np.where(there, np.searchsorted(shown, item_ids) + 1, 0)],
            categories=self._categories[item_ids],
        )
        places = choose(self._slate, pool)
        users, found = np.arange(len(places))[:, None], places >= 0
        return np.where(found, item_ids[users, places], 0), np.where(
            found, ranks.top_scores[users, places], -np.inf
        )


def slate_metrics(
    run: Run, pools: UserRanks, slates: Mapping[str, Slate], *, num_samples: int, confidence: float, seed: int
) -> dict[str, dict[str, Any]]:
    """What each slate is like; "best" of the largest size is the plain list of the best items.

    Args:
      pools: of the users with a target, with lists as long as the largest pool.

    Returns:
      By slate: `hit_rate` (sets that hold the target) with its `interval`; `expected_relevance`, the model's chance
      that the next item is in the set, among those of the pool; `vector_diversity` and `category_diversity`, means
      over the pairs of a set; `num_categories` of a set; `num_items` of a set, fewer than the size under limits.
    """
    size = max(slate.size for slate in slates.values())
    lists = {"best": _shortened(pools, size)}
    lists |= {name: SlateChooser(run, slate)(_shortened(pools, slate.pool)) for name, slate in slates.items()}
    categories = categories_of(run.dataset)
    shown = np.unique(np.concatenate([part.top_item_ids.ravel() for part in lists.values()]))
    shown = shown[shown > 0]
    vectors = vectors_of(run, shown)
    best = pools.top_scores[:, :1]
    total = relevance_of(pools.top_scores, best).sum(axis=1)
    found: dict[str, dict[str, Any]] = {}
    for name, part in lists.items():
        item_ids = part.top_item_ids
        there = item_ids > 0
        hits = np.any(item_ids == part.targets[:, None], axis=1).astype(np.float64)
        interval = bootstrap_intervals(
            {"hits": hits}, num_samples=num_samples, confidence=confidence, seed=seed
        )["hits"]
        chances = relevance_of(part.top_scores, best).sum(axis=1)
        compact = np.where(there, np.searchsorted(shown, item_ids) + 1, 0)
        found[name] = {
            "hit_rate": interval.mean,
            "interval": [interval.low, interval.high],
            "expected_relevance": float(np.mean(chances / np.maximum(total, 1.0))),
            "vector_diversity": _mean(vector_diversity(compact, vectors)),
            "num_items": float(np.count_nonzero(there, axis=1).mean()),
        }
        if categories is not None:
            found[name] |= {
                "category_diversity": _mean(category_diversity(item_ids, categories)),
                "num_categories": float(np.any(categories[item_ids], axis=1).sum(axis=1).mean()),
            }
    return found


def _shortened(ranks: UserRanks, length: int) -> UserRanks:
    return dataclasses.replace(
        ranks, top_item_ids=ranks.top_item_ids[:, :length], top_scores=ranks.top_scores[:, :length]
    )


def _mean(values: np.ndarray) -> float | None:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else None
