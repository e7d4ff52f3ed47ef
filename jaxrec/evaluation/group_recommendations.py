"""One list for several users, in the users' own ids, written to a file.

M = members of a group.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from jaxrec.data.dataset import PreparedDataset
from jaxrec.evaluation.group_lists import group_list, histories_before, model_pools
from jaxrec.evaluation.groups import Group
from jaxrec.evaluation.recommendations import find_users, keys_at, write_tables
from jaxrec.evaluation.user_ranking import Run

__all__ = ["find_aggregation", "find_groups", "write_group_recommendations"]


def write_group_recommendations(
    run: Run,
    out: Path,
    groups: Mapping[str, Int64[np.ndarray, " m"]],
    *,
    group: Group,
    split: str,
    k: int,
    rows_per_batch: int,
    kind: int = 0,
) -> int:
    """Writes `group, item_id, rank, score` of each group's `k` items, in the order of choice; returns the rows.

    The score is what the aggregation thinks of the item alone. What a member had is left out where the dataset says
    `filter_seen`.

    Args:
      groups: the members' user indices, by the group's name.
      split: the members' histories end before this part, or nowhere: "all".

    Raises:
      ValueError: a member has no event to start from.
    """
    dataset = run.dataset
    members = np.unique(np.concatenate(list(groups.values())))
    pools = model_pools(run, members, split, length=group.pool, kind=kind, rows=rows_per_batch)
    missing = np.setdiff1d(members, pools.users)
    if len(missing):
        remedy = "leave the user out" if split == "all" else "leave the user out, or use --split=all"
        raise ValueError(
            f"user {str(dataset.user_keys[missing[0]])!r} has no event to start from in split {split!r}; {remedy}."
        )

    def tables() -> Iterator[pa.Table]:
        for name, own in groups.items():
            had = (
                histories_before(dataset, own, split)
                if dataset.metadata.filter_seen
                else np.zeros(0, np.int32)
            )
            items, scores = group_list(group, pools, own, had, k)
            yield pa.table(
                {
                    "group": pa.array([name] * len(items), pa.string()),
                    "item_id": keys_at(dataset.item_keys, items - 1),
                    "rank": pa.array(np.arange(1, len(items) + 1), pa.int32()),
                    "score": pa.array(scores, pa.float32()),
                }
            )

    return write_tables(tables(), out)


def find_groups(dataset: PreparedDataset, groups: Sequence[str]) -> dict[str, Int64[np.ndarray, " m"]]:
    """The members of groups that are written `u1,u2,u3`, by what was written.

    Raises:
      ValueError: a group has fewer than two members, or an id that is none of the dataset's.
    """
    key_type = pa.array(dataset.user_keys[:1]).type
    found = {}
    for text in groups:
        names = pa.array([name for name in map(str.strip, text.split(",")) if name], pa.string()).unique()
        if len(names) < 2:
            raise ValueError(f"--group={text}: a group has two members at least, written u1,u2,u3.")
        try:
            user_ids = names.cast(key_type)
        except pa.ArrowInvalid as error:
            raise ValueError(f"--group={text}: user ids are of type {key_type}, and {error}") from error
        try:
            found[text], _ = find_users(dataset, user_ids)
        except ValueError as error:
            raise ValueError(f"--group={text}: {error}") from error
    return found


def find_aggregation(groups: Mapping[str, Group], name: str | None) -> Group:
    """The entry of that name; without a name the first one, or the average.

    Raises:
      ValueError: the run's config has no such entry.
    """
    if name is None:
        return next(iter(groups.values()), Group())
    if name not in groups:
        raise ValueError(
            f"--aggregation={name}: the run's evaluation.groups are {', '.join(groups) or 'none'}; name one of them, "
            "or train with one: --config.evaluation.groups.NAME=Group."
        )
    return groups[name]
