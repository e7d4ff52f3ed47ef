"""New items by themselves: targets that training never saw, ranked among the items that it never saw.

In the whole catalogue a new item competes with items that are known to sell. Whether a model can tell one new item from
another shows among the new ones alone.
"""

from typing import Any

import numpy as np

from jaxrec.data.dataset import PreparedDataset
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.evaluation.user_ranking import Run, UserRanker, UserRanks
from jaxrec.metrics.ranking import mean_metrics

__all__ = ["cold_values", "first_cold_item", "rank_cold_items"]


def first_cold_item(dataset: PreparedDataset) -> int:
    """The first of the ids without a training event: items are numbered by falling count, so these are the last ones.

    Raises:
      ValueError: every item has a training event, or the items are numbered otherwise.
    """
    counts = dataset.item_counts
    first = 1 + int(np.flatnonzero(counts).max(initial=0))
    if first > dataset.metadata.num_items or not counts[1:first].all():
        raise ValueError(
            f"evaluation.cold_items=True, but dataset {dataset.metadata.name!r} has "
            f"{int((counts[1:] == 0).sum())} items without a training event behind {first - 1} others; take some "
            "out of training with --config.data.cold_items=ColdItems."
        )
    return first


def rank_cold_items(
    run: Run, split: str, ranks: UserRanks, config: EvaluationConfig, rows_per_batch: int
) -> UserRanks:
    """The new ones among the targets of `ranks`, ranked among the new items; in the same order.

    Raises:
      ValueError: no item or no target is new.
    """
    first = first_cold_item(run.dataset)
    users = np.unique(ranks.user_indices[ranks.targets >= first])
    if not len(users):
        raise ValueError(
            f"evaluation.cold_items=True, but no target of split {split!r} is one of the "
            f"{run.dataset.metadata.num_items + 1 - first} items without a training event."
        )
    ranker = UserRanker(run, first_item=first)
    every_event = config.ranking_events == "all"
    rows = ranker.rows(split, rows_per_batch=rows_per_batch, user_indices=users, every_event=every_event)
    found, _ = ranker.rank(rows)
    return found.take(found.targets >= first)


def cold_values(
    run: Run, ranks: UserRanks, among_cold: UserRanks, config: EvaluationConfig
) -> dict[str, Any]:
    """The part `cold_items` of `evaluation.json`: the same targets among the new items and in the whole catalogue."""
    first = first_cold_item(run.dataset)
    return {
        "num_items": run.dataset.metadata.num_items + 1 - first,
        "num_targets": len(among_cold),
        "among_cold_items": mean_metrics(among_cold.ranks, config.ks),
        "in_the_catalogue": mean_metrics(ranks.ranks[ranks.targets >= first], config.ks),
    }
