"""From a query to a list: candidates of several sources, rules, a formula, diversity, exploration, reasons.

Everything here is arithmetic on arrays that are in memory: it neither waits nor changes anything.
M = items of the view, P = items of a pool, D = item dim.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxrec.evaluation.slates import LogDeterminant, Pool, Slate, choose, relevance_of
from jaxrec.serving.candidates import COLUMNS, SOURCES, Asker, Candidates, Sources, best, of_model, scores_of
from jaxrec.serving.exploration import Exploration
from jaxrec.serving.formula import Formula
from jaxrec.serving.graph import GraphRules
from jaxrec.serving.ranker import Judged, Needs, Ranked
from jaxrec.serving.reranking import calibrated, dpp, mmr
from jaxrec.serving.rules import CategoryFilter, Rules, capped
from jaxrec.serving.schema import Filter, ShownItem
from jaxrec.serving.version import Query
from jaxrec.serving.view import View

__all__ = ["Engine", "ListRequest"]

PASSED_OVER = 5  # candidates for each place of a list with a cap, at first
MOST_RERANKED = 250  # places that are chosen one by one
MOST_RESCORED = 1_000  # the pool that a formula, diversity and exploration work on
EXPLAINED_EVENTS = 20
DIVERSITY = {"mmr": mmr, "dpp": dpp}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListRequest(Asker):
    """What a list is asked for, with ids of the view.

    Attributes:
      exclude: beside the history, where that is not to come again.
      ranked: the pool of `Engine.pool`, judged by the task heads; None = they are not asked.
      explore_key: the same key gives the same list.
    """

    exclude: Int[np.ndarray, " x"]
    filter: Filter = Filter()
    boosts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    diversity: float = 0.0
    diversity_by: str = "mmr"
    calibration: float = 0.0
    size: int = 10
    offset: int = 0
    ranked: Ranked | None = None
    explore_key: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """How lists are made.

    Attributes:
      sources: of candidates, beside the model.
      formula: over `COLUMNS` and task heads; what candidates are ordered by.
      exploration: None = lists never explore.
      prerequisites: of a graph: what must be in a history before an item is shown.
    """

    sources: Sources = Sources()
    formula: Formula = dataclasses.field(default_factory=lambda: Formula.parse("score", COLUMNS))
    exploration: Exploration | None = None
    prerequisites: GraphRules | None = None

    @property
    def needs(self) -> Needs:
        """What a version must have to be asked."""
        return Needs(columns=self.formula.names, sources=frozenset(self.sources.sizes))

    def orders_by_formula(self, judged: Judged) -> bool:
        """Whether the formula is what orders: it is not, where it names task heads and they have said nothing."""
        return self.formula.text != "score" and self.formula.names <= {*COLUMNS, *judged}

    def pool(self, view: View, request: ListRequest) -> Candidates:
        """What lists of the request are made of, the highest score first: the same for every page."""
        return self.sources.gather(view, request, self._rules(view, request), MOST_RESCORED)

    def recommend(self, view: View, request: ListRequest) -> list[ShownItem]:
        """The list from `offset` on. Longer lists of the same request begin with the shorter ones.

        Raises:
          ValueError: a category that the catalogue does not have.
        """
        rules = self._rules(view, request)
        wanted = request.offset + request.size
        # A cap passes over any number of items: most often over few.
        most = PASSED_OVER * wanted if rules.max_per_category else wanted
        while True:
            found, values, explored = self._ordered(view, request, rules, most)
            places = capped(found.item_ids, view.facts, rules.max_per_category, wanted)
            if len(places) == wanted or most > view.num_items:
                break
            most = MOST_RESCORED if most < MOST_RESCORED else view.num_items + 1
        listed = found.at(places[request.offset :])
        reasons = self.reasons(view, request, listed.item_ids.tolist())
        rows = zip(
            places[request.offset :].tolist(), listed.item_ids.tolist(), listed.sources.tolist(), strict=True
        )
        return [
            ShownItem(
                item_id=view.key_of(item),
                title=view.titles[item],
                score=float(values[place]),
                source=_source(view, item, SOURCES[source]),
                reasons=reasons[number],
                propensity=explored[place][0] if place in explored else None,
                explored=place in explored and explored[place][1],
            )
            for number, (place, item, source) in enumerate(rows)
        ]

    def rank(
        self, view: View, asker: Asker, item_ids: Int[np.ndarray, " c"], judged: Judged
    ) -> Float[np.ndarray, " c"]:
        """The scores of given items, rising ids: the model's, or the formula's where it names task heads.

        Args:
          judged: what the heads say of these items; {} = nothing.
        """
        scores = scores_of(view, asker.query, item_ids)
        if not judged:
            return scores
        found = Candidates(item_ids, scores, np.zeros_like(item_ids))
        columns = self.sources.columns(view, asker, found, self.formula.names)
        return self.formula({**columns, **judged})

    def similar(self, view: View, item_id: int, size: int, item_filter: Filter) -> list[ShownItem]:
        """Items by the cosine of their vectors with this one's; none where it has nothing in its vector."""
        if not view.unit[item_id].any():
            return []
        likeness = view.unit @ view.unit[item_id]
        return self._by(
            view, likeness, np.array([item_id]), size, item_filter, f"Like {_name(view, item_id)}."
        )

    def search(self, view: View, text: str, size: int, item_filter: Filter) -> list[ShownItem]:
        """Items by the words of a text."""
        likeness = view.words.cosines(text)
        likeness = np.where(likeness > 0, likeness, -np.inf)
        return self._by(view, likeness, np.zeros(0, np.int64), size, item_filter, "Has these words.")

    def bundle(self, view: View, request: ListRequest, weight: float) -> list[ShownItem]:
        """A set that is worth its items' scores and what they span together, chosen greedily."""
        scores = _scores(view, request.query)
        rules = self._rules(view, request)
        kept = rules.scores(scores, view.facts)
        pool = best(kept, 100)
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

    def reasons(self, view: View, request: ListRequest, items: Sequence[int]) -> list[list[str]]:
        """Why each item is listed, in sentences."""
        recent = request.recent
        nearest: list[int] = []
        if request.query is not None and len(recent):
            likeness = view.unit[recent] @ view.unit[items].T
            nearest = recent[np.argmax(likeness, axis=0)].tolist()
        found: list[list[str]] = []
        for place, item in enumerate(items):
            sentences = []
            if item in request.trending:
                sentences.append(f"Taken {request.trending[item]} times in the last hours.")
            if item > view.version.num_items:
                sentences.append("New: judged by its words.")
            if nearest:
                sentences.append(f"Like {_name(view, nearest[place])}, which is in the history.")
            elif view.popularity[item]:
                sentences.append(f"Popular: {view.popularity[item]:,} events.")
            found.append(sentences)
        return found

    def explain(
        self, view: View, request: ListRequest, item: int, without: Sequence[tuple[int, Query]]
    ) -> list[str]:
        """What the score would be without each event, the most telling ones.

        Args:
          without: events of the history, and the query of the history that lacks each.
        """
        if request.query is None:
            return self.reasons(view, request, [item])[0]
        scores, only = view.scores(request.query), np.array([item])
        score = float(scores[item])
        found = [f"Its score is {score:.3f}."]
        changes = [(score - float(view.scores_of(query, only)[0]), event) for event, query in without]
        for change, event in sorted(changes, reverse=True)[:3]:
            if change > 0:
                found.append(f"Without {_name(view, event)} it would be {change:.3f} less.")
        ranks = int(np.count_nonzero(scores[1:] > score)) + 1
        found.append(f"It is number {ranks:,} of {view.num_items:,} before rules.")
        return [*found, *self.reasons(view, request, [item])[0]]

    def _rules(self, view: View, request: ListRequest) -> Rules:
        """Those of a user's list: what the user lacks the first part of is left out, too."""
        exclude = request.exclude
        if self.prerequisites is not None:
            exclude = np.concatenate([exclude, self.prerequisites.of(view).blocked(request.history)])
        return _rules(view, request.filter, exclude, request.boosts)

    def _reorders(self, request: ListRequest) -> bool:
        """Whether lists have another order than that of the scores."""
        explores = self.exploration is not None and request.explore_key is not None
        return self.formula.text != "score" or request.diversity > 0 or request.calibration > 0 or explores

    def _ordered(
        self, view: View, request: ListRequest, rules: Rules, most: int
    ) -> tuple[Candidates, np.ndarray, dict[int, tuple[float, bool]]]:
        """The candidates in order, what they are ordered by, and what was explored at which place."""
        reorders = self._reorders(request)
        if not (reorders or self.sources.sizes):
            found = of_model(view, request.query, rules, most)
            return found, found.scores, {}
        # The pool is the same for every page, so that pages fit each other; the model's next best come behind it.
        pool = self.pool(view, request) if request.ranked is None else request.ranked.pool
        rest = of_model(view, request.query, rules, most) if most > len(pool) else pool.at(slice(0))
        rest = rest.at(~np.isin(rest.item_ids, pool.item_ids))
        values = pool.scores
        explored: dict[int, tuple[float, bool]] = {}
        judged: Judged = {} if request.ranked is None else request.ranked.judged
        if self.orders_by_formula(judged):
            if request.ranked is not None:
                # What was not judged has no place among what was.
                cut = request.ranked.count
                pool, rest = pool.at(slice(cut)), pool.at(slice(cut, None)).then(rest)
            columns = self.sources.columns(view, request, pool, self.formula.names)
            values = self.formula({**columns, **judged})
            places = np.argsort(-values, kind="stable")
            places = places[values[places] > -np.inf]  # the formula's way to say never
            pool, values = pool.at(places), values[places]
            if self.formula.names <= {*COLUMNS}:  # heads have not judged the rest
                columns = self.sources.columns(view, request, rest, self.formula.names)
                rest = rest.at(self.formula(columns) > -np.inf)
        if request.diversity:
            places = DIVERSITY[request.diversity_by](
                values, view.unit[pool.item_ids], request.diversity, MOST_RERANKED
            )
            pool, values = pool.at(places), values[places]
        if request.calibration:
            membership = view.facts.membership
            taken = np.asarray(membership[request.history].sum(axis=0), np.float64).ravel()
            of_pool = np.asarray(membership[pool.item_ids].toarray(), bool)
            shares = taken / max(taken.sum(), 1.0)
            places = calibrated(values, of_pool, shares, request.calibration, MOST_RERANKED)
            pool, values = pool.at(places), values[places]
        if self.exploration is not None and request.explore_key is not None:
            digest = hashlib.blake2b(request.explore_key.encode(), digest_size=8).digest()
            drawn = self.exploration.draw(
                np.random.default_rng(int.from_bytes(digest, "big")),
                # Whoever stands at a place is worth what the place is: another order is kept while nothing is tried.
                np.sort(values[:MOST_RERANKED])[::-1],
                view.vectors[pool.item_ids[:MOST_RERANKED]],
                # A cap passes over places, and a longer list over more of them: all are drawn, so that pages fit.
                MOST_RERANKED if rules.max_per_category else request.offset + request.size,
            )
            places = np.append(drawn.places, np.setdiff1d(np.arange(len(pool)), drawn.places))
            pool, values = pool.at(places), values[places]
            chosen = zip(drawn.propensities.tolist(), drawn.explored.tolist(), strict=True)
            explored = dict(enumerate(chosen))
        return pool.then(rest), np.concatenate([values, rest.scores]), explored

    def _by(
        self, view: View, scores: np.ndarray, exclude: np.ndarray, size: int, item_filter: Filter, reason: str
    ) -> list[ShownItem]:
        rules = _rules(view, item_filter, exclude)
        kept = rules.scores(scores, view.facts)
        ordered = best(kept, len(kept) if rules.max_per_category else size)
        found = ordered[capped(ordered, view.facts, rules.max_per_category, size)]
        return [self._shown(view, item, float(scores[item]), reason) for item in found.tolist()]

    def _shown(self, view: View, item: int, score: float, reason: str) -> ShownItem:
        return ShownItem(
            item_id=view.key_of(item),
            title=view.titles[item],
            score=score,
            source="content",
            reasons=[reason],
        )


def _source(view: View, item: int, source: str) -> Any:
    """The model's score of a new item is that of the items with its words."""
    return "content" if source == "model" and item > view.version.num_items else source


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


def _name(view: View, item: int) -> str:
    return view.titles[item] or f"item {view.key_of(item)}"
