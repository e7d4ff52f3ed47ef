"""Groups of a run: their members' lists turned into one, written down, and measured on what members took later.

U = users, G = groups, M = members of a group, N = items of a pool, K = places of the list.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Int32, Int64

from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.evaluation_batches import history_ends
from jaxrec.evaluation.baselines.base import BaselineRefusedError
from jaxrec.evaluation.baselines.evaluate import top_items
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.evaluation.groups import Group
from jaxrec.evaluation.kinds import MODEL, HeldOut, baseline_scores, kind_baselines, people_of
from jaxrec.evaluation.significance import differences, with_intervals
from jaxrec.evaluation.user_ranking import Run, UserRanker

METRICS = ("any_hit", "mean_hit", "all_hit", "mean_recall", "min_recall")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pools:
    """The best items of some users, and how relevant they are.

    Attributes:
      users: rising.
      item_ids: best first; 0 = none.
      relevance: chances that sum to 1 over a pool; 0 = no item.
    """

    users: Int64[np.ndarray, " u"]
    item_ids: Int32[np.ndarray, "u n"]
    relevance: Float[np.ndarray, "u n"]

    @classmethod
    def of_scores(cls, users: np.ndarray, item_ids: np.ndarray, scores: Float[np.ndarray, "u n"]) -> "Pools":
        """By the softmax of a model's scores, which are logits."""
        there = item_ids > 0
        best = np.max(np.where(there, scores, -np.inf), axis=1, keepdims=True, initial=-np.inf)
        weights = np.where(there, np.exp(scores - np.where(np.isfinite(best), best, 0.0)), 0.0)
        return cls.of_weights(users, item_ids, weights)

    @classmethod
    def of_weights(
        cls, users: np.ndarray, item_ids: np.ndarray, weights: Float[np.ndarray, "u n"]
    ) -> "Pools":
        """By weights of at least 0, such as counts."""
        total = weights.sum(axis=1, keepdims=True)
        return cls(users=users, item_ids=item_ids, relevance=weights / np.where(total > 0, total, 1.0))

    def first(self, length: int) -> "Pools":
        """The same, cut to `length` items."""
        return dataclasses.replace(
            self, item_ids=self.item_ids[:, :length], relevance=self.relevance[:, :length]
        )

    def of_group(
        self, members: Int[np.ndarray, " m"], left_out: Int[np.ndarray, " e"]
    ) -> tuple[Int[np.ndarray, " c"], Float[np.ndarray, "m c"]]:
        """What is in a member's pool and not in `left_out`, by rising id, and its relevance for each member."""
        rows = np.searchsorted(self.users, members)
        candidates = np.setdiff1d(np.unique(self.item_ids[rows]), np.append(left_out, 0))
        relevance = np.empty((len(rows), len(candidates)))
        for member, row in enumerate(rows):
            filled = np.flatnonzero(self.item_ids[row])
            own = self.relevance[row, filled]
            floor = own[-1] if len(own) else 1.0
            relevance[member] = max(floor, np.finfo(np.float32).tiny)
            _, here, there = np.intersect1d(
                candidates, self.item_ids[row, filled], assume_unique=True, return_indices=True
            )
            relevance[member, here] = np.maximum(own[there], np.finfo(np.float32).tiny)
        return candidates, relevance


def group_list(
    group: Group, pools: Pools, members: Int[np.ndarray, " m"], left_out: Int[np.ndarray, " e"], size: int
) -> tuple[Int[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """The items of a group's list in the order of choice, and what the group thinks of each alone."""
    candidates, relevance = pools.of_group(members, left_out)
    places = group.aggregation.choose(relevance, size)
    return candidates[places], group.aggregation.worth(relevance)[places]


def model_pools(run: Run, users: np.ndarray, split: str, *, length: int, kind: int, rows: int) -> Pools:
    """Those of the model; a user without a history has none.

    Raises:
      ValueError: nobody has a history.
    """
    ranker = UserRanker(run, top_k=length, kind=kind)
    asked = ranker.rows(split, rows_per_batch=rows, user_indices=np.unique(users))
    parts = list(ranker.batches(asked, keep_targets=False))
    if not parts:
        raise ValueError("no member of the groups has an event to start from; use --split=all.")
    found = [np.concatenate(columns) for columns in zip(*(_columns(part) for part in parts), strict=True)]
    order = np.argsort(found[0], kind="stable")
    return Pools.of_scores(*(column[order] for column in found))


def _columns(part: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return part.user_indices, part.top_item_ids, part.top_scores.astype(np.float64)


def baseline_pools(
    dataset: PreparedDataset, asked: HeldOut, *, length: int, kind: int, names: tuple[str, ...]
) -> dict[str, Pools]:
    """Those of simple models, whose scores are taken as they are: they are counts, or sums of similarities."""
    found = {}
    for name, baseline in kind_baselines(dataset, kind, names).items():
        parts = []
        try:
            for scores in baseline_scores(dataset, kind, baseline, asked.user_indices, asked.ends):
                item_ids = top_items(scores.copy(), length)
                of_items = np.take_along_axis(scores, item_ids, axis=1).astype(np.float64)
                parts.append((item_ids, np.where(item_ids > 0, np.maximum(of_items, 0.0), 0.0)))
        except BaselineRefusedError:
            continue
        item_ids, weights = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        found[name] = Pools.of_weights(asked.user_indices, item_ids, weights)
    return found


def groups_of_friends(
    dataset: PreparedDataset, users: Int[np.ndarray, " u"], *, size: int, seed: int
) -> Int64[np.ndarray, "g m"]:
    """Groups of a user and friends by training edges, no user in two of them; at random where nobody is an item.

    Args:
      users: who may be in a group.
    """
    random = np.random.default_rng(seed)
    order = random.permutation(users)
    people = people_of(dataset)
    if people is None:
        return order[: len(order) // size * size].reshape(-1, size).astype(np.int64)
    user_of = np.full(dataset.metadata.num_items + 1, -1, np.int64)
    user_of[people] = np.arange(len(people))
    user_of[0] = -1
    train = dataset.prefixes(np.arange(len(people)), dataset.train_end)
    free = np.zeros(len(people), bool)
    free[users] = True
    groups = []
    for user in order.tolist():
        known = user_of[train.item_ids[train.offsets[user] : train.offsets[user + 1]]]
        known = known[(known >= 0) & (known != user)]
        known = known[free[known]]
        if free[user] and len(known) >= size - 1:
            members = np.append(user, random.choice(known, size - 1, replace=False))
            free[members] = False
            groups.append(members)
    return np.array(groups, np.int64).reshape(-1, size)


def group_metrics(run: Run, split: str, config: EvaluationConfig, rows_per_batch: int) -> dict[str, Any]:
    """What lists of `config.list_length` hold of what the members of a group took in `split`.

    Groups are disjoint, so that they are independent draws. What a member has already is not listed, and no target.
    Items are of the first kind, where there are several.

    Returns:
      `num_groups`, `group_size`, `formed_by`; `systems`: the model by each entry of `config.groups`, and simple models
      whose members' lists are averaged; each with `metrics` and `intervals` of `any_hit` (a target of any member is
      listed), `mean_hit` (the share of members of whom one is), `all_hit` (one of each member is), and of the recall of
      the members the mean and the least. `paired`: each less the first
      entry of `config.groups`. {} without entries, or where no group can be formed.
    """
    if not config.groups:
        return {}
    dataset = run.dataset
    kind = 1 if dataset.metadata.kinds else 0
    asked = HeldOut.of_kind(dataset, split, kind)
    groups = groups_of_friends(dataset, asked.user_indices, size=config.group_size, seed=config.seed)
    if not len(groups):
        return {}
    length = max(group.pool for group in config.groups.values())
    pools = model_pools(run, groups.ravel(), split, length=length, kind=kind, rows=rows_per_batch)
    systems = {f"{MODEL}, {name}": (group, pools) for name, group in config.groups.items()}
    of_baselines = baseline_pools(dataset, asked, length=length, kind=kind, names=config.baselines)
    systems |= {f"{name}, average": (Group(pool=length), found) for name, found in of_baselines.items()}
    left_out = [histories_before(dataset, members, split) for members in groups]
    wanted = [_new_targets(asked, members, had) for members, had in zip(groups, left_out, strict=True)]
    fits = np.array([all(len(targets) for targets in of_group) for of_group in wanted])
    values: dict[str, dict[str, np.ndarray]] = {}
    for name, (group, found) in systems.items():
        rows = [
            _measured(
                group_list(group, found.first(group.pool), members, had, config.list_length)[0], targets
            )
            for members, had, targets, fit in zip(groups, left_out, wanted, fits, strict=True)
            if fit
        ]
        values[name] = dict(zip(METRICS, np.array(rows, np.float64).reshape(-1, len(METRICS)).T, strict=True))
    if not fits.any():
        return {}
    first = next(iter(values))
    return {
        "num_groups": int(fits.sum()),
        "group_size": config.group_size,
        "formed_by": "chance" if people_of(dataset) is None else "friends",
        "list_length": config.list_length,
        "systems": {name: with_intervals(of_system, **config.draws) for name, of_system in values.items()},
        "paired": {
            name: differences(values[first], of_system, **config.draws)
            for name, of_system in values.items()
            if name != first
        },
    }


def histories_before(
    dataset: PreparedDataset, members: Int[np.ndarray, " m"], split: str
) -> Int32[np.ndarray, " e"]:
    """What the members had before the part; everything for "all"."""
    ends, _ = history_ends(dataset, split)
    return dataset.prefixes(members, ends[members]).item_ids


def _new_targets(asked: HeldOut, members: np.ndarray, had: np.ndarray) -> list[np.ndarray]:
    """The targets of each member that no member had before."""
    rows = np.searchsorted(asked.user_indices, members)
    return [np.setdiff1d(asked.targets[asked.offsets[row] : asked.offsets[row + 1]], had) for row in rows]


def _measured(shown: np.ndarray, targets: Sequence[np.ndarray]) -> tuple[float, ...]:
    """`METRICS` of one group's list."""
    recalls = [float(np.isin(of_member, shown).mean()) for of_member in targets]
    hits = [recall > 0 for recall in recalls]
    return float(any(hits)), float(np.mean(hits)), float(all(hits)), float(np.mean(recalls)), min(recalls)
