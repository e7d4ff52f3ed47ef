"""Data sets whose items are of several kinds: every held-out item of a user, in the user's list of that kind.

One list a user and kind, from the history before the split's part, among all items of the kind that the user does not
have: who is asked for friends is not listed. Beside simple models, on the same users, paired.

U = users, T = length of the lists, P = targets.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float32, Float64, Int, Int32, Int64

from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.domain_keys import SEPARATOR
from jaxrec.data.evaluation_batches import split_ends
from jaxrec.data.packing import Windows
from jaxrec.data.social import PEOPLE
from jaxrec.evaluation.baselines import DEFAULT_BASELINES, Baseline
from jaxrec.evaluation.baselines.base import BaselineRefusedError
from jaxrec.evaluation.baselines.evaluate import top_items
from jaxrec.evaluation.baselines.social import social_baselines
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.evaluation.significance import differences, with_intervals
from jaxrec.evaluation.user_ranking import Run, UserRanker
from jaxrec.metrics.held_out_sets import hits_of_lists, set_metrics

logger = logging.getLogger(__name__)

MODEL = "model"
_SCORES = 1 << 24  # in memory at a time

PerUser = Mapping[str, Float64[np.ndarray, " u"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What users are asked for.

    Attributes:
      ends: of each user's history before the part.
      targets: user `i` has `targets[offsets[i] : offsets[i + 1]]`, one at least.
    """

    user_indices: Int64[np.ndarray, " u"]
    ends: Int64[np.ndarray, " u"]
    targets: Int32[np.ndarray, " p"]
    offsets: Int64[np.ndarray, " u_plus_1"]

    @classmethod
    def of_kind(cls, dataset: PreparedDataset, split: str, kind: int) -> "HeldOut":
        """The users with a history before `split` and an item of `kind` in it; 0 = of any."""
        ends, stops = split_ends(dataset, split)
        users = np.flatnonzero((ends > 0) & (stops > ends))
        held_out = dataset.windows(Windows(users=users, starts=ends[users], lengths=(stops - ends)[users]))
        wanted = (dataset.item_kinds[held_out.item_ids] == kind) | (kind == 0)
        owners = np.repeat(np.arange(len(users)), np.diff(held_out.offsets))[wanted]
        counts = np.bincount(owners, minlength=len(users))
        users = users[counts > 0]
        return cls(
            user_indices=users,
            ends=ends[users],
            targets=held_out.item_ids[wanted],
            offsets=np.concatenate([[0], np.cumsum(counts[counts > 0])]),
        )

    def metrics(self, lists: Int[np.ndarray, "u t"], ks: tuple[int, ...]) -> PerUser:
        """Of the users' lists."""
        return set_metrics(hits_of_lists(lists, self.targets, self.offsets), np.diff(self.offsets), ks)


def kind_metrics(run: Run, split: str, config: EvaluationConfig, rows_per_batch: int) -> dict[str, Any]:
    """The metrics of the model and of simple models, by kind of item.

    Returns:
      By kind: `num_users`, `num_targets`, `num_candidates`; `systems`, each with `metrics` and `intervals`; `paired`,
      the model less each other system: `difference` and `interval` of each metric. {} where items are of one kind.
    """
    dataset = run.dataset
    found = {}
    for kind, name in enumerate(dataset.metadata.kinds, 1):
        asked = HeldOut.of_kind(dataset, split, kind)
        if len(asked.user_indices):
            lists = {MODEL: model_lists(run, split, kind, asked, max(config.ks), rows_per_batch)}
            lists |= baseline_lists(dataset, kind, asked, max(config.ks), config.baselines)
            per_user = {system: asked.metrics(of_system, config.ks) for system, of_system in lists.items()}
            found[name] = {
                "num_users": len(asked.user_indices),
                "num_targets": len(asked.targets),
                "num_candidates": int(np.count_nonzero(dataset.item_kinds == kind)),
                **summary(per_user, config),
            }
    return found


def model_lists(
    run: Run, split: str, kind: int, asked: HeldOut, length: int, rows_per_batch: int
) -> Int32[np.ndarray, "u t"]:
    """The model's best items of a kind for the users asked, in their order."""
    ranker = UserRanker(run, top_k=length, kind=kind)
    rows = ranker.rows(split, rows_per_batch=rows_per_batch, user_indices=asked.user_indices)
    lists = np.zeros((len(asked.user_indices), length), np.int32)
    for part in ranker.batches(rows, keep_targets=False):
        places = np.searchsorted(asked.user_indices, part.user_indices)
        lists[places, : part.top_item_ids.shape[1]] = part.top_item_ids
    return lists


def baseline_lists(
    dataset: PreparedDataset, kind: int, asked: HeldOut, length: int, names: tuple[str, ...]
) -> dict[str, Int32[np.ndarray, "u t"]]:
    """The same of simple models, which are fitted on the training part."""
    lists = {}
    for name, baseline in kind_baselines(dataset, kind, names).items():
        parts = baseline_scores(dataset, kind, baseline, asked.user_indices, asked.ends)
        try:
            lists[name] = np.concatenate([top_items(scores, length) for scores in parts])
        except BaselineRefusedError as reason:
            logger.warning("baseline %s did not run: %s", name, reason)
    return lists


def baseline_scores(
    dataset: PreparedDataset,
    kind: int,
    baseline: Baseline,
    users: Int[np.ndarray, " u"],
    ends: Int[np.ndarray, " u"],
) -> Iterator[Float32[np.ndarray, "c v"]]:
    """Scores of all items for some users after the others; -inf for what is of another kind, or had before `ends`.

    Args:
      kind: 0 = items of every kind.

    Raises:
      BaselineRefusedError: see `Baseline`.
    """
    train = dataset.prefixes(np.arange(len(dataset.lengths)), dataset.train_end)
    fitted = baseline.fit(train, dataset.metadata.num_items)
    others = (dataset.item_kinds != kind) & (kind > 0)
    size = max(1, _SCORES // len(others))
    for start in range(0, len(users), size):
        some = slice(start, start + size)
        histories = dataset.prefixes(users[some], ends[some])
        scores = fitted.scores(histories)
        scores[:, others] = -np.inf
        rows = np.repeat(np.arange(len(histories)), np.diff(histories.offsets))
        scores[rows, histories.item_ids] = -np.inf
        yield scores


def kind_baselines(dataset: PreparedDataset, kind: int, names: tuple[str, ...]) -> dict[str, Baseline]:
    """Those of the config, and those along the edges between users where users are items."""
    found = {name: DEFAULT_BASELINES[name] for name in names}
    people = people_of(dataset)
    if people is None or not kind:
        return found
    of_people = dataset.metadata.kinds[kind - 1] == PEOPLE
    return found | dict(social_baselines(people, of_people=of_people))


def people_of(dataset: PreparedDataset) -> Int32[np.ndarray, " u"] | None:
    """The item that each user is; 0 = none. None where no items are people."""
    if PEOPLE not in dataset.metadata.kinds:
        return None
    own = pc.binary_join_element_wise(
        pa.scalar(PEOPLE), pc.cast(pa.array(dataset.user_keys), pa.string()), SEPARATOR
    )
    found = pc.index_in(own, value_set=pa.array(dataset.item_keys))
    return np.asarray(found.fill_null(-1), np.int32) + np.int32(1)


def summary(per_user: Mapping[str, PerUser], config: EvaluationConfig) -> dict[str, Any]:
    """Means with intervals of every system, and the model less each of the others, paired."""
    return {
        "systems": {name: with_intervals(values, **config.draws) for name, values in per_user.items()},
        "paired": {
            name: differences(values, per_user[MODEL], **config.draws)
            for name, values in per_user.items()
            if name != MODEL
        },
    }
