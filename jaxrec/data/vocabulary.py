"""Vocabularies that grow while the events stream by: the user's own ids to small integers.

Codes are given in order of first appearance and mean nothing outside one run of prepare; the ids that leave it
(`items.parquet`, `users.parquet`) are sorted, so the order of the rows in the source does not show.

Letters: E events of a record batch, V distinct keys, W keys of one data set.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64

__all__ = ["KeyIndex", "known_ids"]


class KeyIndex:
    """Keys (int64, uint64 or strings) to codes 0 .. V - 1. Memory grows with the distinct keys only."""

    def __init__(self) -> None:
        self._kind = ""
        self._sorted = np.zeros(0, np.int64)
        self._codes = np.zeros(0, np.int64)
        self._by_text: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._by_text) or len(self._sorted)

    def add(self, keys: np.ndarray | pa.Array) -> Int64[np.ndarray, " e"]:
        """The codes of the keys; new keys get new codes."""
        if isinstance(keys, pa.Array):
            return self._add_text(keys)
        if not self._kind:
            self._kind = str(keys.dtype)
            self._sorted = self._sorted.astype(keys.dtype)
        distinct, inverse = np.unique(keys, return_inverse=True)
        known = self._positions(distinct)
        new = distinct[known < 0]
        if len(new):
            at = np.searchsorted(self._sorted, new)
            codes = np.arange(len(self._sorted), len(self._sorted) + len(new))
            self._sorted = np.insert(self._sorted, at, new)
            self._codes = np.insert(self._codes, at, codes)
            known = self._positions(distinct)
        return self._codes[known][inverse]

    def _positions(self, keys: np.ndarray) -> Int64[np.ndarray, " v"]:
        """Where the keys stand among the sorted ones, -1 for those that do not."""
        if not len(self._sorted):
            return np.full(len(keys), -1)
        at = np.minimum(np.searchsorted(self._sorted, keys), len(self._sorted) - 1)
        return np.where(self._sorted[at] == keys, at, -1)

    def _add_text(self, keys: pa.Array) -> Int64[np.ndarray, " e"]:
        self._kind = "string"
        encoded = pc.dictionary_encode(keys)
        table = self._by_text
        codes = [table.setdefault(text, len(table)) for text in encoded.dictionary.to_pylist()]
        return np.array(codes, np.int64)[np.asarray(encoded.indices)]

    def ranked(self) -> tuple[pa.Array, Int64[np.ndarray, " v"]]:
        """`(keys ascending, rank of each code)`. Strings are in order of their code points."""
        if self._kind != "string":
            rank = np.zeros(len(self._codes), np.int64)
            rank[self._codes] = np.arange(len(self._codes))
            return pa.array(self._sorted), rank
        texts = sorted(self._by_text)
        rank = np.zeros(len(texts), np.int64)
        rank[[self._by_text[text] for text in texts]] = np.arange(len(texts))
        return pa.array(texts, pa.string()), rank

    def keys_by_code(self) -> list[int | str]:
        """The keys in the order of their codes."""
        if self._kind == "string":
            return list(self._by_text)
        return self._sorted[np.argsort(self._codes)].tolist()


def known_ids(keys: np.ndarray, known: np.ndarray) -> Int64[np.ndarray, " w_plus_1"]:
    """For each id of one data set (0 = padding) the id of the same key in another, 0 where that does not know it.

    Args:
      keys: of the ids 1 .. W; numbers or strings.
      known: the other data set's; where one has numbers and the other strings, numbers count as they are written.
    """
    wanted, others = pa.array(keys), pa.array(known)
    ids = np.zeros(len(keys) + 1, np.int64)
    if pa.types.is_integer(wanted.type) != pa.types.is_integer(others.type):
        wanted, others = (one.cast(pa.string()) for one in (wanted, others))
    if wanted.type != others.type:  # int64 and uint64: no integer type holds both
        wanted, others = (one.cast(pa.decimal128(20)) for one in (wanted, others))
    ids[1:] = pc.fill_null(pc.index_in(wanted, value_set=others), -1).to_numpy() + 1
    return ids
