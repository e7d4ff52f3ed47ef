"""A user's side of a request: the events, the query that the user tower makes of them, what task heads say of items.

Towers and heads run in threads of each version's batchers, so that the event loop answers others meanwhile.
"""

import asyncio
import dataclasses
import time
from collections.abc import Mapping, Sequence

import numpy as np

from jaxrec.export.catalogue import Key
from jaxrec.export.events import UserEvents
from jaxrec.serving.batcher import Batcher, Closed, Expired, Overloaded
from jaxrec.serving.histories import events_of
from jaxrec.serving.live import Live, LiveVersions
from jaxrec.serving.measures import Measures
from jaxrec.serving.ranker import Judged, Needs, ToJudge, judge
from jaxrec.serving.store import Store
from jaxrec.serving.version import History, Query, Version
from jaxrec.serving.view import View

__all__ = ["Asked", "Asking", "ServiceOptions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """How the service behaves.

    Attributes:
      deadline_ms: of requests that name none.
      explore: whether lists explore where a request says nothing.
      shares: version -> its share of the users; {} = the newest version has all.
      shadow: a version that gets every request for a list, too; nobody sees its answers, `Measures` compares them.
      max_queue, max_batch: of the user tower, and of the task heads; as many lists may wait to be ordered.
    """

    deadline_ms: int = 2_000
    explore: bool = False
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    shadow: str = ""
    max_queue: int = 256
    max_batch: int = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A user's side of a request.

    Attributes:
      reader: what the towers read: of the events those that the version knows.
      history: all events that the view knows, by its ids; new items too.
      query: None = the tower was not asked, or not in time.
      notes: what was left out to be in time, in sentences; whoever leaves out more adds one.
    """

    live: Live
    view: View
    reader: History
    history: np.ndarray
    query: Query | None
    notes: list[str]
    deadline: float

    @property
    def ranks(self) -> bool:
        """Whether task heads have something to say."""
        return self.live.ranker is not None and self.query is not None


class Asking:
    """Asks the versions in use.

    Attributes:
      live: the versions.
    """

    def __init__(self, store: Store, needs: Needs, options: ServiceOptions, measures: Measures):
        """No version is in use yet.

        Args:
          needs: what a version must have.
        """
        self._store, self._needs, self._options, self._measures = store, needs, options, measures
        self.live = LiveVersions(
            self._batcher_of,
            store,
            measures,
            shares=options.shares,
            shadow=options.shadow,
            needs=needs,
            ranker_of=self._ranker_of,
        )

    def deadline(self, milliseconds: int | None = None) -> float:
        """By `time.monotonic()`; None = that of requests that name none."""
        return time.monotonic() + (milliseconds or self._options.deadline_ms) / 1000

    async def ask(
        self, user_id: Key | None, history: Sequence[Key] | None, deadline: float, *, version: str = ""
    ) -> Asked:
        """The user's events and the query made of them."""
        live = self.live.named(version) if version else self.live.of_user(user_id)
        view = live.view(self._store)
        events = events_of(live.version, view, self._store, user_id, history)
        reader = History(events.at(events.item_ids <= live.version.num_items), user_id)
        try:
            query, notes = await self._query(live, reader, deadline)
        except Closed:
            if live is self.live.of_user(user_id):
                raise  # the server shuts down
            # The version went out of use meanwhile, and its ids with it.
            return await self.ask(user_id, history, deadline)
        return Asked(
            live=live,
            view=view,
            reader=reader,
            history=events.item_ids,
            query=query,
            notes=notes,
            deadline=deadline,
        )

    async def judge(self, asked: Asked, item_ids: np.ndarray) -> Judged:
        """What task heads say of items, ids of the view; {} where they are not asked, or not in time."""
        live = asked.live
        if live.ranker is None or asked.query is None:
            return {}
        try:
            return await judge(live.ranker, live.version, asked.reader, item_ids, asked.deadline)
        except (Expired, Overloaded, Closed) as error:
            # Who has got as far as this is not sent away: the model's order is an answer, too.
            self._measures.degraded(f"ranker_{type(error).__name__.lower()}")
            asked.notes.append("The task heads were not in time; the order is that of the model's score.")
            return {}

    async def without_each(self, asked: Asked, most: int) -> list[tuple[int, Query]]:
        """Of the latest `most` events the item, and the query without the event; those that came in time.

        A version that goes out of use meanwhile says no more, and its ids mean nothing to another one.
        """
        if asked.query is None:
            return []
        events = asked.reader.events
        latest = range(max(0, len(events) - most), len(events))
        found = await asyncio.gather(
            *(
                asked.live.batcher.submit(
                    History(_without(events, at), asked.reader.user_id), deadline=asked.deadline
                )
                for at in latest
            ),
            return_exceptions=True,
        )
        for error in found:
            if isinstance(error, BaseException) and not isinstance(error, Expired | Closed):
                raise error
        in_time = [
            (int(events.item_ids[at]), query)
            for at, query in zip(latest, found, strict=True)
            if isinstance(query, Query)
        ]
        if len(in_time) < len(found):
            closed = any(isinstance(error, Closed) for error in found)
            self._measures.degraded("closed" if closed else "deadline")
            asked.notes.append(f"The model was in time for {len(in_time)} of the latest {len(found)} events.")
        return in_time

    async def _query(self, live: Live, reader: History, deadline: float) -> tuple[Query | None, list[str]]:
        """The query of a user with a known event; who has none gets popular items, and so does who cannot wait."""
        if not len(reader.events):
            return None, []
        try:
            return await live.batcher.submit(reader, deadline=deadline), []
        except Expired:
            self._measures.degraded("deadline")
            return None, ["The model was not in time; popular items are listed."]

    def _batcher_of(self, version: Version) -> Batcher[History, Query]:
        return Batcher(
            version.encode,
            max_batch=self._options.max_batch,
            max_queue=self._options.max_queue,
            observe=self._measures.batch,
        )

    def _ranker_of(self, version: Version) -> Batcher[ToJudge, Judged] | None:
        ranker = self._needs.ranker(version)
        if ranker is None:
            return None
        return Batcher(
            ranker.judge,
            max_batch=self._options.max_batch,
            max_queue=self._options.max_queue,
            observe=self._measures.ranked,
        )


def _without(events: UserEvents, at: int) -> UserEvents:
    return events.at(np.delete(np.arange(len(events)), at))
