"""Search by text: where do the items that answer a query stand in the whole catalogue? Beside counting words.

Each held-out pair of a query and an item is ranked with the query's other answers left out, whatever part they are of.
A query's value is the mean over its pairs, and a metric the mean over queries, so that no query counts for many.

P = pairs, Q = queries.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from jaxrec.core.queries import TextQueries
from jaxrec.data.queries import KINDS, QueryTable
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.evaluation.full_ranking import FullRanking
from jaxrec.evaluation.significance import with_intervals
from jaxrec.evaluation.user_ranking import Run
from jaxrec.evaluation.word_index import BM25, TfIdf
from jaxrec.metrics.ranking import per_user_metrics, rank_targets
from jaxrec.nn.layers import unit_vectors
from jaxrec.tasks.base import Task

MODEL = "model"
PAIRS_AT_ONCE = 256

Ranks = Int[np.ndarray, " p"]


def is_searched(tasks: Mapping[str, Task]) -> bool:
    """Whether a task of the run learns to answer text queries."""
    return any(task.reads_queries for task in tasks.values())


def search_metrics(run: Run, split: str, config: EvaluationConfig) -> dict[str, Any]:
    """The metrics of the model and of the baselines over the queries with a pair in `split`, by kind of query.

    Returns:
      By kind (`data.queries.KINDS`, those that occur, and "all"): `num_queries`, `num_pairs`, and by system
      `metrics` and `intervals`. {} where the split holds no pair.
    """
    table = run.dataset.queries
    asked = None if table is None else table.pairs(split)
    if table is None or asked is None or not len(asked.item_ids):
        return {}
    ranks = {MODEL: model_ranks(run, table, asked)} | baseline_ranks(run, table, asked)
    kinds = table.kinds()[asked.query_ids]
    parts = {"all": np.ones(len(kinds), bool)} | {name: kinds == kind for kind, name in enumerate(KINDS)}
    return {name: _of_part(asked, ranks, chosen, config) for name, chosen in parts.items() if chosen.any()}


def model_ranks(run: Run, table: QueryTable, asked: TextQueries) -> Ranks:
    """By cosine of the query's vector and v(y)."""
    ranking = FullRanking(mesh=run.mesh, num_items=run.dataset.metadata.num_items)
    vectors, bias = run.catalogue()
    catalogue = ranking.catalogue(jax.jit(unit_vectors)(vectors), jax.numpy.zeros_like(bias))

    def of_pairs(pairs: slice, seen_rows: np.ndarray, seen_items: np.ndarray) -> Ranks:
        missing = PAIRS_AT_ONCE - len(asked.query_ids[pairs])
        queries = np.pad(asked.query_ids[pairs], (0, missing))
        targets = np.pad(asked.item_ids[pairs], (0, missing))
        # A power of two, so that few shapes are compiled; row -1 is nobody's.
        room = 1 << max(len(seen_rows) - 1, 1).bit_length()
        seen_rows = np.pad(seen_rows, (0, room - len(seen_rows)), constant_values=-1)
        seen_items = np.pad(seen_items, (0, room - len(seen_items)))
        found = ranking.rank(
            catalogue, run.text_queries(table.token_ids[queries]), targets, seen_rows, seen_items
        )
        return np.asarray(found.ranks)[: PAIRS_AT_ONCE - missing]

    return _in_chunks(of_pairs, table, asked)


def baseline_ranks(run: Run, table: QueryTable, asked: TextQueries) -> dict[str, Ranks]:
    """Counting words in the items' texts, alone and with the training queries added; and the order of popularity."""
    texts = _item_texts(run)
    trained = table.pairs("train")
    with_queries = list(texts)
    for query, item in zip(trained.query_ids.tolist(), trained.item_ids.tolist(), strict=True):
        with_queries[item - 1] += f" {table.texts[query]}"
    indices = {
        "tf_idf": TfIdf().fit(texts),
        "bm25": BM25().fit(texts),
        "tf_idf_with_queries": TfIdf().fit(with_queries),
        "bm25_with_queries": BM25().fit(with_queries),
    }
    counts = np.asarray(run.dataset.item_counts, np.float32)

    def ranked(scores_of: Callable[[list[str]], Float[np.ndarray, "q v"]]) -> Ranks:
        def of_pairs(pairs: slice, seen_rows: np.ndarray, seen_items: np.ndarray) -> Ranks:
            scores = scores_of([table.texts[query] for query in asked.query_ids[pairs]])
            return rank_targets(scores, asked.item_ids[pairs], seen_rows, seen_items)

        return _in_chunks(of_pairs, table, asked)

    found = {name: ranked(index.scores) for name, index in indices.items()}
    return found | {"popularity": ranked(lambda texts: np.tile(counts, (len(texts), 1)))}


def _in_chunks(
    rank: Callable[[slice, np.ndarray, np.ndarray], Ranks], table: QueryTable, asked: TextQueries
) -> Ranks:
    """Ranks of all pairs; `rank` is handed some of them, and what is left out: their rows and the items."""
    everything = TextQueries(token_ids=table.token_ids, query_ids=table.query_ids, item_ids=table.item_ids)
    answers = everything.answers()
    found = []
    for start in range(0, len(asked.item_ids), PAIRS_AT_ONCE):
        pairs = slice(start, start + PAIRS_AT_ONCE)
        others = answers[asked.query_ids[pairs]]
        rows, columns = np.nonzero((others > 0) & (others != asked.item_ids[pairs, None]))
        found.append(rank(pairs, rows.astype(np.int32), others[rows, columns]))
    return np.concatenate(found)


def _item_texts(run: Run) -> list[str]:
    """What the text encoder reads of items 1, 2, ..., before it is cut into word pieces."""
    directory = run.dataset.directory
    assert directory is not None, "queries come with a directory"
    return [
        text or ""
        for text in pq.read_table(directory / "items.parquet", columns=["text"])["text"].to_pylist()
    ]


def _of_part(
    asked: TextQueries, ranks: Mapping[str, Ranks], chosen: np.ndarray, config: EvaluationConfig
) -> dict[str, Any]:
    queries, places = np.unique(asked.query_ids[chosen], return_inverse=True)
    sizes = np.bincount(places)
    systems = {}
    for name, of_system in ranks.items():
        of_pairs = per_user_metrics(of_system[chosen], config.ks)
        values = {metric: np.bincount(places, column) / sizes for metric, column in of_pairs.items()}
        systems[name] = with_intervals(values, **config.draws)
    return {"num_queries": len(queries), "num_pairs": int(chosen.sum()), "systems": systems}
