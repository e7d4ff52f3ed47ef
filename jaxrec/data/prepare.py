"""Prepare: from rows of any source to a dataset that is read by user index.

The order of the work: (1) read, check and spool every row; (2) sort histories, bucket by bucket; (3) cut them by the
split, count the training events, and change these where an experiment asks for it; (4) number the items, tokenise their
text; (5) merge the users in order into ArrayRecord; (6) write the statistics and rename the whole into place. Memory
follows the number of users and items and the size of a bucket, not the number of events.
"""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxrec.data.bucket_sort import Sorted, cut_histories, merged_users, sort_buckets
from jaxrec.data.column_maps import COLUMN_MAPS
from jaxrec.data.columns import ABSENT, ColumnMap, ValueLabel, fill_from, resolve_events
from jaxrec.data.config import DataConfig, GlobalTime, LeaveOneOut
from jaxrec.data.history_writer import HistoryWriter
from jaxrec.data.ingest import Ingested, ingest
from jaxrec.data.items import Catalogue, read_catalogue, write_items
from jaxrec.data.quarantine import Quarantine
from jaxrec.data.queries import open_queries, read_queries, write_queries
from jaxrec.data.sources import Source, Table, TableFiles, file_digest, open_directory
from jaxrec.data.staging import staged_directory
from jaxrec.data.text import WordPieces
from jaxrec.data.tfds_movielens import open_tfds
from jaxrec.data.training_changes import falsify_events, remove_cold_items
from jaxrec.data.validate import RowCheck, parse_ids

__all__ = [
    "OtherDataError",
    "Progress",
    "embedded_path",
    "is_prepared",
    "open_source",
    "prepare",
    "prepared_fingerprint",
]

# Part of the fingerprint: raise it when the files or their meaning change.
FORMAT_VERSION = 2
# Above this share of events that repeat an item of their user, a seen item is taken for a sensible answer.
REPEATS_MEAN_NO_FILTER = 0.1
TFDS_PREFIX = "tfds:"

log = logging.getLogger(__name__)


Progress = Callable[[str, int, int], None]
"""`progress(stage, done, total)`; total 0 = unknown."""


def embedded_path() -> Path:
    """MovieLens-latest-small inside this package (GroupLens terms: research, non-commercial)."""
    return Path(str(resources.files("jaxrec.data") / "embedded" / "ml-latest-small"))


class OtherDataError(ValueError):
    """The data are not those that a run was trained on."""

    def __init__(self, what: str, found: str, expected: str):
        super().__init__(
            f"the run was trained on data of fingerprint {expected}, and {what} has {found} now. Bring the former data "
            "back, or take another --workdir for a run on these."
        )


def prepared_fingerprint(path: Path) -> str:
    """The fingerprint of the prepared dataset at `path`, "" where there is none."""
    try:
        statistics = json.loads((path / "statistics.json").read_text(encoding="utf-8"))
        return str(statistics["metadata"]["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def is_prepared(path: Path) -> bool:
    """Whether `path` is a directory that `prepare` wrote."""
    return bool(prepared_fingerprint(path))


def prepare(config: DataConfig, out: Path, *, progress: Progress | None = None, expected: str = "") -> None:
    """Read `config.path`, and leave a prepared dataset at `out`; one with the same fingerprint is kept as it is.

    Args:
      expected: the fingerprint that has to come out; "" = any. Of other data nothing is written.

    Raises:
      ValueError: the input cannot be used; the message names the file, the value and the remedy.
      FileNotFoundError: there is no input.
      FileExistsError: `out` holds something that `prepare` did not write.
      OSError: the disk is full; nothing half-written is left.
    """
    out = Path(out)
    report = progress or _silent
    if out.exists() and not is_prepared(out) and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(
            f"{out} exists and is no prepared dataset; choose another --out, or remove it: prepare replaces nothing "
            "that it did not write."
        )
    source = open_source(config)
    columns = _resolve(config, source)
    pieces = WordPieces(config.text)
    queries = _open_queries(config)
    fingerprint = _fingerprint(config, columns, source, pieces, queries)
    if prepared_fingerprint(out) == fingerprint:
        log.info("%s already holds this dataset (fingerprint %s)", out, fingerprint)
        return
    if expected not in ("", fingerprint):
        raise OtherDataError(source.name, fingerprint, expected)
    with staged_directory(out) as staging:
        _prepare_into(staging, config, source, columns, pieces, queries, fingerprint, report)


def _silent(stage: str, done: int, total: int) -> None:
    """Tell nobody."""


def open_source(config: DataConfig) -> Source:
    """The source that `config.path` names, with the known column map of its name filled in where it fits."""
    if config.source is not None:
        if config.path:
            raise ValueError(
                f"data.path={config.path!r} and data.source={type(config.source).__name__} are both given; set one of "
                "them to none."
            )
        return config.source
    if config.path.startswith(TFDS_PREFIX):
        return open_tfds(
            config.path.removeprefix(TFDS_PREFIX), config.name, config.columns, config.tfds_data_dir
        )
    path = Path(config.path) if config.path else embedded_path()
    if is_prepared(path):
        raise ValueError(
            f"data.path={config.path!r} is prepared already; open it as it is, or name its source."
        )
    name = config.name or path.resolve().name.split(".")[0]
    source = open_directory(path, name, config.columns)
    known = COLUMN_MAPS.get(path.resolve().name) if path.is_dir() else None
    if known is None:
        return source
    try:
        resolve_events(known, source.events().schema.names, source.events().where)
    except ValueError as error:
        log.warning("%s bears the name of a known data set but does not fit its column map: %s", path, error)
        return source
    return open_directory(path, name, fill_from(config.columns, _with_existing_files(known, path)))


def _with_existing_files(known: ColumnMap, path: Path) -> ColumnMap:
    """A known map may borrow titles from a neighbouring directory; without it the items have no text."""
    if known.items not in ("", ABSENT) and not (path / known.items).is_file():
        log.warning("%s: the items have no titles, since %s is not there", path, known.items)
        return dataclasses.replace(known, items="")
    return known


def _open_queries(config: DataConfig) -> TableFiles | None:
    """The table of queries that the config names, if any."""
    if config.queries is None:
        return None
    if config.source is not None or config.path.startswith(TFDS_PREFIX):
        raise ValueError(
            f"data.queries.file={config.queries.file!r} lies beside the events of a data.path that is a directory or a "
            "file; write the events of this source to one, or set data.queries to none."
        )
    return open_queries(Path(config.path) if config.path else embedded_path(), config.queries)


def _resolve(config: DataConfig, source: Source) -> ColumnMap:
    events = source.events()
    columns = resolve_events(fill_from(config.columns, source.columns), events.schema.names, events.where)
    if isinstance(config.split, GlobalTime):
        if columns.timestamps_are_ranks:
            raise ValueError(_ranks_refused(source.name, columns.timestamp))
        if columns.timestamp == ABSENT:
            raise ValueError(
                f"{source.name} has no timestamp column, so there is no time to split by; use data.split=LeaveOneOut, "
                "or name the column with --data.columns.timestamp."
            )
    if columns.timestamp == ABSENT and columns.order == ABSENT:
        log.warning(
            "%s has neither order nor timestamp: histories keep the order of the file, which need not be that of "
            "time; read results of sequence models with care", source.name,
        )  # fmt: skip
    return columns


def _ranks_refused(name: str, column: str) -> str:
    return (
        f"{name}: the column {column!r} holds ranks (positions in the history) and no times, so there is no moment to "
        "split all users at; use data.split=LeaveOneOut. (If they are times after all: "
        "--data.columns.timestamps_are_ranks=false.)"
    )


def _fingerprint(
    config: DataConfig, columns: ColumnMap, source: Source, pieces: WordPieces, queries: TableFiles | None
) -> str:
    """A hash of all that decides the output's bytes, and of nothing else: not of where the input lies."""
    tables = {"events": source.events(), "items": source.items(), "users": source.users()}
    described: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "name": source.name,
        "columns": dataclasses.asdict(dataclasses.replace(columns, events="", items="", users="")),
        "split": [type(config.split).__name__, dataclasses.asdict(config.split)],
        "filter_seen": config.filter_seen,
        "duplicates": config.duplicates,
        "text": [config.text.max_tokens, pieces.lowercase, file_digest(pieces.path)],
        "tables": {name: table.digest() if table else None for name, table in tables.items()},
    }
    if not columns.features:  # data of before there were features stay what they are
        del described["columns"]["features"]
    for name in ("cold_items", "noisy_events"):
        if change := getattr(config, name):
            described[name] = dataclasses.asdict(change)
    if config.queries is not None and queries is not None:
        described["queries"] = [dataclasses.asdict(config.queries), queries.digest()]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


def _prepare_into(
    staging: Path,
    config: DataConfig,
    source: Source,
    columns: ColumnMap,
    pieces: WordPieces,
    queries: TableFiles | None,
    fingerprint: str,
    report: Progress,
) -> None:
    with Quarantine(staging / "quarantine.parquet") as quarantine:
        total = source.events().estimated_rows()
        state = ingest(
            source.events(), columns, staging / "spool", quarantine, lambda done: report("read", done, total)
        )
        use_times, ranks = _check_times(config, source, state)
        histories = sort_buckets(
            state,
            use_times,
            config.duplicates == "drop",
            quarantine,
            lambda done: report("sort", done, state.rows_kept),
        )
        cut_histories(histories, config.split)
        if config.noisy_events is not None:
            falsify_events(histories, config.noisy_events)
        if config.cold_items is not None:
            remove_cold_items(histories, config.cold_items)
        item_keys, item_rank = state.items.ranked()
        counts = np.zeros(len(item_keys), np.int64)
        counts[item_rank] = histories.item_counts
        # Keys are ascending, so a stable sort by falling count breaks ties by the item's own id.
        order = np.argsort(-counts, kind="stable")
        catalogue = read_catalogue(source.items(), columns, item_keys, quarantine)
        report("items", 0, len(order))
        with_text = write_items(staging, item_keys, order, counts, catalogue, pieces)
        report("items", len(order), len(order))
        pieces.write(staging)
        item_id = np.zeros(len(order), np.int32)
        item_id[order] = np.arange(1, len(order) + 1)
        of_queries: dict[str, int] | None = None
        if config.queries is not None and queries is not None:
            ids = dict(zip(item_keys.to_pylist(), item_id.tolist(), strict=True))
            pairs, of_queries = read_queries(queries, config.queries, ids, item_keys, quarantine)
            of_queries |= write_queries(staging, config.queries, pairs, pieces)
        _write_histories(staging, histories, item_id[item_rank], report)
        user_keys, _ = state.users.ranked()
        _write_users(staging, user_keys, histories)
        unknown_users = _unknown_users(source.users(), columns, user_keys)
        state.spool.remove()
    summary = _statistics(config, source, state, histories, catalogue, quarantine, use_times, ranks)
    summary["metadata"]["fingerprint"] = fingerprint
    summary["items"]["with_text"] = with_text
    summary["users"]["without_entry_in_users_table"] = unknown_users
    if of_queries is not None:
        summary["queries"] = of_queries
    text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    (staging / "statistics.json").write_text(text, encoding="utf-8")


def _check_times(config: DataConfig, source: Source, state: Ingested) -> tuple[bool, bool]:
    """`(times are kept, they are ranks)`.

    Raises:
      ValueError: times are missing where they are needed.
    """
    columns = state.columns
    if columns.timestamp == ABSENT:
        return False, False
    ranks = columns.timestamps_are_ranks
    if ranks is None:
        ranks = state.times_equal_orders
    if state.null_times and columns.order == ABSENT:
        raise ValueError(
            f"{source.events().where}: {state.null_times} of {state.rows_kept} events have a null {columns.timestamp} "
            "and there is no order column to place them by; add an integer column `order` (position in the user's "
            "history), drop these rows, or set --data.columns.timestamp=- to keep the order of the file."
        )
    if isinstance(config.split, GlobalTime):
        if ranks:
            raise ValueError(_ranks_refused(source.name, columns.timestamp))
        if state.null_times and config.split.moments is None:
            raise ValueError(
                f"{source.name}: {state.null_times} of {state.rows_kept} events have a null {columns.timestamp}, so "
                "they have no place among the times that a share is taken of; name the "
                "moments, use data.split=LeaveOneOut, or a complete column with --data.columns.timestamp."
            )
    if state.max_time is not None and state.max_time // state.ticks_per_second > 10**11:
        log.warning(
            "%s: the latest %s lies past the year 5000; if it counts milliseconds set columns.timestamp_unit=ms",
            source.name, columns.timestamp,
        )  # fmt: skip
    return not ranks and state.null_times < state.rows_kept, ranks


def _write_histories(staging: Path, histories: Sorted, item_id_of_code: np.ndarray, report: Progress) -> None:
    done, total = 0, len(histories.lengths)
    with HistoryWriter(
        staging / "histories", total, with_context=bool(histories.state.columns.context)
    ) as writer:
        for offsets, records in merged_users(histories):
            columns = (
                item_id_of_code[records["item"]],
                records["seconds"],
                records["labels"],
                records["value"],
                records["context"],
            )
            for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
                writer.add(*(column[start:stop] for column in columns))
            done += len(offsets) - 1
            report("write", done, total)


def _write_users(staging: Path, keys: pa.Array, histories: Sorted) -> None:
    table = pa.table(
        {
            "user_id": keys,
            "train_end": histories.train_end,
            "validation_end": histories.validation_end,
            "length": histories.lengths,
        }
    )
    pq.write_table(table, staging / "users.parquet", compression="zstd")


def _unknown_users(table: Table | None, columns: ColumnMap, keys: pa.Array) -> int | None:
    """Users with events that the users table does not list; None without such a table or such a column."""
    if table is None or columns.user not in table.schema.names:
        return None
    listed: set[Any] = set()
    id_type = "string" if pa.types.is_string(keys.type) else "int64" if table.has_text_ids else "auto"
    for part in table.batches([columns.user]):
        check = RowCheck(part.batch.num_rows)
        ids = parse_ids(part.batch.column(columns.user), columns.user, id_type, check)
        listed.update(ids.to_pylist() if isinstance(ids, pa.Array) else ids.tolist())
    return sum(key not in listed for key in keys.to_pylist())


def _value_facts(value: ValueLabel, sums: tuple[float, float, float]) -> dict[str, Any] | None:
    """Name, mean and standard deviation of the numbers beside the training events; None where there are none."""
    count, total, squares = sums
    if value.column == ABSENT or not count:
        return None
    mean = total / count
    deviation = math.sqrt(max(squares / count - mean**2, 0.0))
    return {"name": value.column, "mean": round(mean, 9), "deviation": round(deviation, 9)}


def _split_statistics(histories: Sorted) -> dict[str, Any]:
    """How many events and users each part of the split has."""
    train_end, validation_end, lengths = histories.train_end, histories.validation_end, histories.lengths
    return {
        "cut_times": list(histories.cut_times),
        "train_events": int(train_end.sum()),
        "validation_events": int((validation_end - train_end).sum()),
        "test_events": int((lengths - validation_end).sum()),
        "validation_users": int((validation_end > train_end).sum()),
        "test_users": int((lengths > validation_end).sum()),
        "training_only_users": int((train_end == lengths).sum()),
    }


def _statistics(
    config: DataConfig,
    source: Source,
    state: Ingested,
    histories: Sorted,
    catalogue: Catalogue,
    quarantine: Quarantine,
    use_times: bool,
    ranks: bool,
) -> dict[str, Any]:
    """Everything that the run learned, in a fixed order and without a clock or a path: bytes repeat."""
    lengths, split = histories.lengths, config.split
    events = int(lengths.sum())
    kept = events + histories.removed
    repeat_share = histories.repeats / max(kept, 1)
    declared = config.filter_seen if config.filter_seen is not None else state.columns.filter_seen
    filter_seen = repeat_share < REPEATS_MEAN_NO_FILTER if declared is None else declared
    return {
        "metadata": {
            "name": source.name,
            "num_users": len(lengths),
            "num_items": len(state.items),
            "num_events": events,
            "behaviours": list(histories.positives),
            "context": list(state.columns.context),
            "filter_seen": filter_seen,
            "split": "leave_one_out" if isinstance(split, LeaveOneOut) else "global_time",
            "has_timestamps": use_times,
            "value": _value_facts(state.columns.value, histories.value_sums),
            "domains": list(source.domains),
            "kinds": list(source.kinds),
            "fingerprint": "",
        },
        "format_version": FORMAT_VERSION,
        "rows": {
            "read": state.rows_read,
            "kept": kept,
            "quarantined": state.rows_read - kept,
            "exact_duplicates": histories.duplicates,
            "duplicates_dropped": histories.dropped,
            "repeats_of_an_item": histories.repeats,
            "repeat_share": round(repeat_share, 6),
            "order_against_timestamp": histories.against_time,
            "null_timestamps": state.null_times,
            "null_orders": state.null_orders,
        },
        "quarantine": quarantine.summary(),
        "split": dataclasses.asdict(split) | _split_statistics(histories),
        "changes": {
            "cold_items": histories.cold_items,
            "events_of_cold_items_removed": histories.removed,
            "events_falsified": histories.falsified,
        },
        "users": {
            "history_length": {
                name: int(np.quantile(lengths, q, method="inverted_cdf"))
                for name, q in (("min", 0.0), ("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
            },
        },
        "items": {
            "rows_in_items_table": catalogue.rows_read,
            "never_seen": catalogue.never_seen,
            "repeated_in_items_table": catalogue.repeated,
            "without_entry_in_items_table": catalogue.without_entry if source.items() else None,
            "without_training_events": int((histories.item_counts == 0).sum()),
        },
        "behaviours": {
            name: {"positive": number, "unknown": histories.unknown_labels[name], "events": kept}
            for name, number in histories.positives.items()
        },
        "times": {
            "first": None
            if not use_times or state.min_time is None
            else state.min_time // state.ticks_per_second,
            "last": None
            if not use_times or state.max_time is None
            else state.max_time // state.ticks_per_second,
            "are_ranks": ranks,
        },
        "columns": dataclasses.asdict(dataclasses.replace(state.columns, events="", items="", users="")),
    }
