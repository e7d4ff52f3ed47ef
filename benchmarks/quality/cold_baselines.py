"""New items without a neural network: what texts and counts say of items that nobody has chosen yet.

Every system here gives a similarity of each new item to each known one; a user's score of a new item is the sum over
the history, decayed by age. Its settings are chosen on items that are known: a tenth of them is held out of the
training events as if it were new, and the validation targets among them are ranked. No test target is seen.

V = num_items + 1, N = known items, C = new items, F = features, Q = queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse as sparse

from jaxrec.data.dataset import Histories, PreparedDataset
from jaxrec.data.packing import random_stream
from jaxrec.data.transitions import ages, count_transitions
from jaxrec.evaluation.baselines.base import interactions, select
from jaxrec.evaluation.baselines.evaluate import split_queries
from jaxrec.evaluation.cold_items import first_cold_item
from jaxrec.metrics.ranking import hit_at_k, rank_targets

SHARE_HELD_OUT = 0.1  # as many as the experiment takes away
DECAYS = (1.0, 0.98, 0.9, 0.7, 0.5)  # weight of an event of the history, relative to the one after it
RIDGES = (0.3, 1.0, 3.0, 10.0)
# Events after an item in which another one co-occurs with it; 0 = anywhere in the history.
WINDOWS = (0, 5, 20)
WINDOW_DECAY = 0.9  # of a co-occurrence, for each event further away
NEIGHBOURS = (20, 100, 0)  # kept for each new item; 0 = all
POWERS = (0.0, 0.5, 1.0)  # how far a co-occurrence is divided by the new item's own count
SHRINKAGE = 10.0

Settings = dict[str, float]


@dataclass(frozen=True)
class NewItems:
    """A question: which of the new items did each user choose?

    Attributes:
      train: events of the known items alone.
      known, new: item ids.
      queries: histories before the targets, of known items alone.
      users, targets: of each query.
    """

    train: Histories
    known: np.ndarray
    new: np.ndarray
    queries: Histories
    users: np.ndarray
    targets: np.ndarray


def final_question(dataset: PreparedDataset) -> NewItems:
    """The new items of the dataset, and the test targets among them."""
    first = first_cold_item(dataset)
    known, new = np.arange(1, first), np.arange(first, dataset.metadata.num_items + 1)
    return _question(dataset, "test", known, new)


def held_out_question(dataset: PreparedDataset, seed: int) -> NewItems:
    """Known items as if they were new, and the validation targets among them."""
    known = np.arange(1, first_cold_item(dataset))
    new = random_stream(seed, 1).permutation(known)[: max(1, round(SHARE_HELD_OUT * len(known)))]
    return _question(dataset, "validation", np.setdiff1d(known, new), np.sort(new))


def _question(dataset: PreparedDataset, split: str, known: np.ndarray, new: np.ndarray) -> NewItems:
    is_known = np.zeros(dataset.metadata.num_items + 1, bool)
    is_known[known] = True
    train = dataset.prefixes(np.arange(len(dataset.train_end)), dataset.train_end)
    asked = split_queries(dataset, split)
    histories = dataset.prefixes(asked.user_indices, asked.ends)
    train, histories = (select(part, is_known[part.item_ids]) for part in (train, histories))
    chosen = np.flatnonzero(np.isin(asked.targets, new))
    queries = histories.take(chosen, np.zeros_like(chosen), np.diff(histories.offsets)[chosen])
    return NewItems(train, known, new, queries, asked.user_indices[chosen], asked.targets[chosen])


def ranks_of(question: NewItems, similarity: np.ndarray, decay: float) -> np.ndarray:
    """Rank of each target among the new items, from a similarity `[C, N]`; ties by lower id."""
    weights = (decay ** ages(question.queries)).astype(np.float32)
    place = np.zeros(question.known.max() + 1, np.int64)
    place[question.known] = np.arange(len(question.known))
    history = sparse.csr_array(
        (weights, place[question.queries.item_ids], question.queries.offsets),
        shape=(len(question.queries), len(question.known)),
    )
    scores = np.pad(np.asarray(history @ similarity.T, np.float32), ((0, 0), (1, 0)))
    targets = 1 + np.searchsorted(question.new, question.targets)
    nothing = np.zeros(0, np.int64)
    return rank_targets(scores, targets, nothing, nothing, filter_seen=False)


def content_knn(question: NewItems, words: sparse.csr_array) -> Iterator[tuple[Settings, np.ndarray]]:
    """The cosine of two texts, kept for the nearest known items of each new one."""
    cosines = np.asarray((words[question.new] @ words[question.known].T).toarray(), np.float32)
    for neighbours in NEIGHBOURS:
        kept = cosines
        if 0 < neighbours < cosines.shape[1]:
            bound = np.partition(cosines, -neighbours, axis=1)[:, -neighbours, None]
            kept = np.where(cosines >= bound, cosines, 0.0)
        yield {"neighbours": neighbours}, kept


def ridge(question: NewItems, features: sparse.csr_array) -> Iterator[tuple[Settings, np.ndarray]]:
    """Ridge regression of a known item's co-occurrences with all known items on its features, asked of the new items.

    The co-occurrences of i with j are `n_ij / ((n_i + s)^p (n_j + s)^(1 - p))`, where n_ij counts j anywhere in the
    history of i, or i soon after j. By the dual form: with kernel K of the known items,
    `F_new F_known^T (K + ridge)^-1 Y`.
    """
    num_items = int(max(question.known.max(), question.new.max()))
    by_user = interactions(question.train, num_items)[:, question.known]
    counts = np.asarray(by_user.sum(axis=0), np.float32) + SHRINKAGE
    known, new = features[question.known], features[question.new]
    kernel, asked = np.asarray((known @ known.T).toarray()), np.asarray((new @ known.T).toarray())
    mixings = {
        amount: scipy.linalg.solve(kernel + amount * np.eye(len(kernel)), asked.T, assume_a="pos").T
        for amount in RIDGES
    }
    for window in WINDOWS:
        if window:
            after = count_transitions(question.train, num_items, window=window, decay=WINDOW_DECAY)
            together = after[question.known][:, question.known].T.toarray()
        else:
            together = (by_user.T @ by_user).toarray()
        np.fill_diagonal(together, 0.0)
        for power in POWERS:
            wanted = together / np.outer(counts**power, counts ** (1.0 - power))
            for amount, mixing in mixings.items():
                yield (
                    {"ridge": amount, "power": power, "window": window},
                    (mixing @ wanted).astype(np.float32),
                )


Similarities = Callable[[NewItems, sparse.csr_array], Iterator[tuple[Settings, np.ndarray]]]


def chosen_ranks(
    system: Similarities, features: sparse.csr_array, held_out: NewItems, question: NewItems, k: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Ranks of the test targets with the settings of the highest recall@k on the held-out items, and those settings."""
    tried = [
        (float(hit_at_k(ranks_of(held_out, similarity, decay), k).mean()), settings | {"decay": decay})
        for settings, similarity in system(held_out, features)
        for decay in DECAYS
    ]
    recall, best = max(tried, key=lambda one: one[0])
    for settings, similarity in system(question, features):
        if settings.items() <= best.items():
            return ranks_of(question, similarity, best["decay"]), best | {"held_out_recall": recall}
    raise AssertionError("the system yields the same settings for both questions")


def random_ranks(question: NewItems, seed: int) -> np.ndarray:
    """Every place alike."""
    return np.random.default_rng(seed).integers(0, len(question.new), len(question.targets))
