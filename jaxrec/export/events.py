"""Events of users as a model reads them: own ids or the catalogue's, times, and labels of what they were.

L = events of a history, K = behaviours.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Int, Int32

from jaxrec.export.catalogue import Key

__all__ = ["UNKNOWN_LABEL", "Event", "EventLabels", "UserEvents"]

UNKNOWN_LABEL = -1


@dataclasses.dataclass(frozen=True)
class Event:
    """An event of a history.

    Attributes:
      item_id: the item's own id.
      seconds: any clock's, for models that read times; None = unknown.
      labels: 1 yes, 0 no, -1 unknown, for models that read behaviours, in the order of the facts' `behaviours`.
    """

    item_id: Key
    seconds: int | None = None
    labels: Sequence[int] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class UserEvents:
    """A history in the catalogue's ids, oldest first; every item is known.

    Attributes:
      seconds: since any moment; -1 = unknown.
      labels: as those of `Event`; None = all are unknown.
    """

    item_ids: Int[np.ndarray, " l"]
    seconds: Int[np.ndarray, " l"]
    labels: Int[np.ndarray, "l k"] | None = None

    @classmethod
    def of_items(cls, item_ids: Int[np.ndarray, " l"]) -> Self:
        """Of which nothing else is known."""
        return cls(item_ids, np.full(len(item_ids), -1, np.int64))

    def __len__(self) -> int:
        return len(self.item_ids)

    def at(self, places: Int[np.ndarray, " p"] | Bool[np.ndarray, " l"]) -> "UserEvents":
        """Those at these places."""
        labels = None if self.labels is None else self.labels[places]
        return UserEvents(self.item_ids[places], self.seconds[places], labels)

    def then(self, later: "UserEvents") -> "UserEvents":
        """These, and behind them later ones."""
        parts, labels = (self, later), None
        widths = {part.labels.shape[1] for part in parts if part.labels is not None}
        if widths:
            unknown = [np.full((len(part), max(widths)), UNKNOWN_LABEL) for part in parts]
            labels = np.concatenate(
                [
                    part.labels if part.labels is not None else no
                    for part, no in zip(parts, unknown, strict=True)
                ]
            )
        return UserEvents(
            np.concatenate([self.item_ids, later.item_ids]),
            np.concatenate([self.seconds, later.seconds]),
            labels,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EventLabels:
    """How what an event was called, and the number beside it, become the labels that training gave such events.

    Attributes:
      behaviours: the data's, in the order of the labels.
      others: the label of the behaviours that a name does not name: 0 where the data had a column of names, and -1
        where they had flags, each of which says nothing of the others.
      at_least: the number from which on the first behaviour is meant; None = no number means one.
    """

    behaviours: tuple[str, ...]
    others: int = UNKNOWN_LABEL
    at_least: float | None = None

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> Self:
        """Of a bundle; those of before there were such facts say nothing but the names."""
        return cls(behaviours=tuple(facts["behaviours"]), **facts.get("event_labels", {}))

    def labels(self, events: Sequence[tuple[str, float | None]]) -> Int32[np.ndarray, "l k"]:
        """Of events by their names ("" = none) and numbers.

        As updates label them in training (`updating.grown_data`); but for a name of the behaviour that a number makes,
        where there is no number: it is taken at its word here, and there it is unknown, as no number can be made up.
        """
        found = np.full((len(events), len(self.behaviours)), UNKNOWN_LABEL, np.int32)
        named = slice(0 if self.at_least is None else 1, None)
        for row, (name, value) in enumerate(events):
            if name:
                found[row, named] = self.others
            if name in self.behaviours:
                found[row, self.behaviours.index(name)] = 1
            if self.at_least is not None and value is not None:
                found[row, 0] = value >= self.at_least
        return found
