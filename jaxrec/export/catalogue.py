"""The catalogue and the users of a bundle: between the user's own ids and those of the model.

N = items, U = users.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ITEMS_FILE, USERS_FILE, HISTORIES_FILE = "items.parquet", "users.parquet", "histories.parquet"

Key = int | str


def is_number(key: str) -> bool:
    """Whether a key is a whole number of 64 bits, as it would be written: 7, and neither 007 nor a full-width 7."""
    digits = key.removeprefix("-")
    # As many digits as int reads fast.
    plain = digits.isascii() and digits.isdecimal() and len(digits) < 20
    return plain and str(int(key)) == key and -(2**63) <= int(key) < 2**63


class Vocabulary:
    """The own ids (numbers or strings) of ids 1, 2, ...; 0 stands for those that are not known."""

    def __init__(self, keys: pa.Array):
        """`keys[i]` is the own id of id i + 1.

        Raises:
          ValueError: they are neither whole numbers nor strings.
        """
        if not (pa.types.is_integer(keys.type) or pa.types.is_string(keys.type)):
            raise ValueError(f"ids are of type {keys.type}; they must be whole numbers or strings.")
        self.keys = keys
        self.is_text = pa.types.is_string(keys.type)
        self._list: list[Key] = keys.to_pylist()
        self._ids = {key: index for index, key in enumerate(self._list, start=1)}

    def __len__(self) -> int:
        return len(self._list)

    def id_of(self, key: Key) -> int:
        """The model's id; 0 = unknown."""
        return self._ids.get(key, 0)

    def own(self, key: Key) -> Key:
        """The key as it is kept here: numbers as text and texts as numbers are taken for what they say."""
        if self.is_text:
            return str(key)
        return int(key) if isinstance(key, str) and is_number(key) else key

    def key_of(self, index: int) -> Key:
        """The own id of id `index`, 1 or more."""
        return self._list[index - 1]

    @functools.cached_property
    def padding(self) -> Key:
        """An own id that nothing has: "" or -1 where those are free."""
        if self.is_text:
            free = ""
            while free in self._ids:
                free += "-"
            return free
        return -1 if -1 not in self._ids else min(key for key in self._list if isinstance(key, int)) - 1


class Catalogue:
    """The items of a bundle.

    Attributes:
      vocabulary: their own ids.
    """

    def __init__(self, table: pa.Table):
        """A table with the columns item_id, title, categories, train_count; row i is the item of id i + 1."""
        self.table = table
        self.vocabulary = Vocabulary(table["item_id"].combine_chunks())

    @classmethod
    def read(cls, directory: Path) -> "Catalogue":
        """From `items.parquet`."""
        return cls(pq.read_table(directory / ITEMS_FILE))

    @functools.cached_property
    def titles(self) -> list[str]:
        """By item id; "" where an item has none, and for padding."""
        return ["", *(title or "" for title in self.table["title"].to_pylist())]

    def ids_of(self, keys: Sequence[Key]) -> list[int]:
        """The model's ids; 0 = unknown."""
        return [self.vocabulary.id_of(key) for key in keys]


def write_histories(table: pa.Table, directory: Path) -> None:
    """Writes `histories.parquet`: `user_id`, and lists of `item_ids` and `seconds` (-1 = unknown), oldest first.

    For models that read labels also a list `labels`: those of the first event by behaviour, then those of the next one.
    """
    pq.write_table(table, directory / HISTORIES_FILE, compression="zstd")


def read_histories(directory: Path) -> pa.Table:
    """What `write_histories` wrote; no rows where a bundle has none."""
    path = directory / HISTORIES_FILE
    if path.is_file():
        return pq.read_table(path)
    return pa.schema(
        [
            ("user_id", pa.string()),
            ("item_ids", pa.list_(pa.string())),
            ("seconds", pa.list_(pa.int64())),
        ]
    ).empty_table()


def write_catalogue(table: pa.Table, directory: Path) -> None:
    """Writes `items.parquet`."""
    pq.write_table(table, directory / ITEMS_FILE, compression="zstd")


def write_users(keys: Any, directory: Path) -> None:
    """Writes `users.parquet`; row i is the user of id i + 1."""
    pq.write_table(
        pa.table({"user_id": pa.array(np.asarray(keys))}), directory / USERS_FILE, compression="zstd"
    )


def read_users(directory: Path) -> Vocabulary:
    """The users' own ids."""
    return Vocabulary(pq.read_table(directory / USERS_FILE)["user_id"].combine_chunks())
