"""From a query to a list: candidates of several sources, rules, a formula, diversity, exploration, reasons.

Everything here is arithmetic on arrays that are in memory: it neither waits nor changes anything.
M = items of the view, P = items of a pool, D = item dim.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from jaxrec.evaluation.slates import LogDeterminant, Pool, Slate, choose, relevance_of
from jaxrec.serving.exploration import Exploration
from jaxrec.serving.formula import Formula
from jaxrec.serving.rules import CategoryFilter, Prerequisites, Rules, capped
from jaxrec.serving.schema import Filter, ShownItem
from jaxrec.serving.version import Query
from jaxrec.serving.view import View

__all__ = ["COLUMNS", "Engine", "ListRequest"]

COLUMNS = ("score", "popularity", "trending", "content", "newness")
MOST_RESCORED = 1_000  # the pool that a formula, diversity and exploration work on
EXPLAINED_EVENTS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListRequest:
    """What a list is asked for, with ids of the view.

    Attributes:
      query: None = nobody knows anything of the user; popular items are listed.
      history: oldest first.
      exclude: beside the history, where that is not to come again.
      trending: events of the last hours by item.
      explore_key: the same key gives the same list.
    """

    query: Query | None
    history: Int[np.ndarray, " l"]
    exclude: Int[np.ndarray, " x"]
    filter: Filter = Filter()
    boosts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    diversity: float = 0.0
    size: int = 10
    offset: int = 0
    trending: Mapping[int, int] = dataclasses.field(default_factory=dict)
    explore_key: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """How lists are made.

    Attributes:
      formula: over `COLUMNS`; what candidates are ordered by.
      exploration: None = lists never explore.
      prerequisites: what must be in a history before an item is shown.
    """

    formula: Formula = dataclasses.field(default_factory=lambda: Formula.parse("score", COLUMNS))
    exploration: Exploration | None = None
    prerequisites: Prerequisites | None = None

    def recommend(self, view: View, request: ListRequest) -> list[ShownItem]:
        """The list from `offset` on. Longer lists of the same request begin with the shorter ones.

        Raises:
          ValueError: a category that the catalogue does not have.
        """
        scores = _scores(view, request.query)
        rules = self._rules(view, request)
        kept = rules.scores(scores, view.facts)
        ordered, values, explored = self._ordered(view, request, kept)
        wanted = request.offset + request.size
        ordered_ids = capped(ordered, view.facts, rules.max_per_category, wanted)[request.offset :]
        at = {int(item): place for place, item in enumerate(ordered)}
        return [
            ShownItem(
                item_id=view.key_of(item),
                title=view.titles[item],
                score=float(values[at[item]]),
                source=self._source(view, request, item),
                reasons=self.reasons(view, request, item),
                propensity=explored[at[item]][0] if at[item] in explored else None,
                explored=at[item] in explored and explored[at[item]][1],
            )
            for item in ordered_ids.tolist()
        ]

    def rank(self, view: View, query: Query | None, item_ids: Sequence[int]) -> list[float | None]:
        """The score of given items; None for id 0."""
        scores = _scores(view, query)
        return [float(scores[item]) if item else None for item in item_ids]

    def similar(self, view: View, item_id: int, size: int, item_filter: Filter) -> list[ShownItem]:
        """Items by the cosine of their vectors with this one's."""
        likeness = view.unit @ view.unit[item_id]
        return self._by(
            view, likeness, np.array([item_id]), size, item_filter, f"Like {_name(view, item_id)}."
        )

    def search(self, view: View, text: str, size: int, item_filter: Filter) -> list[ShownItem]:
        """Items by the words of a text."""
        base = view.version.word_index.cosines(text)
        likeness = np.append(base, np.zeros(len(view.added)))
        words = set(text.casefold().split())
        for number in range(len(view.added)):
            item = view.version.num_items + 1 + number
            own = set(view.titles[item].casefold().split())
            likeness[item] = len(words & own) / np.sqrt(max(1, len(words)) * max(1, len(own)))
        likeness = np.where(likeness > 0, likeness, -np.inf)
        return self._by(view, likeness, np.zeros(0, np.int64), size, item_filter, "Has these words.")

    def bundle(self, view: View, request: ListRequest, weight: float) -> list[ShownItem]:
        """A set that is worth its items' scores and what they span together, chosen greedily."""
        scores = _scores(view, request.query)
        rules = self._rules(view, request)
        kept = rules.scores(scores, view.facts)
        pool = _best(kept, 100)
        membership = np.asarray(view.facts.membership[pool].toarray(), bool)
        slate = Slate(
            size=min(request.size, len(pool)) or 1,
            pool=max(len(pool), 1),
            diversity=LogDeterminant(),
            weight=weight,
            max_per_category=rules.max_per_category,
        )
        if not len(pool):
            return []
        of_pool = kept[pool][None]
        chosen = choose(
            slate,
            Pool(
                relevance=relevance_of(of_pool, of_pool.max(axis=1, keepdims=True)),
                there=np.ones_like(of_pool, bool),
                vectors=view.unit[pool][None],
                categories=membership[None],
            ),
        )[0]
        items = pool[chosen[chosen >= 0]].tolist()
        return [self._shown(view, item, float(scores[item]), "Goes with the others.") for item in items]

    def reasons(self, view: View, request: ListRequest, item: int) -> list[str]:
        """Why an item is listed, in sentences."""
        found = []
        if item in request.trending:
            found.append(f"Taken {request.trending[item]} times in the last hours.")
        if item > view.version.num_items:
            found.append("New: judged by its words.")
        recent = request.history[-50:]
        if request.query is None or not len(recent):
            if view.popularity[item]:
                found.append(f"Popular: {view.popularity[item]:,} events.")
            return found
        likeness = view.unit[recent] @ view.unit[item]
        nearest = int(recent[int(np.argmax(likeness))])
        found.append(f"Like {_name(view, nearest)}, which is in the history.")
        return found

    def explain(
        self, view: View, request: ListRequest, item: int, without: Sequence[tuple[int, Query]]
    ) -> list[str]:
        """What the score would be without each event, the most telling ones.

        Args:
          without: events of the history, and the query of the history that lacks each.
        """
        if request.query is None:
            return self.reasons(view, request, item)
        score = float(view.scores(request.query)[item])
        found = [f"Its score is {score:.3f}."]
        changes = [(score - float(view.scores(query)[item]), event) for event, query in without]
        for change, event in sorted(changes, reverse=True)[:3]:
            if change > 0:
                found.append(f"Without {_name(view, event)} it would be {change:.3f} less.")
        ranks = int(np.count_nonzero(view.scores(request.query)[1:] > score)) + 1
        found.append(f"It is number {ranks:,} of {view.num_items:,} before rules.")
        return [*found, *self.reasons(view, request, item)]

    def _rules(self, view: View, request: ListRequest) -> Rules:
        """Those of a user's list: what the user lacks the first part of is left out, too."""
        exclude = request.exclude
        if self.prerequisites is not None:
            exclude = np.concatenate([exclude, self.prerequisites.blocked(request.history)])
        return _rules(view, request.filter, exclude, request.boosts)

    def _ordered(
        self, view: View, request: ListRequest, kept: Float[np.ndarray, " m_plus_1"]
    ) -> tuple[np.ndarray, np.ndarray, dict[int, tuple[float, bool]]]:
        """All items that may be shown, in order, what they are ordered by, and what was explored at which place."""
        # A cap may pass over any number of items.
        capped_list = request.filter.max_per_category > 0
        ordered = _best(kept, len(kept) if capped_list else max(MOST_RESCORED, request.offset + request.size))
        values = kept[ordered]
        # The pool is the same for every page, so that pages fit each other.
        pool = ordered[:MOST_RESCORED]
        if self.formula.text != "score":
            of_pool = self.formula(self._columns(view, request, kept, pool))
            again = np.argsort(-of_pool, kind="stable")
            ordered, values = _front(ordered, pool[again]), _front(values, of_pool[again])
            pool = ordered[:MOST_RESCORED]
        if request.diversity:
            places = _diverse(values[: len(pool)], view.unit[pool], request.diversity, MOST_RESCORED // 4)
            ordered, values = _front(ordered, pool[places]), _front(values, values[places])
            pool = ordered[:MOST_RESCORED]
        explored: dict[int, tuple[float, bool]] = {}
        if self.exploration is not None and request.explore_key is not None:
            digest = hashlib.blake2b(request.explore_key.encode(), digest_size=8).digest()
            drawn = self.exploration.draw(
                np.random.default_rng(int.from_bytes(digest, "big")),
                values[: len(pool)],
                view.vectors[pool],
                # A cap passes over places, and a longer list over more of them: all are drawn, so that pages fit.
                len(pool) if capped_list else min(request.offset + request.size, len(pool)),
            )
            rest = np.setdiff1d(np.arange(len(pool)), drawn.places)
            places = np.append(drawn.places, rest)
            ordered, values = _front(ordered, pool[places]), _front(values, values[places])
            explored = {
                place: (float(propensity), bool(other))
                for place, (propensity, other) in enumerate(
                    zip(drawn.propensities, drawn.explored, strict=True)
                )
            }
        return ordered, values, explored

    def _columns(
        self, view: View, request: ListRequest, kept: np.ndarray, pool: np.ndarray
    ) -> dict[str, np.ndarray]:
        recent = request.history[-50:]
        content = (
            np.max(view.unit[recent] @ view.unit[pool].T, axis=0) if len(recent) else np.zeros(len(pool))
        )
        return {
            "score": kept[pool],
            "popularity": view.popularity[pool].astype(np.float64),
            "trending": np.array([request.trending.get(int(item), 0) for item in pool], np.float64),
            "content": content,
            "newness": (pool > view.version.num_items).astype(np.float64),
        }

    def _by(
        self, view: View, scores: np.ndarray, exclude: np.ndarray, size: int, item_filter: Filter, reason: str
    ) -> list[ShownItem]:
        rules = _rules(view, item_filter, exclude)
        kept = rules.scores(scores, view.facts)
        found = capped(_best(kept, len(kept)), view.facts, rules.max_per_category, size)
        return [self._shown(view, item, float(scores[item]), reason) for item in found.tolist()]

    def _shown(self, view: View, item: int, score: float, reason: str) -> ShownItem:
        return ShownItem(
            item_id=view.key_of(item),
            title=view.titles[item],
            score=score,
            source="content",
            reasons=[reason],
        )

    def _source(self, view: View, request: ListRequest, item: int) -> Literal["model", "content", "popular"]:
        if item > view.version.num_items:
            return "content"
        return "popular" if request.query is None else "model"


def _scores(view: View, query: Query | None) -> Float[np.ndarray, " m_plus_1"]:
    """Of the model; by popularity where nobody knows anything of the user."""
    return np.log1p(view.popularity) if query is None else view.scores(query)


def _rules(
    view: View,
    asked: Filter,
    exclude: Int[np.ndarray, " x"],
    boosts: Mapping[str, float] = MappingProxyType({}),
) -> Rules:
    """What a filter says, in ids of the view; what is hidden is left out of every list."""
    return Rules(
        exclude=np.concatenate([exclude, view.hidden]).astype(np.int64),
        allow=None if asked.allow is None else view.ids_of(asked.allow),
        categories=CategoryFilter(any_of=asked.any_of, none_of=asked.none_of),
        added_after=asked.added_after,
        max_per_category=asked.max_per_category,
        boosts=boosts,
        threshold=-np.inf if asked.min_score is None else asked.min_score,
    )


def _best(scores: Float[np.ndarray, " m"], most: int) -> Int[np.ndarray, " p"]:
    """Items with a finite score, best first, ties to the smaller id."""
    there = np.flatnonzero(scores > -np.inf)
    if most < len(there):
        least = np.partition(scores[there], len(there) - most)[len(there) - most]
        there = there[scores[there] >= least]
    return there[np.argsort(-scores[there], kind="stable")][:most]


def _front(array: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The array with another beginning."""
    return np.concatenate([first, array[len(first) :]])


def _diverse(
    scores: Float[np.ndarray, " p"], unit: Float[np.ndarray, "p d"], diversity: float, most: int
) -> Int[np.ndarray, " p"]:
    """Maximal marginal relevance: places by `(1 - diversity) relevance - diversity * likeness to those before`.

    The first `most` are chosen so, the rest follow by score. Relevance is the score between the worst and the best.

    Source: Carbonell and Goldstein, SIGIR 1998.
    """
    span = float(np.ptp(scores)) if len(scores) else 0.0
    relevance = (scores - scores.min()) / span if span else np.ones(len(scores))
    left = np.ones(len(scores), bool)
    likeness = np.zeros(len(scores))
    places: list[int] = []
    for _ in range(min(most, len(scores))):
        worth = np.where(left, (1.0 - diversity) * relevance - diversity * likeness, -np.inf)
        place = int(np.argmax(worth))
        places.append(place)
        left[place] = False
        likeness = np.maximum(likeness, unit @ unit[place])
    return np.append(np.array(places, np.int64), np.flatnonzero(left))


def _name(view: View, item: int) -> str:
    return view.titles[item] or f"item {view.key_of(item)}"
