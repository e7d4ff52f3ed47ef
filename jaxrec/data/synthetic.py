"""Events by rule: a data set of any size, for planning and for trials of scale. It says nothing about quality."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from jaxrec.data.own_source import OwnSource

CHUNK_EVENTS = 1 << 18


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticEvents(OwnSource):
    """Users who walk through a catalogue: popular items often, and after each item mostly one of a few others.

    Every item occurs, and every user has at least `min_events` events.

    Attributes:
      num_items, num_users: ids are 1 .. n.
      events_per_user: on average; numbers of events are geometric above `min_events`.
      follow_rate: chance of an event to be one of the four successors of the one before.
      zipf: exponent of the popularity of the others.
    """

    num_items: int = 1000
    num_users: int = 1000
    events_per_user: float = 8.0
    min_events: int = 3
    follow_rate: float = 0.5
    zipf: float = 1.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_items", "num_users", "min_events"):
            if getattr(self, name) < 1:
                raise ValueError(f"SyntheticEvents.{name}={getattr(self, name)} must be at least 1.")
        if self.events_per_user < self.min_events:
            raise ValueError(
                f"SyntheticEvents.events_per_user={self.events_per_user} must be at least min_events={self.min_events}."
            )
        if not 0 <= self.follow_rate <= 1 or self.zipf <= 0:
            raise ValueError(
                f"SyntheticEvents.follow_rate={self.follow_rate} must lie in [0, 1], zipf={self.zipf} above 0."
            )

    @property
    def name(self) -> str:
        """Its size."""
        return f"synthetic-{self.num_users}x{self.num_items}"

    def event_batches(self) -> Iterator[pa.RecordBatch]:
        """Users in order, a user's events in time order."""
        users_a_chunk = max(1, int(CHUNK_EVENTS / self.events_per_user))
        for start in range(0, self.num_users, users_a_chunk):
            users = np.arange(start, min(start + users_a_chunk, self.num_users))
            random = np.random.default_rng((self.seed, start))
            extra = self.events_per_user - self.min_events
            lengths = self.min_events + (random.geometric(1 / (1 + extra), len(users)) - 1)
            user_ids = np.repeat(users + 1, lengths)
            first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
            position = np.arange(len(user_ids)) - np.repeat(first, lengths)
            items = self._items(random, user_ids, position)
            yield pa.record_batch(
                {
                    "user_id": pa.array(user_ids, pa.int64()),
                    "item_id": pa.array(items, pa.int64()),
                    "timestamp": pa.array(1_600_000_000 + user_ids + 60 * position, pa.int64()),
                }
            )

    def _items(self, random: np.random.Generator, user_ids: np.ndarray, position: np.ndarray) -> np.ndarray:
        # Inverse of the Zipf-like distribution function on [1, num_items].
        place = random.random(len(user_ids))
        if abs(self.zipf - 1) < 1e-9:
            drawn = np.exp(place * np.log(self.num_items + 1))
        else:
            power = 1 - self.zipf
            drawn = (1 + place * ((self.num_items + 1.0) ** power - 1)) ** (1 / power)
        items = np.clip(drawn.astype(np.int64), 1, self.num_items)
        # The first event of user u is item u (mod n): every item occurs once there are as many users.
        items = np.where(position == 0, (user_ids - 1) % self.num_items + 1, items)
        follows = (random.random(len(items)) < self.follow_rate) & (position > 0)
        which = random.integers(0, 4, len(items))
        for index in range(1, int(position.max(initial=0)) + 1):  # a chain, one link at a time for all users
            here = np.flatnonzero(follows & (position == index))
            items[here] = (items[here - 1] * 48_271 + which[here] * 7919) % self.num_items + 1
        return items
