"""Sources of events: Parquet and CSV files in a directory, streamed as Arrow record batches.

A source yields what the files hold and judges nothing but whether a row can be read at all; meaning is the column
map's business and validity that of `validate`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from jaxtyping import Int64

from jaxrec.data.columns import ABSENT, ColumnMap

__all__ = ["DirectorySource", "Source", "SourceBatch", "Table", "TableFiles", "file_digest", "open_directory"]

_BATCH_ROWS = 1 << 17
_CSV_BLOCK_BYTES = 1 << 22
_CSV_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
_SUFFIXES = (".parquet", *_CSV_SUFFIXES)


@dataclass(frozen=True)
class SourceBatch:
    """Rows of one file, where they stand in it, and the lines before them that are no rows."""

    source: str
    rows: Int64[np.ndarray, " e"]
    batch: pa.RecordBatch
    unreadable: Sequence[tuple[int, str]] = ()


class Table(Protocol):
    """Rows that can be streamed more than once, always in the same order."""

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns."""
        ...

    @property
    def has_text_ids(self) -> bool:
        """Whether ids are text of which it is to be found out whether they are numbers."""
        ...

    @property
    def where(self) -> str:
        """What a person would call it."""
        ...

    def estimated_rows(self) -> int:
        """About how many rows there are."""
        ...

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[SourceBatch]:
        """The rows, `columns` of them only."""
        ...

    def digest(self) -> str:
        """A hash of the content."""
        ...


class Source(Protocol):
    """What prepare needs of any source."""

    @property
    def name(self) -> str:
        """What the data set is called."""
        ...

    @property
    def columns(self) -> ColumnMap:
        """What its columns mean, as far as that is known before its files are read."""
        ...

    @property
    def domains(self) -> tuple[str, ...]:
        """Catalogues that it joins, whose ids are `domain:id`; () = it is one."""
        ...

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of items that are ranked apart, whose ids are `kind:id`; () = all are of one kind."""
        ...

    def events(self) -> Table:
        """The events, in their own order."""
        ...

    def items(self) -> Table | None:
        """The items with their text, if any."""
        ...

    def users(self) -> Table | None:
        """The users, if any."""
        ...


@dataclass(frozen=True)
class TableFiles:
    """One table in one or more files of the same kind and columns."""

    paths: tuple[Path, ...]
    schema: pa.Schema = field(init=False)
    has_text_ids: bool = field(init=False)

    def __post_init__(self) -> None:
        kinds = {path.name.endswith(_CSV_SUFFIXES) for path in self.paths}
        if len(kinds) != 1:
            raise ValueError(f"{self.where} mixes CSV and Parquet files; keep one kind in a table.")
        object.__setattr__(self, "has_text_ids", kinds.pop())
        schemas = [_csv_schema(path) if self.has_text_ids else _parquet_schema(path) for path in self.paths]
        object.__setattr__(self, "schema", schemas[0])
        for path, schema in zip(self.paths, schemas, strict=True):
            if not schema.equals(schemas[0]):
                raise ValueError(
                    f"{path} has the columns {_describe(schema)}, but {self.paths[0]} has {_describe(schemas[0])}; "
                    "the files of one table must agree."
                )

    @property
    def where(self) -> str:
        """The files as a person would name them."""
        return (
            str(self.paths[0])
            if len(self.paths) == 1
            else f"{self.paths[0].parent} ({len(self.paths)} files)"
        )

    def estimated_rows(self) -> int:
        """Exact for Parquet, a guess from the size for CSV."""
        if self.has_text_ids:
            packed = [4 if path.name.endswith(".gz") else 1 for path in self.paths]
            return sum(p.stat().st_size * k for p, k in zip(self.paths, packed, strict=True)) // 16 + 1
        return sum(pq.read_metadata(path).num_rows for path in self.paths)

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[SourceBatch]:
        """The rows, in order, `columns` of them only.

        Raises:
          ValueError: a file is damaged.
        """
        for path in self.paths:
            stream = _csv_batches(path, columns) if self.has_text_ids else _parquet_batches(path, columns)
            try:
                yield from stream
            except (pa.ArrowException, OSError) as error:
                raise _unreadable(path, error) from error

    def digest(self) -> str:
        """A hash of the content, whatever the files are called."""
        return hashlib.sha256("".join(file_digest(path) for path in self.paths).encode()).hexdigest()


@dataclass(frozen=True)
class DirectorySource:
    """Files laid out as docs/data.md says: `events`, and where there are any `items` and `users`."""

    name: str
    columns: ColumnMap
    event_files: TableFiles
    item_files: TableFiles | None
    user_files: TableFiles | None
    domains: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()

    def events(self) -> TableFiles:
        """The events, in the order of the files."""
        return self.event_files

    def items(self) -> TableFiles | None:
        """The items with their text, if the directory has any."""
        return self.item_files

    def users(self) -> TableFiles | None:
        """The users, if the directory has any."""
        return self.user_files


def open_directory(path: Path, name: str, columns: ColumnMap) -> DirectorySource:
    """A directory, or one file of events.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      ValueError: no events are found there, or a file cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"data.path={str(path)!r} does not exist; give a directory, a file, or tfds:NAME."
        )
    root = path if path.is_dir() else path.parent
    events = (path,) if path.is_file() else _find_table(root, "events", columns.events)
    if not events:
        raise ValueError(_no_events(root))
    tables: list[TableFiles | None] = []
    for part in ("items", "users"):
        wanted = getattr(columns, part)
        found = _find_table(root, part, wanted) if path.is_dir() or wanted else ()
        tables.append(TableFiles(found) if found else None)
    return DirectorySource(name, columns, TableFiles(events), tables[0], tables[1])


def _find_table(root: Path, part: str, wanted: str) -> tuple[Path, ...]:
    """The files of a table: those the map names (a file, a folder or a pattern), or the usual ones."""
    if wanted == ABSENT:
        return ()
    if wanted:
        place = root / wanted
        if place.is_file():
            return (place,)
        found = _files_in(place) if place.is_dir() else tuple(sorted(root.glob(wanted)))
        if not found:
            raise ValueError(
                f"columns.{part}={wanted!r} matches no file under {root}; give a file, folder or pattern."
            )
        return found
    for suffix in _SUFFIXES:
        if (root / f"{part}{suffix}").is_file():
            return (root / f"{part}{suffix}",)
    return _files_in(root / part) if (root / part).is_dir() else ()


def _files_in(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(path for path in folder.iterdir() if path.name.endswith(_SUFFIXES)))


def _no_events(root: Path) -> str:
    names = ", ".join(sorted(path.name for path in root.iterdir())) or "nothing"
    if (root / "impressions.parquet").is_file():
        return (
            f"{root} holds impressions (shown items and outcomes without user ids), and no events to build histories "
            f"from; a source needs events.parquet or events.csv with a user, an item and a time. Found: {names}."
        )
    return (
        f"{root} has no events: events.parquet, events.csv or a folder events/ is needed, or "
        f"--data.columns.events=FILE. Found: {names}."
    )


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _describe(schema: pa.Schema) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in zip(schema.names, schema.types, strict=True))


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} cannot be read: {str(error).splitlines()[0]}; is it complete, and what its name says?"
    )


def _unique_names(path: Path, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ValueError(f"{path} has more than one column called {', '.join(twice)}; rename all but one.")


def _parquet_schema(path: Path) -> pa.Schema:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes); a Parquet file with a schema and rows is needed.")
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error
    _unique_names(path, schema.names)
    return pa.schema(
        [(name, _plain_type(kind)) for name, kind in zip(schema.names, schema.types, strict=True)]
    )


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """The type without its storage: a category is what its values are."""
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    return pa.string() if pa.types.is_string_view(kind) else kind


def _plain_batch(batch: pa.RecordBatch) -> pa.RecordBatch:
    kinds = [_plain_type(kind) for kind in batch.schema.types]
    if kinds == batch.schema.types:
        return batch
    columns = [column.cast(kind) for column, kind in zip(batch.columns, kinds, strict=True)]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _parquet_batches(path: Path, columns: Sequence[str] | None) -> Iterator[SourceBatch]:
    start = 0
    # Without pre-buffering only the pages of one batch are in memory, however large the row groups are.
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        wanted = None if columns is None else list(columns)
        for batch in file.iter_batches(_BATCH_ROWS, columns=wanted, use_threads=False):
            yield SourceBatch(path.name, np.arange(start, start + batch.num_rows), _plain_batch(batch))
            start += batch.num_rows


def _csv_options(path: Path) -> tuple[pacsv.ReadOptions, pacsv.ParseOptions]:
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    read = pacsv.ReadOptions(block_size=_CSV_BLOCK_BYTES, use_threads=False)
    return read, pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True)


def _csv_schema(path: Path) -> pa.Schema:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes); a CSV file with a header line and rows is needed.")
    read, parse = _csv_options(path)
    parse.invalid_row_handler = lambda row: "skip"
    # The first block is converted while the file is opened: as bytes, no cell of it can fail.
    with pa.input_stream(path, compression="detect") as stream:
        header = stream.read(_CSV_BLOCK_BYTES).split(b"\n", 1)[0]
    try:
        names = pacsv.read_csv(pa.BufferReader(header + b"\n"), read, parse).column_names
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error
    _unique_names(path, names)
    # Every cell stays what it is written as: a guess such as "a number with 20 digits is a float" would merge ids.
    return pa.schema([(name, pa.binary()) for name in names])


def _csv_batches(path: Path, columns: Sequence[str] | None) -> Iterator[SourceBatch]:
    schema = _csv_schema(path)
    skipped: list[tuple[int, str]] = []

    def note(row: pacsv.InvalidRow) -> str:
        skipped.append((row.number - 2, row.text))  # lines count from 1, and the first is the header
        return "skip"

    read, parse = _csv_options(path)
    parse.invalid_row_handler = note
    convert = pacsv.ConvertOptions(
        column_types=schema,
        include_columns=None if columns is None else list(columns),
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    start = 0
    with pa.input_stream(path, compression="detect") as stream:
        for batch in pacsv.open_csv(stream, read, parse, convert):
            # The reader may be a block ahead: only lines before the end of this batch are reported with it.
            candidates = np.arange(start, start + batch.num_rows + len(skipped))
            rows = np.setdiff1d(candidates, [row for row, _ in skipped])[: batch.num_rows]
            end = int(rows[-1]) + 1 if len(rows) else start
            yield SourceBatch(path.name, rows, batch, [one for one in skipped if one[0] < end])
            skipped[:] = [one for one in skipped if one[0] >= end]
            start = end
    if skipped:
        empty = pa.RecordBatch.from_pylist([], schema=schema)
        if columns is not None:
            empty = empty.select(list(columns))
        yield SourceBatch(path.name, np.zeros(0, np.int64), empty, skipped)
