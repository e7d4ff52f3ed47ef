"""The weights of a blend: what a formula should make of the columns of candidates, learnt from what users took next.

Each user's candidates are a choice, and the event that came next is what was chosen: a conditional logit over the
columns, whose weights are those of a formula for the server.
Q = users, C = candidates, F = columns.

Source: McFadden 1973 (conditional logit).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.optimize
from jaxtyping import Float, Float32, Int

from jaxrec.evaluation.baselines.evaluate import Queries
from jaxrec.export.events import UserEvents
from jaxrec.serving.candidates import Asker, Candidates, Sources
from jaxrec.serving.formula import Formula
from jaxrec.serving.rules import Rules
from jaxrec.serving.version import History, Version
from jaxrec.serving.view import View

__all__ = ["Choice", "choices", "learn", "ndcg"]

RIDGE = 1e-3  # on weights of columns of unit deviation
# What a formula can say of a column: popularity counts by its order of magnitude.
TERMS: Mapping[str, str] = {"popularity": "log(1 + popularity)"}


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """A user's candidates and what the user took.

    Attributes:
      target: its place among the candidates; -1 = it is none of them.
      columns: by name.
    """

    target: int
    columns: dict[str, Float32[np.ndarray, " c"]]


def choices(
    version: Version, sources: Sources, queries: Queries, names: Sequence[str], *, pool: int, seen: bool
) -> list[Choice]:
    """The candidates after each history, as a server would gather them.

    Args:
      pool: candidates of the model.
      seen: whether items of the history may come again.
    """
    view = View.of(version, {}, (), 0)
    found: list[Choice] = []
    for part, histories in queries.chunks(256):
        bounds = list(zip(histories.offsets[:-1], histories.offsets[1:], strict=True))
        events = [
            UserEvents(
                histories.item_ids[start:end].astype(np.int64),
                np.maximum(histories.timestamps[start:end], -1),
                histories.labels[start:end],
            )
            for start, end in bounds
        ]
        vectors = version.encode([History(one) for one in events])
        for one, query, target in zip(events, vectors, queries.targets[part].tolist(), strict=True):
            asker = Asker(query=query, history=one.item_ids)
            rules = Rules() if seen else Rules(exclude=one.item_ids)
            candidates = sources.gather(view, asker, rules, pool)
            columns = sources.columns(view, asker, candidates, frozenset(names))
            found.append(
                Choice(_place(candidates, target), {n: columns[n].astype(np.float32) for n in names})
            )
    return found


def learn(learnt_from: Sequence[Choice], names: Sequence[str]) -> Formula:
    """The formula that makes what users took most likely.

    Raises:
      ValueError: no user took a candidate.
    """
    kept = [choice for choice in learnt_from if choice.target >= 0]
    if not kept:
        raise ValueError("no user's next item is among the candidates: name more of them.")
    terms = [Formula.parse(TERMS.get(name, name), names) for name in names]
    rows = [np.stack([term(choice.columns) for term in terms], axis=1) for choice in kept]
    scale = np.maximum(np.sqrt(np.mean([row.var(axis=0) for row in rows], axis=0)), 1e-9)
    starts = np.cumsum([0, *map(len, rows)])[:-1]
    features = np.concatenate(rows).astype(np.float32) / scale.astype(np.float32)
    chosen = starts + [choice.target for choice in kept]
    weights = _conditional_logit(features, starts, chosen) / scale
    # The model's score keeps its weight of 1: a list is ordered alike by any multiple.
    weights = weights / abs(weights[0])
    text = " + ".join(
        term.text if number == 0 else f"{weight:.4g} * {term.text}"
        for number, (weight, term) in enumerate(zip(weights.tolist(), terms, strict=True))
    )
    return Formula.parse(text.replace("+ -", "- "), names)


def ndcg(asked: Sequence[Choice], formula: Formula, k: int = 10) -> Float[np.ndarray, " q"]:
    """NDCG@k of each user's list by a formula."""
    values = np.zeros(len(asked))
    for number, choice in enumerate(asked):
        if choice.target >= 0:
            scores = formula(choice.columns)
            rank = int(np.count_nonzero(scores > scores[choice.target]))
            values[number] = 1.0 / np.log2(rank + 2.0) if rank < k else 0.0
    return values


def _place(candidates: Candidates, target: int) -> int:
    places = np.flatnonzero(candidates.item_ids == target)
    return int(places[0]) if len(places) else -1


def _conditional_logit(
    features: Float32[np.ndarray, "c f"], starts: Int[np.ndarray, " q"], chosen: Int[np.ndarray, " q"]
) -> Float[np.ndarray, " f"]:
    """The most likely weights; candidates of a user begin at its start."""
    lengths = np.diff(np.append(starts, len(features)))
    of_chosen = features[chosen].mean(axis=0)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        scores = features @ weights.astype(np.float32)
        highest = np.maximum.reduceat(scores, starts)
        exps = np.exp(scores - np.repeat(highest, lengths))
        sums = np.add.reduceat(exps, starts)
        shares = exps / np.repeat(sums, lengths)
        likelihood = np.mean(scores[chosen] - highest - np.log(sums))
        gradient = features.T @ shares / len(starts) - of_chosen
        return float(RIDGE * weights @ weights - likelihood), 2 * RIDGE * weights + gradient

    start = np.zeros(features.shape[1])
    start[0] = 1.0
    found = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B")
    return np.asarray(found.x)
