"""What the server does, without the wire: state, versions, batches, lists.

Everything runs on one event loop; the user tower is computed in a thread of each version's batcher, so that the loop
answers others meanwhile.
"""

import asyncio
import dataclasses
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxrec.export.catalogue import Key
from jaxrec.export.layout import MOST_CANDIDATES
from jaxrec.serving.asking import Asked, Asking, ServiceOptions
from jaxrec.serving.batcher import Expired, Overloaded
from jaxrec.serving.candidates import Asker
from jaxrec.serving.engine import EXPLAINED_EVENTS, Engine, ListRequest
from jaxrec.serving.live import Live, UnknownError
from jaxrec.serving.measures import Measures
from jaxrec.serving.ranker import Judged, Ranked
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
    ScoredBy,
    SearchRequest,
    ShownItem,
    SimilarRequest,
)  # fmt: skip
from jaxrec.serving.store import HOUR, AddedItem, Feedback, Store
from jaxrec.serving.version import Query
from jaxrec.serving.view import View

__all__ = ["Service", "ServiceOptions"]

log = logging.getLogger(__name__)

MOST_BEHIND = 16  # tasks that no answer waits for
TRENDING_HOURS, TRENDING_ITEMS, TRENDING_SECONDS = 24, 100, 5.0


class Service:
    """Answers requests; use it on one event loop."""

    def __init__(self, store: Store, engine: Engine, options: ServiceOptions, measures: Measures):
        self.store, self.engine, self.options, self.measures = store, engine, options, measures
        self.asking = Asking(store, engine.needs, options, measures)
        self.live = self.asking.live
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
        deadline = self.asking.deadline(request.deadline_ms)
        asked = await self.asking.ask(request.user_id, request.history, deadline, version=request.version)
        view, name = asked.view, asked.live.version.name
        wants = self.options.explore if request.explore is None else request.explore
        exploration = self.engine.exploration if wants else None
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
            explore_key=f"{seed} {name} {asked.history.tobytes().hex()}" if exploration is not None else None,
        )
        judged: Judged = {}
        if asked.ranks:
            pool = self.engine.pool(view, wanted)
            judged = await self.asking.judge(asked, pool.item_ids[:MOST_CANDIDATES])
            wanted = dataclasses.replace(wanted, ranked=Ranked(pool, judged))
        if exploration is not None or request.diversity or request.calibration:
            # They look at the pool once for each place; others are answered meanwhile.
            try:
                items = await self._in_thread(deadline, self.engine.recommend, view, wanted)
            except Expired:
                self.measures.degraded("order_expired")
                asked.notes.append("The list was not ordered in time; it is that of the scores alone.")
                exploration = None
                wanted = dataclasses.replace(wanted, diversity=0.0, calibration=0.0, explore_key=None)
                items = self.engine.recommend(view, wanted)
        else:
            items = self.engine.recommend(view, wanted)
        if exploration is not None and noted:
            exploration.shown(view.vectors[view.ids_of(item.item_id for item in items)])
        by_formula = self.engine.orders_by_formula(judged)
        answer = self._answer(asked.live, items, asked.query, asked.notes, "formula" if by_formula else None)
        return answer.model_copy(update={"explore_seed": seed}) if exploration is not None else answer

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
        asked = await self._ask(request)
        view = asked.view
        ids = [view.id_of(key) for key in request.items]
        known = np.unique(np.array([item for item in ids if item], np.int64))
        judged = await self.asking.judge(asked, known)
        asker = Asker(query=asked.query, history=asked.history, trending=self._trends(view))
        found = self.engine.rank(view, asker, known, judged).tolist()
        # What a formula makes no finite number of has no score.
        scores = {item: score for item, score in zip(known.tolist(), found, strict=True) if score > -np.inf}
        items = [
            ShownItem(item_id=key, title=view.titles[item], score=scores.get(item), source="given")
            for key, item in zip(request.items, ids, strict=True)
        ]
        return self._answer(asked.live, items, asked.query, asked.notes, "formula" if judged else None)

    async def similar(self, request: SimilarRequest) -> Answer:
        """Items like one."""
        live, view, item = self._known(request.item_id)
        items = self.engine.similar(view, item, request.k, request.filter)
        return self._answer(live, items, None, [], "likeness")

    async def search(self, request: SearchRequest) -> Answer:
        """Items by text."""
        live = self.live.of_user(request.user_id)
        view = live.view(self.store)
        items = await self._in_thread(
            self.asking.deadline(), self.engine.search, view, request.query, request.k, request.filter
        )
        return self._answer(live, items, None, [], "words")

    async def bundle(self, request: BundleRequest) -> Answer:
        """A set of items."""
        asked = await self._ask(request)
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
        deadline = self.asking.deadline()
        asked = await self.asking.ask(request.user_id, request.history, deadline, version=request.version)
        view = asked.view
        item = self._item(view, request.item_id)
        wanted = ListRequest(
            query=asked.query,
            history=asked.history,
            exclude=np.zeros(0, np.int64),
            trending=self._trends(view),
        )
        without = await self.asking.without_each(asked, EXPLAINED_EVENTS)
        return ExplainAnswer(
            item_id=view.key_of(item),
            title=view.titles[item],
            reasons=self.engine.explain(view, wanted, item, without),
            model_version=asked.live.version.name,
            degraded=bool(asked.notes),
            notes=asked.notes,
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
        own = live.version.bundle.catalogue.vocabulary.own
        events += [(own(event.item_id), event.seconds) for event in self.store.history(user_id)]
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
        return {"item_id": view.version.bundle.catalogue.vocabulary.own(item.item_id)}

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
            "formula": self.engine.formula.text,
            "categories": list(view.facts.categories),
            "example_users": live.version.known_users[:20],
            "explores": self.engine.exploration is not None,
        }

    def _left_out(self, asked: Asked, exclude: np.ndarray) -> np.ndarray:
        seen = asked.history if asked.live.version.bundle.facts["filter_seen"] else np.zeros(0, np.int64)
        return np.concatenate([seen, exclude])

    async def _ask(self, request: RankRequest | BundleRequest) -> Asked:
        return await self.asking.ask(request.user_id, request.history, self.asking.deadline())

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
        self,
        live: Live,
        items: Sequence[ShownItem],
        query: Query | None,
        notes: list[str],
        scored_by: ScoredBy | None = None,
    ) -> Answer:
        """With `scored_by` None the scores are the model's, or by popularity where nobody knows the user."""
        return Answer(
            items=list(items),
            model_version=live.version.name,
            scored_by=scored_by or ("popularity" if query is None else "model"),
            degraded=bool(notes),
            known_user=query is not None,
            notes=notes,
        )
