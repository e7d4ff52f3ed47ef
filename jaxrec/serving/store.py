"""What is remembered between requests: the log of feedback, histories, trends, items that came in or were hidden.

Two stores say the same: SQLite on one machine (`sqlite_store`), Redis for replicas (`redis_store`). What `append` has
returned from is on disk or at the Redis server, and every later read, of any process, sees it.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

__all__ = ["HOUR", "AddedItem", "Feedback", "Store", "read_log"]

HOUR = 3600
MOST_HISTORY = 10_000  # events of a user that a history gives, the latest ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feedback:
    """Something that a user did with an item.

    Attributes:
      event_id: the client's own name of the event: one that comes again is taken once.
      user_id, item_id: own ids.
      behaviour: what it was, as the data set calls it; "" = an event like those of the training data.
      value: a number beside it; None = there is none.
      seconds: since 1970.
      version: of the model that had shown the item; "" = nobody knows.
      propensity: of showing it there; None = nobody knows.
    """

    event_id: str
    user_id: str
    item_id: str
    behaviour: str = ""
    value: float | None = None
    seconds: int = 0
    version: str = ""
    propensity: float | None = None

    def to_json(self) -> str:
        """Compact; what is empty is left out."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value not in ("", None)}
        return json.dumps(given, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """As `to_json` wrote it."""
        return cls(**json.loads(text))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddedItem:
    """An item that came in while the server ran.

    Attributes:
      seconds: since 1970, when it came in.
    """

    item_id: str
    title: str
    text: str = ""
    categories: tuple[str, ...] = ()
    seconds: int = 0

    def to_json(self) -> str:
        """Compact."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """As `to_json` wrote it."""
        values: dict[str, Any] = json.loads(text)
        return cls(**values | {"categories": tuple(values["categories"])})


class Store(Protocol):
    """One process' way to the state; its methods may be called from any thread."""

    def append(self, events: Sequence[Feedback]) -> int:
        """Takes events, in their order; returns how many were new. They are kept when it returns."""
        ...

    def history(self, user_id: str, limit: int = MOST_HISTORY) -> list[Feedback]:
        """The user's latest events, oldest first, in the order in which they were taken."""
        ...

    def erase(self, user_id: str) -> int:
        """Forgets a user: history, log and trends; returns how many events there were."""
        ...

    def trending(self, since: int, limit: int) -> list[tuple[str, int]]:
        """Items by their events since the hour that `since` (seconds since 1970) is in: most first, then by id."""
        ...

    def log(self, after: int, limit: int) -> list[tuple[int, Feedback]]:
        """Events of all users by number, those above `after`, in the order in which they were taken."""
        ...

    def put_item(self, item: AddedItem) -> None:
        """Adds an item, or replaces what was said of it."""
        ...

    def items(self) -> Mapping[str, AddedItem]:
        """The items that came in, by id."""
        ...

    def hide(self, item_id: str, hidden: bool = True) -> None:
        """Hides an item from everybody, or shows it again."""
        ...

    def hidden(self) -> frozenset[str]:
        """The items that are hidden."""
        ...

    def revision(self) -> int:
        """Grows with each change of items or of what is hidden: whoever keeps a copy sees when to read again."""
        ...

    def close(self) -> None:
        """Lets go of files and connections."""
        ...


def read_log(store: Store, after: int = 0, page: int = 1000) -> Iterator[tuple[int, Feedback]]:
    """The whole log above a number, a page at a time."""
    while rows := store.log(after, page):
        yield from rows
        after = rows[-1][0]
