"""Where rows go that cannot be used: one Parquet file with the file, the row, the reason and the row itself."""

import json
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["Quarantine"]

_SCHEMA = pa.schema(
    [("source", pa.string()), ("row", pa.int64()), ("reason", pa.string()), ("content", pa.string())]
)


class Quarantine:
    """Collects rows that are set aside, writes them in batches, and counts them by reason."""

    def __init__(self, path: Path, flush_rows: int = 10_000):
        self._writer = pq.ParquetWriter(path, _SCHEMA, compression="zstd")
        self._rows: list[dict[str, Any]] = []
        self._flush_rows = flush_rows
        self.counts: Counter[tuple[str, str]] = Counter()
        self.examples: dict[tuple[str, str], str] = {}

    def add(self, source: str, row: int, reason: str, content: object) -> None:
        """Set one row of `source` (table:file) aside; `row` counts from 0, without the header; -1 = not known."""
        text = (
            content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=_plain)
        )
        # A lone surrogate (from bytes that were no text) has no UTF-8 form, and this file must always be writable.
        text = text.encode("utf-8", "backslashreplace").decode()
        table = source.split(":")[0]  # of many part files, the report tells the sum
        self.counts[table, reason] += 1
        self.examples.setdefault((table, reason), text[:200])
        self._rows.append({"source": source, "row": row, "reason": reason, "content": text})
        if len(self._rows) >= self._flush_rows:
            self._flush()

    def summary(self) -> list[dict[str, Any]]:
        """One entry per table and reason, in a fixed order."""
        return [
            {"table": table, "reason": reason, "rows": rows, "example": self.examples[table, reason]}
            for (table, reason), rows in sorted(self.counts.items())
        ]

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=_SCHEMA))
            self._rows = []

    def __enter__(self) -> "Quarantine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self._writer.close()


def _plain(value: object) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
