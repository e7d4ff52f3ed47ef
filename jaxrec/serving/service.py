"""What the server does, without the wire: state, versions, batches, lists.

Everything runs on one event loop; the user tower is computed in a thread of each version's batcher, so that the loop
answers others meanwhile.
"""

import asyncio
import dataclasses
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrec.export.bundle import UserEvents
from jaxrec.export.catalogue import Key
from jaxrec.serving.batcher import Batcher, Closed, Expired, Overloaded
from jaxrec.serving.engine import EXPLAINED_EVENTS, Engine, ListRequest
from jaxrec.serving.live import Live, LiveVersions, UnknownError
from jaxrec.serving.measures import Measures
from jaxrec.serving.schema import (
    AddItem,
    Answer,
    BundleRequest,
    ExplainAnswer,
    ExplainRequest,
    FeedbackRequest,
    HideItem,
    RankRequest,
    RecommendRequest,
    SearchRequest,
    ShownItem,
    SimilarRequest,
)  # fmt: skip
from jaxrec.serving.store import HOUR, AddedItem, Feedback, Store
from jaxrec.serving.version import History, Query, Version
from jaxrec.serving.view import View

__all__ = ["Service", "ServiceOptions"]

log = logging.getLogger(__name__)

MOST_BEHIND = 16  # tasks that no answer waits for
TRENDING_HOURS, TRENDING_ITEMS, TRENDING_SECONDS = 24, 100, 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """How the service behaves.

    Attributes:
      deadline_ms: of requests that name none.
      explore: whether lists explore where a request says nothing.
      shares: version -> its share of the users; {} = the newest version has all.
      shadow: a version that gets every request for a list, too; nobody sees its answers, `Measures` compares them.
      max_queue, max_batch: of the user tower; as many lists may wait to be ordered.
    """

    deadline_ms: int = 2_000
    explore: bool = False
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    shadow: str = ""
    max_queue: int = 256
    max_batch: int = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Asked:
    """A user's side of a request.

    Attributes:
      known: the events that the user tower reads.
      history: all events that the view knows, by its ids; new items too.
      num_events: of the history, known or not.
      query: None = the tower was not asked, or not in time; `notes` say so.
    """

    live: Live
    view: View
    known: UserEvents
    history: np.ndarray
    num_events: int
    query: Query | None
    notes: list[str]


class Service:
    """Answers requests; use it on one event loop."""

    def __init__(self, store: Store, engine: Engine, options: ServiceOptions, measures: Measures):
        self.store, self.engine, self.options, self.measures = store, engine, options, measures
        self.live = LiveVersions(
            self._batcher_of, store, measures, shares=options.shares, kept=[options.shadow]
        )
        self._trending: tuple[float, list[tuple[str, int]]] = (0.0, [])
        self._closing = False
        self._in_threads = 0
        self._background: set[asyncio.Task[None]] = set()

    @property
    def ready(self) -> bool:
        """Whether requests are answered."""
        return len(self.live) > 0 and not self._closing

    async def close(self) -> None:
        """Takes nothing more, answers what waits, lets go of the state."""
        self._closing = True
        await self.live.close()
        await asyncio.gather(*self._background, return_exceptions=True)
        self.store.close()

    async def recommend(self, request: RecommendRequest) -> Answer:
        """A list for a user."""
        answer = await self._recommend(request)
        shadow = self.options.shadow
        if shadow in self.live and shadow != answer.model_version and len(self._background) < MOST_BEHIND:
            task = asyncio.create_task(self._compare(request, answer))
            self._background.add(task)
            task.add_done_callback(self._background.discard)
        return answer

    async def _recommend(self, request: RecommendRequest, *, noted: bool = True) -> Answer:
        """A list; with `noted`, exploration learns from it."""
        deadline = self._deadline(request.deadline_ms)
        asked = await self._ask(request.user_id, request.history, deadline, version=request.version)
        view, name = asked.view, asked.live.version.name
        wants = self.options.explore if request.explore is None else request.explore
        explores = wants and self.engine.exploration is not None
        # Who cannot be told from others gets draws of their own: else all would see the same, and never another.
        seed = request.explore_seed or (uuid.uuid4().hex if request.user_id is None else str(request.user_id))
        wanted = ListRequest(
            query=asked.query,
            history=asked.history,
            exclude=self._left_out(asked, view.ids_of(request.exclude)),
            filter=request.filter,
            boosts=request.boosts,
            diversity=request.diversity,
            diversity_by=request.diversity_by,
            calibration=request.calibration,
            size=request.k,
            offset=request.offset,
            trending=self._trends(view),
            explore_key=f"{seed} {name} {asked.history.tobytes().hex()}" if explores else None,
        )
        if explores or request.diversity or request.calibration:
            # They look at the pool once for each place; others are answered meanwhile.
            items = await self._in_thread(deadline, self.engine.recommend, view, wanted)
        else:
            items = self.engine.recommend(view, wanted)
        if explores and noted and self.engine.exploration is not None:
            self.engine.exploration.shown(view.vectors[view.ids_of(item.item_id for item in items)])
        answer = self._answer(asked.live, items, asked.query, asked.notes)
        return answer.model_copy(update={"explore_seed": seed}) if explores else answer

    async def _compare(self, request: RecommendRequest, answer: Answer) -> None:
        """Asks the shadow what was asked, and measures how alike the lists are."""
        started = time.perf_counter()
        try:
            other = await self._recommend(
                request.model_copy(update={"version": self.options.shadow}), noted=False
            )
        except Exception as error:  # whatever it is, nobody waits for the answer
            self.measures.shadow_failed()
            log.warning("the shadow %s failed: %s", self.options.shadow, error)
            return
        shown, shadows = ({item.item_id for item in found.items} for found in (answer, other))
        alike = len(shown & shadows) / max(1, len(shown))
        self.measures.shadow(alike, time.perf_counter() - started)

    async def rank(self, request: RankRequest) -> Answer:
        """Scores of given items, in their order; unknown ones have none."""
        asked = await self._ask(request.user_id, request.history, self._deadline(None))
        view = asked.view
        ids = [view.id_of(key) for key in request.items]
        scores = self.engine.rank(view, asked.query, ids)
        items = [
            ShownItem(item_id=key, title=view.titles[item], score=score, source="given")
            for key, item, score in zip(request.items, ids, scores, strict=True)
        ]
        return self._answer(asked.live, items, asked.query, asked.notes)

    async def similar(self, request: SimilarRequest) -> Answer:
        """Items like one."""
        live, view, item = self._known(request.item_id)
        items = self.engine.similar(view, item, request.k, request.filter)
        return self._answer(live, items, None, [])

    async def search(self, request: SearchRequest) -> Answer:
        """Items by text."""
        live = self.live.of_user(request.user_id)
        view = live.view(self.store)
        items = await self._in_thread(
            self._deadline(None), self.engine.search, view, request.query, request.k, request.filter
        )
        return self._answer(live, items, None, [])

    async def bundle(self, request: BundleRequest) -> Answer:
        """A set of items."""
        asked = await self._ask(request.user_id, request.history, self._deadline(None))
        wanted = ListRequest(
            query=asked.query,
            history=asked.history,
            exclude=self._left_out(asked, np.zeros(0, np.int64)),
            filter=request.filter,
            size=request.size,
        )
        items = self.engine.bundle(asked.view, wanted, request.diversity)
        return self._answer(asked.live, items, asked.query, asked.notes)

    async def explain(self, request: ExplainRequest) -> ExplainAnswer:
        """Why an item: what the score would be without each of the latest events."""
        deadline = self._deadline(None)
        asked = await self._ask(request.user_id, request.history, deadline, version=request.version)
        view, events, notes = asked.view, asked.known, list(asked.notes)
        item = self._item(view, request.item_id)
        wanted = ListRequest(
            query=asked.query,
            history=asked.history,
            exclude=np.zeros(0, np.int64),
            trending=self._trends(view),
        )
        without: list[tuple[int, Query]] = []
        if asked.query is not None:
            latest = range(max(0, len(events) - EXPLAINED_EVENTS), len(events))
            others = [
                asked.live.batcher.submit(History(_without(events, at), request.user_id), deadline=deadline)
                for at in latest
            ]
            found = await asyncio.gather(*others, return_exceptions=True)
            for error in found:
                if isinstance(error, BaseException) and not isinstance(error, Expired):
                    raise error
            without = [
                (int(events.item_ids[at]), other)
                for at, other in zip(latest, found, strict=True)
                if isinstance(other, Query)
            ]
            if len(without) < len(found):
                self.measures.degraded("deadline")
                notes.append(f"The model was in time for {len(without)} of the latest {len(found)} events.")
        return ExplainAnswer(
            item_id=view.key_of(item),
            title=view.titles[item],
            reasons=self.engine.explain(view, wanted, item, without),
            model_version=asked.live.version.name,
            degraded=bool(notes),
            notes=notes,
        )

    async def feedback(self, request: FeedbackRequest) -> dict[str, int]:
        """Takes events; they are in the next answer of every process. Those of unknown items are counted and left out.

        Raises:
          UnknownError: no item is in any catalogue.
        """
        now = int(time.time())
        events, unknown = [], 0
        for event in request.events:
            try:
                _, view, item = self._known(event.item_id, event.version)
            except UnknownError:
                unknown += 1
                if unknown == len(request.events):
                    raise
                continue
            key = view.key_of(item)
            events.append(
                Feedback(
                    event_id=event.event_id or uuid.uuid4().hex,
                    user_id=str(event.user_id),
                    item_id=str(key),
                    behaviour=event.behaviour,
                    value=event.value,
                    seconds=now if event.seconds is None else min(event.seconds, now),
                    version=event.version,
                    propensity=event.propensity,
                )
            )
        new = self.store.append(events)
        self.measures.feedback(new)
        return {"taken": new, "known_already": len(events) - new, "unknown": unknown}

    async def user(self, user_id: str) -> dict[str, Any]:
        """What is remembered of a user."""
        live = self.live.newest
        view = live.view(self.store)
        before = live.version.history(user_id)
        events = [
            (view.key_of(item), seconds if seconds >= 0 else None)
            for item, seconds in zip(before.item_ids.tolist(), before.seconds.tolist(), strict=True)
        ]
        events += [(event.item_id, event.seconds) for event in self.store.history(user_id)]
        return {
            "user_id": user_id,
            "history": [
                {"item_id": key, "title": view.titles[view.id_of(key)], "seconds": seconds}
                for key, seconds in events
            ],
        }

    async def erase(self, user_id: str) -> dict[str, int]:
        """Forgets a user."""
        return {"erased": self.store.erase(user_id)}

    async def add_item(self, request: AddItem) -> dict[str, Any]:
        """Takes an item into the catalogue.

        Raises:
          ValueError: the model has it already.
        """
        view = self.live.newest.view(self.store)
        known = view.id_of(request.item_id)
        if known and known <= view.version.num_items:
            raise ValueError(f"item {request.item_id!r} is in the catalogue already.")
        item = AddedItem(
            item_id=str(request.item_id),
            title=request.title,
            text=request.text,
            categories=request.categories,
            seconds=int(time.time()),
        )
        self.store.put_item(item)
        return {"item_id": item.item_id}

    async def hide_item(self, request: HideItem) -> dict[str, Any]:
        """Hides an item, or shows it again."""
        _, view, item = self._known(request.item_id)
        key = view.key_of(item)
        self.store.hide(str(key), request.hidden)
        return {"item_id": key, "hidden": request.hidden}

    async def about(self) -> dict[str, Any]:
        """What a page wants to know first."""
        live = self.live.newest
        view = live.view(self.store)
        return {
            "version": live.version.name,
            "versions": self.live.names,
            "dataset": live.version.bundle.facts["data"]["name"],
            "num_items": view.num_items,
            "categories": list(view.facts.categories),
            "example_users": live.version.known_users[:20],
            "explores": self.engine.exploration is not None,
        }

    def _events(
        self, live: Live, view: View, user_id: Key | None, history: Sequence[Key] | None
    ) -> tuple[UserEvents, int]:
        """Of the request, or what the version was exported with and the state has had since; in ids of the view.

        Returns: those that the view knows, and how many there are.
        """
        if history is not None:
            ids = view.ids_of(history)
            return UserEvents(ids, np.full(len(ids), -1)), len(history)
        if user_id is None:
            return UserEvents(np.zeros(0, np.int64), np.zeros(0, np.int64)), 0
        before = live.version.history(str(user_id))
        since = self.store.history(str(user_id))
        if not since:
            return before, len(before)
        known = [(item, event.seconds) for event in since if (item := view.id_of(event.item_id))]
        new = np.array(known, np.int64).reshape(-1, 2)
        events = UserEvents(
            np.concatenate([before.item_ids, new[:, 0]]), np.concatenate([before.seconds, new[:, 1]])
        )
        return events, len(before) + len(since)

    def _left_out(self, asked: _Asked, exclude: np.ndarray) -> np.ndarray:
        seen = asked.history if asked.live.version.bundle.facts["filter_seen"] else np.zeros(0, np.int64)
        return np.concatenate([seen, exclude])

    async def _ask(
        self, user_id: Key | None, history: Sequence[Key] | None, deadline: float, *, version: str = ""
    ) -> _Asked:
        """The user's events and the query made of them."""
        live = self.live.named(version) if version else self.live.of_user(user_id)
        view = live.view(self.store)
        events, num_events = self._events(live, view, user_id, history)
        has_vector = events.item_ids <= live.version.num_items
        known = UserEvents(events.item_ids[has_vector], events.seconds[has_vector])
        try:
            query, notes = await self._query(live, History(known, user_id), deadline)
        except Closed:
            if live is self.live.newest:
                raise
            # The version went out of use meanwhile, and its ids with it.
            return await self._ask(user_id, history, deadline)
        return _Asked(
            live=live,
            view=view,
            known=known,
            history=events.item_ids,
            num_events=num_events,
            query=query,
            notes=notes,
        )

    async def _query(self, live: Live, history: History, deadline: float) -> tuple[Query | None, list[str]]:
        """The query of a user with a known event; who has none gets popular items, and so does who cannot wait."""
        if not len(history.events):
            return None, []
        try:
            return await live.batcher.submit(history, deadline=deadline), []
        except Expired:
            self.measures.degraded("deadline")
            return None, ["The model was not in time; popular items are listed."]

    def _batcher_of(self, version: Version) -> Batcher[History, Query]:
        return Batcher(
            version.encode,
            max_batch=self.options.max_batch,
            max_queue=self.options.max_queue,
            observe=self.measures.batch,
        )

    def _deadline(self, milliseconds: int | None) -> float:
        return time.monotonic() + (milliseconds or self.options.deadline_ms) / 1000

    def _trends(self, view: View) -> dict[int, int]:
        read, found = self._trending
        now = time.monotonic()
        if now - read > TRENDING_SECONDS or not read:
            found = self.store.trending(int(time.time()) - TRENDING_HOURS * HOUR, TRENDING_ITEMS)
            self._trending = (now, found)
        return {item: count for key, count in found if (item := view.id_of(key))}

    def _known(self, key: Key, version: str = "") -> tuple[Live, View, int]:
        """A version that has the item: the named one, else the newest, else another.

        Raises:
          UnknownError: none has it.
        """
        names = [*([version] if version in self.live else []), *reversed(self.live.names)]
        for name in names:
            live = self.live.named(name)
            view = live.view(self.store)
            if item := view.id_of(key):
                return live, view, item
        raise UnknownError(f"item {key!r} is not in the catalogue.")

    async def _in_thread(
        self, deadline: float, function: Callable[..., list[ShownItem]], *arguments: Any
    ) -> list[ShownItem]:
        """The function's result; others are answered meanwhile.

        Raises:
          Overloaded: too many wait already.
          Expired: its turn came after the deadline.
        """
        if self._in_threads >= self.options.max_queue:
            raise Overloaded(f"{self._in_threads} lists wait to be ordered.")

        def in_time() -> list[ShownItem]:
            if time.monotonic() > deadline:
                raise Expired("the list was not ordered in time.")
            return function(*arguments)

        self._in_threads += 1
        try:
            return await asyncio.to_thread(in_time)
        finally:
            self._in_threads -= 1

    def _item(self, view: View, key: Key) -> int:
        item = view.id_of(key)
        if not item:
            raise UnknownError(f"item {key!r} is not in the catalogue.")
        return item

    def _answer(
        self, live: Live, items: Sequence[ShownItem], query: Query | None, notes: list[str]
    ) -> Answer:
        return Answer(
            items=list(items),
            model_version=live.version.name,
            degraded=bool(notes),
            known_user=query is not None,
            notes=notes,
        )


def _without(events: UserEvents, at: int) -> UserEvents:
    return UserEvents(np.delete(events.item_ids, at), np.delete(events.seconds, at))
