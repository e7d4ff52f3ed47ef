"""Slices: for whom, and for which items, do the metrics hold?

A mean over users hides that a model serves heavy users with popular items. Here users are cut by how long their
history is, and by how popular their target is; targets that training never saw ("cold") stand apart, since a
model over ids cannot rank them.

U = users, V = num_items + 1.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int, Real

__all__ = ["Slice", "activity_slices", "popularity_slices", "slice_means"]


@dataclasses.dataclass(frozen=True)
class Slice:
    """A part of the users.

    Attributes:
      family: what the users are cut by: "user activity" or "item popularity".
      name: which part.
      users: True = belongs to it.
    """

    family: str
    name: str
    users: Bool[np.ndarray, " u"]


def activity_slices(history_lengths: Int[np.ndarray, " u"], num_slices: int = 4) -> list[Slice]:
    """Users by the events before their target: quantiles, which merge where lengths tie.

    Raises:
        ValueError: fewer than one slice.
    """
    if num_slices < 1:
        raise ValueError(f"num_slices={num_slices} must be at least 1.")
    if not len(history_lengths):
        return []
    cuts = np.quantile(history_lengths, np.arange(1, num_slices) / num_slices, method="inverted_cdf")
    lower = np.unique(np.concatenate([[history_lengths.min()], cuts + 1]))
    part = np.searchsorted(lower, history_lengths, side="right") - 1
    return [
        Slice("user activity", _events(history_lengths[part == p]), part == p)
        for p in range(len(lower))
        if (part == p).any()
    ]


def popularity_slices(targets: Int[np.ndarray, " u"], item_counts: Int[np.ndarray, " v"]) -> list[Slice]:
    """Users by the training events of their target: head, middle, tail and cold.

    The head is the fewest items that hold a third of all training events, the middle the next ones, up to
    two thirds; the tail is the rest; cold items have no event. Items of equal count stay together.

    Args:
      item_counts: training events by item id; entry 0 is the padding.
    """
    counts = np.sort(np.asarray(item_counts[1:], np.int64))[::-1]
    running, total = np.cumsum(counts), counts.sum()
    bounds = [
        int(counts[min(np.searchsorted(running * 3, share * total), len(counts) - 1)]) if total else 1
        for share in (1, 2)
    ]
    head, middle = max(bounds[0], 1), max(bounds[1], 1)
    count = item_counts[targets]
    masks = {
        f"head (>= {head} events)": count >= head,
        f"middle ({middle} .. {head - 1} events)": (count < head) & (count >= middle),
        f"tail (1 .. {middle - 1} events)": (count < middle) & (count > 0),
        "cold (never in training)": count == 0,
    }
    return [Slice("item popularity", name, mask) for name, mask in masks.items() if mask.any()]


def domain_slices(domains: Int[np.ndarray, " u"], names: Sequence[str]) -> list[Slice]:
    """Users by their domain; none where there is one domain.

    Args:
      domains: 1, 2, ... in the order of `names`.
    """
    if len(names) < 2:
        return []
    masks = {name: domains == number for number, name in enumerate(names, 1)}
    return [Slice("domain", name, mask) for name, mask in masks.items() if mask.any()]


def slice_means(
    values: Mapping[str, Real[np.ndarray, " u"]], slices: Sequence[Slice]
) -> list[dict[str, str | int | float]]:
    """One record a slice: its family, its name, its `num_users`, and the mean of each metric."""
    records: list[dict[str, str | int | float]] = []
    for part in slices:
        means = {name: float(column[part.users].mean()) for name, column in values.items()}
        size = int(np.count_nonzero(part.users))
        records.append({"family": part.family, "name": part.name, "num_users": size, **means})
    return records


def _events(lengths: Int[np.ndarray, " u"]) -> str:
    low, high = int(lengths.min()), int(lengths.max())
    return f"{low} events" if low == high else f"{low} .. {high} events"
