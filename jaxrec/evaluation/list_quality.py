"""What the recommended lists look like, beyond whether they hold the target: for the model and every baseline.

U = users, T = length of the lists, I = items that somebody is shown, D = dim of the scored space.
"""

from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Bool, Float32, Float64, Int

from jaxrec.data.dataset import PreparedDataset
from jaxrec.embedding.engine import lookup_shared
from jaxrec.evaluation.user_ranking import Run
from jaxrec.metrics.beyond_accuracy import category_matrix, list_metrics, vector_diversity

_MATRIX_BYTES = 1 << 28  # of the item x category matrix
_USERS_AT_A_TIME = 4096


def list_quality(
    run: Run, lists: Mapping[str, Int[np.ndarray, "u t"]], user_indices: Int[np.ndarray, " u"], split: str
) -> dict[str, dict[str, float | None]]:
    """The metrics of `metrics.beyond_accuracy` for each system's lists; the diversity of vectors is the model's own.

    Args:
      lists: by system: the items of each of `user_indices`, best first, 0 = none.
    """
    dataset = run.dataset
    categories = categories_of(dataset)
    history_means = mean_popularity(dataset, user_indices, split)
    shown = np.unique(np.concatenate([part.ravel() for part in lists.values()]))
    shown = shown[shown > 0]
    vectors = vectors_of(run, shown)
    found = {}
    for system, recommended in lists.items():
        metrics = list_metrics(
            recommended, dataset.item_counts, item_categories=categories, history_means=history_means
        )
        # Only the rows of items that somebody is shown leave the devices; row 0 stands for "no item".
        compact = np.where(recommended > 0, np.searchsorted(shown, recommended) + 1, 0)
        diversity = vector_diversity(compact, vectors)
        defined = diversity[~np.isnan(diversity)]
        metrics[f"vector_diversity@{recommended.shape[1]}"] = float(defined.mean()) if len(defined) else None
        found[system] = metrics
    return found


def mean_popularity(
    dataset: PreparedDataset, user_indices: Int[np.ndarray, " u"], split: str
) -> Float64[np.ndarray, " u"]:
    """Mean training events of the items in each user's history before the target; NaN without a history."""
    ends = (dataset.validation_end if split == "test" else dataset.train_end)[user_indices]
    means = np.full(len(user_indices), np.nan)
    for first in range(0, len(user_indices), _USERS_AT_A_TIME):
        part = slice(first, first + _USERS_AT_A_TIME)
        histories = dataset.histories(user_indices[part])
        sums = np.concatenate([[0.0], np.cumsum(dataset.item_counts[histories.item_ids], dtype=np.float64)])
        starts = histories.offsets[:-1]
        total = sums[starts + ends[part]] - sums[starts]
        np.divide(total, ends[part], out=means[part], where=ends[part] > 0)
    return means


def categories_of(dataset: PreparedDataset) -> Bool[np.ndarray, "v c"] | None:
    """Which item is in which category; None without categories, or with too many of them."""
    names = {name for row in dataset.item_categories for name in row}
    if not names or len(names) * (dataset.metadata.num_items + 1) > _MATRIX_BYTES:
        return None
    return category_matrix(dataset.item_categories)


def vectors_of(run: Run, item_ids: Int[np.ndarray, " i"]) -> Float32[np.ndarray, "i_plus_1 d"]:
    """The model's vectors of these items, after a row of zeros."""
    vectors, _ = run.catalogue()
    with jax.set_mesh(run.mesh):
        rows = jax.jit(lookup_shared)(vectors, item_ids.astype(np.int32))
    if run.score is not None:  # the gates say nothing of the item by itself
        rows = run.score.vectors(rows).reshape(len(rows), -1)
    return np.pad(np.asarray(rows, np.float32), ((1, 0), (0, 0)))
