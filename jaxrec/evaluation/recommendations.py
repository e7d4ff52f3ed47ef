"""Batch inference: the best items of many users, in the users' own ids, streamed to a file.

T = length of a list, U = users.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from jaxtyping import Int, Int64, Shaped

from jaxrec.core.files import replacing
from jaxrec.data.dataset import PreparedDataset
from jaxrec.evaluation.slate_lists import SlateChooser
from jaxrec.evaluation.slates import Slate
from jaxrec.evaluation.user_ranking import Run, UserRanker, UserRanks

COLUMNS = ("user_id", "item_id", "rank", "score")
_NAMED = 5  # unknown users that an error names


@dataclass(frozen=True, kw_only=True)
class RecommendationCounts:
    """What `write_recommendations` did.

    Attributes:
      num_without_history: users left out because no event of theirs comes before the target.
      num_without_target: users left out because the split holds no event of theirs.
    """

    num_users: int
    num_rows: int
    num_without_history: int
    num_without_target: int


def read_user_ids(path: Path, key_type: pa.DataType) -> pa.Array:
    """The user ids of a file, in its order, each once.

    A `.parquet` or `.csv` file has a column `user_id`, or one column only; any other file has one id a line.

    Args:
      key_type: of the dataset's own user ids.

    Raises:
      ValueError: the file is empty or holds no such ids; says which and why.
    """
    try:
        if path.suffix == ".parquet":
            values = _user_column(pq.read_table(path), path)
        elif path.suffix == ".csv":
            # As text first: an id like 007 must not become a number before the dataset's own type is asked.
            with path.open(encoding="utf-8-sig", newline="") as stream:
                names = next(csv.reader(stream), [])
            options = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
            values = _user_column(pyarrow.csv.read_csv(path, convert_options=options), path)
        else:
            lines = (line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines())
            values = pa.array([line for line in lines if line], pa.string())
    except (pa.ArrowInvalid, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as user ids: {error}") from error
    values = values.drop_null()
    if not len(values):
        raise ValueError(f"{path} holds no user id; write one a line, or a column user_id.")
    try:
        return values.unique().cast(key_type)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: the dataset's user ids are of type {key_type}, and {error}") from error
    except pa.ArrowNotImplementedError as error:
        raise ValueError(
            f"{path}: the dataset's user ids are of type {key_type}, which {values.type} cannot be turned into; write "
            f"the ids as {key_type}."
        ) from error


def find_users(
    dataset: PreparedDataset, user_ids: pa.Array, *, skip_unknown: bool = False
) -> tuple[Int64[np.ndarray, " u"], list[Any]]:
    """The indices of these users, rising, and the ids that the dataset does not know.

    Raises:
      ValueError: a user is unknown and `skip_unknown` is false, or all are.
    """
    index = pa.compute.index_in(user_ids, value_set=pa.array(dataset.user_keys, user_ids.type))
    unknown = user_ids.filter(index.is_null()).to_pylist()
    if unknown and (not skip_unknown or len(unknown) == len(user_ids)):
        named = ", ".join(repr(name) for name in unknown[:_NAMED]) + (
            ", ..." if len(unknown) > _NAMED else ""
        )
        raise ValueError(
            f"{len(unknown):,} of {len(user_ids):,} users are not in dataset {dataset.metadata.name!r}: {named}; "
            "remove them, or pass --skip-unknown-users."
        )
    return np.sort(index.drop_null().to_numpy().astype(np.int64)), unknown


def write_recommendations(
    run: Run,
    out: Path,
    *,
    split: str,
    k: int,
    rows_per_batch: int,
    user_indices: Int64[np.ndarray, " u"] | None = None,
    slate: Slate | None = None,
    kind: int = 0,
) -> RecommendationCounts:
    """Writes `user_id, item_id, rank, score` (rank from 1) of each user's best `k` items, batch by batch.

    Items of the user's history are left out where the dataset says `filter_seen`. The file appears when it is
    whole: a `.csv`, or Parquet under any other name.

    Args:
      split: "test" or "validation": from the events before that target, for the users that have one;
        "all": from all events.
      user_indices: these users only.
      slate: write sets that are chosen together, in the order of choice, in place of the best `k`.
      kind: of the items, one of the dataset's kinds, 1, 2, ...; 0 where they are of one.

    Raises:
      ValueError: nobody is left to recommend to, or the model's output is not finite.
    """
    ranker = UserRanker(run, top_k=slate.pool if slate else k, kind=kind)
    chooser = SlateChooser(run, slate) if slate else lambda ranks: ranks
    rows = ranker.rows(split, rows_per_batch=rows_per_batch, user_indices=user_indices)
    if not rows.num_users:
        raise ValueError(
            f"no user of split {split!r} can be asked: {rows.num_without_target:,} have no event in it and "
            f"{rows.num_without_history:,} no event before it; use --split=all."
        )
    tables = (_table(run.dataset, chooser(part)) for part in ranker.batches(rows, keep_targets=False))
    return RecommendationCounts(
        num_users=rows.num_users,
        num_rows=write_tables(tables, out),
        num_without_history=rows.num_without_history,
        num_without_target=rows.num_without_target,
    )


def _table(dataset: PreparedDataset, part: UserRanks) -> pa.Table:
    """The lists of a batch, one row an item; places that no item fills are dropped."""
    filled = part.top_item_ids > 0
    users, places = np.nonzero(filled)
    return pa.table(
        {
            "user_id": keys_at(dataset.user_keys, part.user_indices[users]),
            "item_id": keys_at(dataset.item_keys, part.top_item_ids[filled] - 1),
            "rank": pa.array(places + 1, pa.int32()),
            "score": pa.array(part.top_scores[filled], pa.float32()),
        }
    )


def keys_at(keys: Shaped[np.ndarray, " n"], places: Int[np.ndarray, " p"]) -> pa.Array:
    """A dataset's own ids at some places, in the type of them all: from no places Arrow could not tell it."""
    return pa.array(keys[places], pa.array(keys[:1]).type)


def write_tables(tables: Iterator[pa.Table], out: Path) -> int:
    """Streams tables to a temporary file and renames it; only the first process writes."""
    if jax.process_index():
        return sum(len(table) for table in tables)
    out.parent.mkdir(parents=True, exist_ok=True)
    first = next(tables)
    writer_class: Any = pyarrow.csv.CSVWriter if out.suffix == ".csv" else pq.ParquetWriter
    num_rows = 0
    with replacing(out) as temporary, writer_class(temporary, first.schema) as writer:
        for table in _chain(first, tables):
            writer.write_table(table)
            num_rows += len(table)
    return num_rows


def _chain(first: pa.Table, rest: Iterator[pa.Table]) -> Iterator[pa.Table]:
    yield first
    yield from rest


def _user_column(table: pa.Table, path: Path) -> pa.ChunkedArray:
    names: Sequence[str] = table.column_names
    if "user_id" in names:
        return table["user_id"]
    if len(names) == 1:
        return table[names[0]]
    raise ValueError(f"{path} has the columns {', '.join(names)} and none is called user_id; rename one.")
