"""Is run B better than run A, or luckier? Each run's ranks, kept per user, and the paired tests between two runs.

U = users.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxrec.core.files import replacing
from jaxrec.data.dataset import PreparedDataset
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.evaluation.significance import Comparison, align_users, by_user, compare
from jaxrec.evaluation.user_ranking import UserRanks
from jaxrec.metrics.ranking import per_user_metrics

RANKS_FILE, COLD_RANKS_FILE = "ranks.parquet", "cold_ranks.parquet"
_FACTS = ("split", "filter_seen", "num_items")  # two runs that differ here cannot be paired


def write_ranks(
    workdir: Path, dataset: PreparedDataset, split: str, ranks: UserRanks, name: str = RANKS_FILE
) -> None:
    """Writes the file at once: `user_id`, `item_id` (the target) and `rank` (from 0), in the user's own ids."""
    metadata = dataset.metadata
    facts = (split, str(metadata.filter_seen), str(metadata.num_items))
    table = pa.table(
        {
            "user_id": pa.array(dataset.user_keys[ranks.user_indices]),
            "item_id": pa.array(dataset.item_keys[ranks.targets - 1]),
            "rank": pa.array(ranks.ranks, pa.int64()),
        }
    ).replace_schema_metadata(dict(zip(_FACTS, facts, strict=True)))
    with replacing(workdir / name) as temporary:
        pq.write_table(table, temporary)


def compare_runs(path_a: Path, path_b: Path, *, config: EvaluationConfig) -> dict[str, Comparison]:
    """Run B against run A, user by user, from their saved ranks: paired tests, Holm's correction over all metrics.

    Raises:
      ValueError: a run has no saved ranks, or they are not of the same data, split and users.
    """
    tables = [_read_ranks(path) for path in (path_a, path_b)]
    for name in _FACTS:
        fact_a, fact_b = (table.schema.metadata[name.encode()].decode() for table in tables)
        if fact_a != fact_b:
            raise ValueError(
                f"{path_a} was evaluated with {name}={fact_a} and {path_b} with {fact_b}; evaluate both alike."
            )
    users = [table["user_id"].to_numpy() for table in tables]
    a, b = tables
    if not np.array_equal(*users):  # where they are, a user may have several targets
        orders = align_users(*users)
        a, b = (table.take(pa.array(order)) for table, order in zip(tables, orders, strict=True))
    if a["item_id"].to_pylist() != b["item_id"].to_pylist():
        raise ValueError(
            f"{path_a} and {path_b} were asked for other targets; evaluate both on the same data."
        )
    # Recall is the hit rate here; a test of it again would only make the correction harsher.
    metrics = [
        {
            name: by_user(values, table["user_id"].to_numpy())
            for name, values in per_user_metrics(table["rank"].to_numpy(), config.ks).items()
            if not name.startswith("recall")
        }
        for table in (a, b)
    ]
    return compare(*metrics, **config.draws)


def _read_ranks(workdir: Path) -> pa.Table:
    path = workdir / RANKS_FILE
    if not path.exists():
        raise ValueError(
            f"{workdir} holds no {RANKS_FILE}; run python -m jaxrec.evaluate --workdir={workdir} first."
        )
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is damaged ({error}); evaluate {workdir} again.") from error
    if not set(_FACTS) <= {name.decode() for name in table.schema.metadata or {}}:
        raise ValueError(f"{path} was not written by jaxrec.evaluate; evaluate {workdir} again.")
    return table
