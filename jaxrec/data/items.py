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

from jaxrec.data.columns import ABSENT, ColumnMap, find_item_column, require, text_columns
from jaxrec.data.ingest import UNREADABLE, set_aside
from jaxrec.data.quarantine import Quarantine
from jaxrec.data.sources import Table
from jaxrec.data.text import WordPieces
from jaxrec.data.validate import RowCheck, as_text, cell, is_text, parse_ids

__all__ = ["FEATURES", "Catalogue", "ItemCells", "ItemColumns", "read_catalogue", "write_items"]

FEATURES = "features"  # the column of `items.parquet`


@dataclass
class Catalogue:
    """Title, categories, text and features of each item that occurs in an event, by rank of its key."""

    titles: list[str]
    categories: list[tuple[str, ...]]
    texts: list[str]
    features: list[tuple[str, ...]]
    rows_read: int = 0
    never_seen: int = 0
    repeated: int = 0
    without_entry: int = 0


@dataclass(frozen=True)
class ItemColumns:
    """Which columns of an items table say what, "-" where there is none, and where categories are cut."""

    item: str
    title: str
    category: str
    text: tuple[str, ...]
    features: tuple[str, ...]
    separator: str

    @classmethod
    def find(cls, columns: ColumnMap, table: Table) -> "ItemColumns":
        """As the map says, else by the usual names.

        Raises:
          ValueError: there is no item column, or the map names a column that the table lacks.
        """
        names = table.schema.names
        item = find_item_column(columns, "item", names, table.where)
        if item == ABSENT:
            raise ValueError(
                f"{table.where} has no item column among {', '.join(names)}; name it with columns.item."
            )
        category = find_item_column(columns, "categories", names, table.where)
        for name in columns.features:
            require(name, "features", names, table.where)
        return cls(
            item=item,
            title=find_item_column(columns, "title", names, table.where),
            category=category,
            text=text_columns(columns, names, table.where),
            features=columns.features,
            separator=columns.category_separator or _guess_separator(table, category),
        )

    @property
    def names(self) -> list[str]:
        """Those that there are, each once."""
        names = (self.item, self.title, self.category, *self.text, *self.features)
        return list(dict.fromkeys(name for name in names if name != ABSENT))


def read_catalogue(
    table: Table | None, columns: ColumnMap, keys: pa.Array, quarantine: Quarantine
) -> Catalogue:
    """Read the items table and keep what belongs to `keys` (ascending).

    Raises:
      ValueError: the table's ids are of another type than those of the events, or a column is missing.
    """
    size = len(keys)
    catalogue = Catalogue([""] * size, [()] * size, [""] * size, [()] * size)
    if table is None:
        return catalogue
    found = ItemColumns.find(columns, table)
    position = {key: rank for rank, key in enumerate(keys.to_pylist())}
    seen: set[Any] = set()
    id_type = "int64" if not pa.types.is_string(keys.type) else "string"
    for part in table.batches(found.names):
        catalogue.rows_read += part.batch.num_rows + len(part.unreadable)
        source = f"items:{part.source}"
        for row, line in part.unreadable:
            quarantine.add(source, row, UNREADABLE, line)
        check = RowCheck(part.batch.num_rows)
        ids = _ids(part.batch.column(found.item), found.item, id_type, table, check)
        set_aside(part, check, source, quarantine)
        cells = ItemCells(found, part.batch)
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
            catalogue.titles[rank] = cells.title(row)
            catalogue.categories[rank] = cells.categories(row)
            catalogue.texts[rank] = cells.text(row)
            catalogue.features[rank] = cells.features(row)
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
        self._values = [cell(value) for value in (as_text(column)[0] if is_text(column.type) else column)]
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


class ItemCells:
    """What a batch of an items table says of each row."""

    def __init__(self, columns: ItemColumns, batch: pa.RecordBatch):
        self._columns = columns
        self._of = {
            name: _Cells(batch.column(name), columns.separator)
            for name in columns.names
            if name != columns.item
        }

    def title(self, row: int) -> str:
        """The item's title, "" where it has none."""
        title = self._columns.title
        return "" if title == ABSENT else " ".join(self._of[title][row])

    def categories(self, row: int) -> tuple[str, ...]:
        """The item's categories."""
        category = self._columns.category
        return () if category == ABSENT else self._of[category].split(row)

    def text(self, row: int) -> str:
        """The words that become tokens."""
        # Genres read "Comedy, Drama" and not "Comedy|Drama": closer to what the word pieces were made for.
        words = [
            ", ".join(self.categories(row) if name == self._columns.category else self._of[name][row])
            for name in self._columns.text
        ]
        return ". ".join(word for word in words if word)

    def features(self, row: int) -> tuple[str, ...]:
        """`column=value` for each value; what comes from prepared data is that already."""
        return tuple(
            value if name == FEATURES else f"{name}={value}"
            for name in self._columns.features
            for value in self._of[name][row]
        )


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
            FEATURES: pa.array([list(catalogue.features[rank]) for rank in picked], pa.list_(pa.string())),
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
