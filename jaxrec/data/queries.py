"""Queries: texts that items were found by, or tagged with; read beside the events, split, and kept with the data.

A query is a text without regard to case and outer spaces, and a pair is a query and an item that answers it. Words are
held out before pairs are: a query with a held-out word is in no part of training, so that what is asked with it is
asked in words that the model has never seen as a query.

Q = queries, T = tokens of a query, P = pairs.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int32

from jaxrec.core.queries import TextQueries
from jaxrec.data.config import QueryConfig
from jaxrec.data.ingest import UNREADABLE, set_aside
from jaxrec.data.quarantine import Quarantine
from jaxrec.data.sources import TableFiles
from jaxrec.data.text import WordPieces
from jaxrec.data.validate import RowCheck, as_text, is_text, parse_ids

__all__ = ["KINDS", "PARTS", "QueryTable", "load_queries", "open_queries", "read_queries", "write_queries"]

PARTS = ("train", "validation", "test")
KINDS = ("known", "new", "new_words")
_PAIRS_FILE, _TOKENS_FILE = "queries.parquet", "query_tokens.npy"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class QueryTable:
    """All queries of a prepared dataset with their pairs.

    Attributes:
      texts: of the queries, rising.
      token_ids: their word pieces; 0 = padding.
      query_ids, item_ids, parts: of each pair, by rising query and item; a part is an index into `PARTS`.
    """

    texts: Sequence[str]
    token_ids: Int32[np.ndarray, "q t"]
    query_ids: Int32[np.ndarray, " p"]
    item_ids: Int32[np.ndarray, " p"]
    parts: Int32[np.ndarray, " p"]

    def pairs(self, part: str) -> TextQueries:
        """The pairs of one part; queries keep their numbers."""
        chosen = self.parts == PARTS.index(part)
        return TextQueries(
            token_ids=self.token_ids, query_ids=self.query_ids[chosen], item_ids=self.item_ids[chosen]
        )

    def kinds(self) -> Int32[np.ndarray, " q"]:
        """Of each query, an index into `KINDS`: asked in training, new in known words, or with a word that is new."""
        trained = np.zeros(len(self.texts), bool)
        trained[self.pairs("train").query_ids] = True
        known = {
            word for text, there in zip(self.texts, trained, strict=True) if there for word in text.split()
        }
        new_words = np.array([not known.issuperset(text.split()) for text in self.texts], bool)
        return np.where(trained, 0, np.where(new_words, 2, 1)).astype(np.int32)


def open_queries(path: Path, config: QueryConfig) -> TableFiles:
    """The table that the config names.

    Raises:
      ValueError: there is no such file beside the events, or it lacks a column.
    """
    file = (path if path.is_dir() else path.parent) / config.file
    if not file.is_file():
        raise ValueError(
            f"data.queries.file={config.file!r}: there is no {file}; name a Parquet or CSV file beside the events, or "
            "set data.queries to none."
        )
    table = TableFiles((file,))
    for field in ("text", "item"):
        if getattr(config, field) not in table.schema.names:
            raise ValueError(
                f"data.queries.{field}={getattr(config, field)!r} is no column of {file}, which has "
                f"{', '.join(table.schema.names)}."
            )
    return table


def read_queries(
    table: TableFiles, config: QueryConfig, item_ids: dict[Any, int], keys: pa.Array, quarantine: Quarantine
) -> tuple[set[tuple[str, int]], dict[str, int]]:
    """The distinct pairs `(query, item id)` of items that have events, and counts for the statistics.

    Args:
      item_ids: by the items' own ids, which are `keys`.
    """
    pairs: set[tuple[str, int]] = set()
    counts = {"rows": 0, "unknown_items": 0, "repeated": 0}
    id_type = "string" if pa.types.is_string(keys.type) else "int64"
    for part in table.batches([config.text, config.item]):
        counts["rows"] += part.batch.num_rows + len(part.unreadable)
        source = f"queries:{part.source}"
        for row, line in part.unreadable:
            quarantine.add(source, row, UNREADABLE, line)
        check = RowCheck(part.batch.num_rows)
        column = part.batch.column(config.text)
        if not is_text(column.type):
            raise ValueError(f"{table.where}: {config.text} is of type {column.type}; queries are text.")
        texts, unreadable = as_text(column)
        check.flag(unreadable, f"{config.text} is not UTF-8")
        cleaned = [" ".join((text or "").lower().split()) for text in texts.to_pylist()]
        check.flag(np.array([not text for text in cleaned], bool), f"{config.text} is empty")
        ids = parse_ids(part.batch.column(config.item), config.item, id_type, check)
        set_aside(part, check, source, quarantine)
        for row, (text, key) in enumerate(zip(cleaned, ids.tolist(), strict=True)):
            if check.bad[row]:
                continue
            item_id = item_ids.get(key)
            if item_id is None:
                counts["unknown_items"] += 1
            elif (text, item_id) in pairs:
                counts["repeated"] += 1
            else:
                pairs.add((text, item_id))
    return pairs, counts


def write_queries(
    directory: Path, config: QueryConfig, pairs: set[tuple[str, int]], pieces: WordPieces
) -> dict[str, int]:
    """`queries.parquet` and `query_tokens.npy`, of queries that have a word piece; returns the pairs of each part.

    Raises:
      ValueError: no pair is left to train on.
    """
    texts = sorted({text for text, _ in pairs})
    tokens = np.concatenate([np.zeros((0, pieces.max_tokens), np.int32), *pieces.tokens(texts)])
    readable = tokens[:, 0] != 0
    tokens, texts = tokens[readable], [text for text, there in zip(texts, readable, strict=True) if there]
    kept = set(texts)
    ordered = sorted(pair for pair in pairs if pair[0] in kept)
    parts = [_part(text, item_id, config) for text, item_id in ordered]
    if "train" not in parts:
        raise ValueError(
            f"data.queries.file={config.file!r}: {len(ordered)} pairs of a query and an item, and none is left to "
            "train on; lower held_out_words and held_out_pairs, or set data.queries to none."
        )
    table = pa.table(
        {
            "query": pa.array([text for text, _ in ordered], pa.string()),
            "item": pa.array([item_id for _, item_id in ordered], pa.int32()),
            "part": pa.array(parts, pa.string()),
        }
    )
    pq.write_table(table, directory / _PAIRS_FILE, compression="zstd")
    longest = int((tokens != 0).sum(1).max())
    np.save(directory / _TOKENS_FILE, tokens[:, :longest], allow_pickle=False)
    return {part: parts.count(part) for part in PARTS} | {"queries": len(texts)}


def load_queries(directory: Path) -> QueryTable | None:
    """What `write_queries` left; None where the dataset has no queries."""
    if not (directory / _PAIRS_FILE).is_file():
        return None
    table = pq.read_table(directory / _PAIRS_FILE)
    texts, query_ids = np.unique(np.array(table["query"].to_pylist(), object), return_inverse=True)
    return QueryTable(
        texts=texts.tolist(),
        token_ids=np.load(directory / _TOKENS_FILE, allow_pickle=False),
        query_ids=query_ids.astype(np.int32),
        item_ids=table["item"].to_numpy().astype(np.int32),
        parts=np.array([PARTS.index(part) for part in table["part"].to_pylist()], np.int32),
    )


def _part(text: str, item_id: int, config: QueryConfig) -> str:
    """By hashes of the words and of the pair, so that no row moves another."""
    words = min(_uniform(word) for word in text.split())
    if words < config.held_out_words:
        return "test" if words < config.held_out_words / 2 else "validation"
    pair = _uniform(f"{item_id}\n{text}")
    if pair < config.held_out_pairs:
        return "test" if pair < config.held_out_pairs / 2 else "validation"
    return "train"


def _uniform(text: str) -> float:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
