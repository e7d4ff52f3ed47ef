"""The catalogue: which items there are, what they are called, and the tokens of their text.

Letters: N items; V distinct item keys.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int64

from jaxrec.data.columns import ABSENT, ColumnMap, find_item_column, text_columns
from jaxrec.data.ingest import UNREADABLE, set_aside
from jaxrec.data.quarantine import Quarantine
from jaxrec.data.sources import Table
from jaxrec.data.text import WordPieces
from jaxrec.data.validate import RowCheck, as_text, is_text, parse_ids

__all__ = ["Catalogue", "read_catalogue", "write_items"]


@dataclass
class Catalogue:
    """Title, categories and text of each item that occurs in an event, by rank of its key."""

    titles: list[str]
    categories: list[tuple[str, ...]]
    texts: list[str]
    rows_read: int = 0
    never_seen: int = 0
    repeated: int = 0
    without_entry: int = 0


def read_catalogue(
    table: Table | None, columns: ColumnMap, keys: pa.Array, quarantine: Quarantine
) -> Catalogue:
    """Read the items table and keep what belongs to `keys` (ascending).

    Raises:
      ValueError: the table's ids are of another type than those of the events, or a column is missing.
    """
    size = len(keys)
    catalogue = Catalogue([""] * size, [()] * size, [""] * size)
    if table is None:
        return catalogue
    names = table.schema.names
    item = find_item_column(columns, "item", names, table.where)
    if item == ABSENT:
        raise ValueError(
            f"{table.where} has no item column among {', '.join(names)}; name it with columns.item."
        )
    title = find_item_column(columns, "title", names, table.where)
    category = find_item_column(columns, "categories", names, table.where)
    text = text_columns(columns, names, table.where)
    separator = columns.category_separator or _guess_separator(table, category)
    wanted = list(dict.fromkeys(name for name in (item, title, category, *text) if name != ABSENT))
    position = {key: rank for rank, key in enumerate(keys.to_pylist())}
    seen: set[Any] = set()
    id_type = "int64" if not pa.types.is_string(keys.type) else "string"
    for part in table.batches(wanted):
        catalogue.rows_read += part.batch.num_rows + len(part.unreadable)
        source = f"items:{part.source}"
        for row, line in part.unreadable:
            quarantine.add(source, row, UNREADABLE, line)
        check = RowCheck(part.batch.num_rows)
        ids = _ids(part.batch.column(item), item, id_type, table, check)
        set_aside(part, check, source, quarantine)
        columns_of = {name: _Cells(part.batch.column(name), separator) for name in wanted if name != item}
        for row, key in enumerate(ids):
            if check.bad[row]:
                continue
            if key in seen:
                catalogue.repeated += 1
                continue
            seen.add(key)
            rank = position.get(key)
            if rank is None:
                catalogue.never_seen += 1
                continue
            if title != ABSENT:
                catalogue.titles[rank] = " ".join(columns_of[title][row])
            if category != ABSENT:
                catalogue.categories[rank] = columns_of[category].split(row)
            # Genres read "Comedy, Drama" and not "Comedy|Drama": closer to what the word pieces were made for.
            words = [
                ", ".join((columns_of[n].split if n == category else columns_of[n].__getitem__)(row))
                for n in text
            ]
            catalogue.texts[rank] = ". ".join(word for word in words if word)
    catalogue.without_entry = size - sum(key in seen for key in position)
    return catalogue


def _ids(column: pa.Array, name: str, id_type: str, table: Table, check: RowCheck) -> list[Any]:
    textual = is_text(column.type)
    if textual and id_type == "int64" and not table.has_text_ids:
        raise ValueError(
            f"{table.where}: {name} holds strings, but the events' ids are integers; make both of one type, or set "
            "columns.id_type to that type."
        )
    ids = parse_ids(column, name, id_type, check)
    return ids.to_pylist() if isinstance(ids, pa.Array) else ids.tolist()


def _guess_separator(table: Table, column: str) -> str:
    """`|` or `,`, whichever the column uses; a column of several words without either is split at spaces."""
    if column == ABSENT or not (is_text(table.schema.field(column).type)):
        return ""
    found = {"|": False, ",": False}
    for part in table.batches([column]):
        text, _ = as_text(part.batch.column(column))
        for mark in found:
            found[mark] |= bool(pc.any(pc.match_substring(text, mark)).as_py())
        if found["|"]:
            break
    return next((mark for mark, there in found.items() if there), " ")


class _Cells:
    """A column of any type, one tuple of words a row: a list as it is, a string whole or split."""

    def __init__(self, column: pa.Array, separator: str):
        self._values = (as_text(column)[0] if is_text(column.type) else column).to_pylist()
        self._separator = separator

    def __getitem__(self, row: int) -> tuple[str, ...]:
        value = self._values[row]
        if value is None:
            return ()
        if isinstance(value, list):
            return tuple(str(one) for one in value if one is not None)
        return (str(value).strip(),) if str(value).strip() else ()

    def split(self, row: int) -> tuple[str, ...]:
        """The words of one cell, cut at the separator."""
        words = self[row]
        if not self._separator or len(words) != 1:
            return words
        return tuple(word.strip() for word in words[0].split(self._separator) if word.strip())


def write_items(
    directory: Path,
    keys: pa.Array,
    order: Int64[np.ndarray, " n"],
    train_counts: Int64[np.ndarray, " n"],
    catalogue: Catalogue,
    pieces: WordPieces,
) -> int:
    """`items.parquet` and `item_tokens.npy`; `order[i]` is the key rank of item id `i + 1`. Returns items with text."""
    picked = order.tolist()
    table = pa.table(
        {
            "item_id": keys.take(pa.array(order)),
            "title": pa.array([catalogue.titles[rank] for rank in picked], pa.string()),
            "categories": pa.array(
                [list(catalogue.categories[rank]) for rank in picked], pa.list_(pa.string())
            ),
            "train_count": pa.array(train_counts[order], pa.int64()),
            "text": pa.array([catalogue.texts[rank] for rank in picked], pa.string()),
        }
    )
    pq.write_table(table, directory / "items.parquet", compression="zstd")
    tokens = np.zeros((len(picked) + 1, pieces.max_tokens), np.int32)
    at = 1
    for block in pieces.tokens([catalogue.texts[rank] for rank in picked]):
        tokens[at : at + len(block)] = block
        at += len(block)
    np.save(directory / "item_tokens.npy", tokens, allow_pickle=False)
    return int((tokens[:, 0] != 0).sum())
