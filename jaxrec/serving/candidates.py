"""Candidates of several sources, each tagged with the one that it stands highest in.

The model's are the best of the whole catalogue, or of what an index finds. Others come from methods that the version
was exported with (`item_knn`, `ease`, `ials`), from words (`content`), from what many take (`popular`, `trending`) and
from what came in last (`recent`). Rules are applied to each source's list, so that each is full while anything is left.

M = items of the view, C = candidates.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxrec.export.candidates import METHODS
from jaxrec.serving.rules import Rules
from jaxrec.serving.version import Query
from jaxrec.serving.view import View

__all__ = ["COLUMNS", "SOURCES", "Asker", "Candidates", "Sources", "best", "of_model", "scores_of"]

SOURCES = ("model", *METHODS, "content", "popular", "trending", "recent")
COLUMNS = ("score", *METHODS, "likeness", "content", "popularity", "trending", "newness")
RECENT_EVENTS = 50  # of a history that reasons, words and likeness look at


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asker:
    """Who asks: ids of the view.

    Attributes:
      query: None = nobody knows anything of the user; the model's place is taken by what is popular.
      history: oldest first.
      trending: events of the last hours by item.
    """

    query: Query | None
    history: Int[np.ndarray, " l"]
    trending: Mapping[int, int] = dataclasses.field(default_factory=dict)

    @property
    def recent(self) -> Int[np.ndarray, " r"]:
        """The latest events."""
        return self.history[-RECENT_EVENTS:]


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates:
    """Distinct items, the highest score first (but behind what an index finds what it has missed).

    Attributes:
      scores: of the model, with boosts.
      sources: numbers in `SOURCES`.
    """

    item_ids: Int[np.ndarray, " c"]
    scores: Float[np.ndarray, " c"]
    sources: Int[np.ndarray, " c"]

    def __len__(self) -> int:
        return len(self.item_ids)

    def at(self, places: Int[np.ndarray, " p"] | Bool[np.ndarray, " c"] | slice) -> "Candidates":
        """Those at these places."""
        return Candidates(self.item_ids[places], self.scores[places], self.sources[places])

    def then(self, others: "Candidates") -> "Candidates":
        """These, and behind them others."""
        return Candidates(
            *(
                np.concatenate([getattr(self, field.name), getattr(others, field.name)])
                for field in dataclasses.fields(self)
            )
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sources:
    """How many candidates each source gives; those of the model come in any case.

    Attributes:
      sizes: by source.
    """

    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Self:
        """`item_knn=200`, `popular=50`, ...

        Raises:
          ValueError: says what is wrong with which.
        """
        sizes = {}
        for text in texts:
            name, _, size = text.partition("=")
            if name not in SOURCES[1:] or not size.isdecimal() or not 1 <= int(size) <= 1_000:
                raise ValueError(
                    f"candidates {text!r}: say SOURCE=NUMBER, with one of {', '.join(SOURCES[1:])} and 1 to 1,000."
                )
            sizes[name] = int(size)
        return cls(sizes=sizes)

    def gather(self, view: View, asker: Asker, rules: Rules, most: int) -> Candidates:
        """The model's `most` best that the rules let pass, and those of the other sources."""
        found = of_model(view, asker.query, rules, most)
        others = [
            (SOURCES.index(name), ids[rules.allowed(view.facts, ids)][:size])
            for name, size in self.sizes.items()
            if len(ids := _listed(name, view, asker, size))
        ]
        if not others:
            return found
        lists = [(int(found.sources[0]) if len(found) else 0, found.item_ids), *others]
        item_ids = np.concatenate([ids for _, ids in lists])
        places = np.concatenate([np.arange(len(ids)) for _, ids in lists])
        sources = np.concatenate([np.full(len(ids), source) for source, ids in lists])
        order = np.lexsort((places, item_ids))
        first = np.diff(item_ids[order], prepend=-1) > 0
        item_ids, sources = item_ids[order][first], sources[order][first]
        scores = rules.scores(scores_of(view, asker.query, item_ids), view.facts, item_ids)
        merged = Candidates(item_ids, scores, sources)
        return merged.at(best(scores, len(scores)))

    def columns(
        self, view: View, asker: Asker, found: Candidates, names: frozenset[str]
    ) -> dict[str, np.ndarray]:
        """What a formula may read of candidates: those of `COLUMNS` that it does read."""
        ids, recent = found.item_ids, asker.recent
        columns = {"score": found.scores}
        for name in names.intersection(METHODS):
            columns[name] = np.zeros(len(ids), np.float32)
            known, scores = _scored_by(name, view, asker)
            if len(known):
                places = np.minimum(np.searchsorted(known, ids), len(known) - 1)
                columns[name] = np.where(known[places] == ids, scores[places], 0.0)
        if "likeness" in names:
            alike = view.unit[recent] @ view.unit[ids].T
            columns["likeness"] = np.max(alike, axis=0, initial=-1.0) if len(recent) else np.zeros(len(ids))
        if "content" in names:
            columns["content"] = view.words.likeness(recent, ids)
        if "popularity" in names:
            columns["popularity"] = view.popularity[ids].astype(np.float64)
        if "trending" in names:
            columns["trending"] = np.array([asker.trending.get(item, 0) for item in ids.tolist()], np.float64)
        if "newness" in names:
            columns["newness"] = (ids > view.version.num_items).astype(np.float64)
        return columns


def of_model(view: View, query: Query | None, rules: Rules, most: int) -> Candidates:
    """The best by the model's score; by popularity where nobody knows anything of the user.

    With an index what it finds comes first, and behind that the best of what it has missed: longer lists begin with the
    shorter ones.
    """
    source = SOURCES.index("popular" if query is None else "model")
    index = view.version.index
    head = Candidates(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.int64))
    if index is not None and query is not None and not rules.reorder:
        added = np.arange(view.version.num_items + 1, view.num_items + 1)
        beside = np.concatenate([query.extra_ids[query.extra_ids > 0], added])  # what no index knows
        # At last all that the searched cells hold: what they lack is looked for only behind that, or pages would move.
        for size in (2 * most + len(rules.exclude), view.version.num_items):
            ids = np.unique(np.concatenate([index.search(query.vector, size), beside]))
            scores = rules.scores(view.scores_of(query, ids), view.facts, ids)
            places = best(scores, most)
            head = Candidates(ids[places], scores[places], np.full(len(places), source))
            if len(head) == most:
                return head
    scores = rules.scores(np.log1p(view.popularity) if query is None else view.scores(query), view.facts)
    scores[head.item_ids] = -np.inf
    ids = best(scores, most - len(head))
    return head.then(Candidates(ids, scores[ids], np.full(len(ids), source)))


def best(scores: Float[np.ndarray, " m"], most: int) -> Int[np.ndarray, " p"]:
    """Places of the finite scores, best first, ties to the smaller place."""
    there = np.flatnonzero(scores > -np.inf)
    if most < len(there):
        least = np.partition(scores[there], len(there) - most)[len(there) - most]
        there = there[scores[there] >= least]
    return there[np.argsort(-scores[there], kind="stable")][:most]


def scores_of(view: View, query: Query | None, item_ids: Int[np.ndarray, " c"]) -> Float[np.ndarray, " c"]:
    """Of some items, rising ids; by popularity where nobody knows anything of the user."""
    return np.log1p(view.popularity[item_ids]) if query is None else view.scores_of(query, item_ids)


def _listed(name: str, view: View, asker: Asker, size: int) -> Int[np.ndarray, " c"]:
    """A source's list, before rules: longer than it is wanted, as rules will shorten it."""
    most = 4 * size + len(asker.history)
    if name == "popular":
        return view.by_popularity[:most]
    if name == "trending":
        return np.array(sorted(asker.trending, key=lambda item: -asker.trending[item]), np.int64)
    if name == "recent":
        came = np.flatnonzero(view.facts.added_at)
        return came[np.lexsort((-came, -view.facts.added_at[came]))][:most]
    if not len(asker.history):
        return np.zeros(0, np.int64)
    if name == "content":
        items = np.arange(1, view.num_items + 1)
        return items[best(view.words.likeness(asker.recent, items), most)]
    known, scores = _scored_by(name, view, asker)
    return known[best(scores, most)]


def _scored_by(name: str, view: View, asker: Asker) -> tuple[Int[np.ndarray, " s"], Float[np.ndarray, " s"]]:
    """What a method says after the history: items, rising, and their scores; none where it has nothing to say."""
    method = view.version.others.get(name)
    history = asker.history[asker.history <= view.version.num_items]
    if method is None or not len(history):
        return np.zeros(0, np.int64), np.zeros(0, np.float32)
    return method.scores(history)
