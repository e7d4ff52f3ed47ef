"""The rows of new items, filled in from their features once a state is trained.

A random row says nothing. What an item is like is known from the items table, and what rows of such items look like
from training: `models.new_items.RowRegression` learns the one from the other. The towers then see a new item as they
see any other, as an event of a history and as a candidate.

V = num_items + 1, F = features, D = width of a table, N = known items, C = new items.
"""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sparse
import scipy.sparse.linalg
from jaxtyping import Float, Float32, Int64

from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.item_features import item_features
from jaxrec.embedding.table import TableSpec, from_logical, to_logical
from jaxrec.models.two_tower import ITEM
from jaxrec.training.setup import Setup
from jaxrec.training.state import TrainState, logical_rows

logger = logging.getLogger(__name__)

TOLERANCE, MOST_STEPS = 1e-6, 300  # of the least squares; the rows are float32
TRUST = (
    0.25  # rows of items with more events are surer, but the others are most of what there is to learn from
)


def with_new_items(setup: Setup, state: TrainState, dataset: PreparedDataset) -> TrainState:
    """The state to be asked, whose rows of items without a training event follow from their features.

    Unchanged where the model's `new_items` is none, or every item has an event.

    Raises:
      ValueError: the dataset says nothing of its items.
    """
    config = setup.model.new_items
    counts = np.asarray(dataset.item_counts)
    new = 1 + np.flatnonzero(counts[1:] == 0)
    if config is None or not len(new):
        return state
    features = item_features(dataset)
    if not features.nnz:
        raise ValueError(
            f"model.new_items is set, but dataset {dataset.metadata.name!r} says nothing of its items; give it an "
            "items table with text, categories or data.columns.features, or set model.new_items=none."
        )
    logger.info("%d items without a training event get rows from %d features", len(new), features.shape[1])

    def filled(tables: dict[str, Any]) -> dict[str, Any]:
        of_items = {name: rows for name, rows in tables.items() if setup.tables[name].keyed_by == ITEM}
        for name, rows in of_items.items():
            table = setup.tables[name]
            found = regressed(features, logical_rows(table, rows), counts, new, config.regularization)
            of_items[name] = _placed(table, rows, new, found)
        return tables | of_items

    if state.ema:
        averages = filled(state.ema["tables"])
        kept = {name: rows for name, rows in state.tables.items() if name not in averages}
        ema = state.ema | {"tables": averages}
        return dataclasses.replace(state, tables=state.tables | filled(kept), ema=ema)
    return dataclasses.replace(state, tables=filled(state.tables))


def regressed(
    features: sparse.csr_array,
    rows: Float[np.ndarray, "v d"],
    counts: Int64[np.ndarray, " v"],
    new: Int64[np.ndarray, " c"],
    regularization: float,
) -> Float32[np.ndarray, "c d"]:
    """The rows that the features of new items stand for: `mean + X_new B`, with the B of the least squares

    `sum over known items n of weight_n |row_n - mean - x_n B|^2 + regularization |B|^2`,

    where an item of more events counts more, by their number to the power `TRUST` over that of the median item.
    """
    known = np.flatnonzero(counts > 0)
    weights = (counts[known] / np.median(counts[known])) ** TRUST
    mean = np.average(rows[known], axis=0, weights=weights)
    scale = np.sqrt(weights)
    given, wanted = sparse.diags_array(scale) @ features[known], scale[:, None] * (rows[known] - mean)
    found = np.empty((len(new), rows.shape[1]), np.float32)
    for column in range(rows.shape[1]):
        solved = scipy.sparse.linalg.lsqr(
            given,
            wanted[:, column],
            damp=regularization**0.5,
            atol=TOLERANCE,
            btol=TOLERANCE,
            iter_lim=MOST_STEPS,
        )
        found[:, column] = mean[column] + features[new] @ solved[0]
    return found


def _placed(
    table: TableSpec, rows: jax.Array | np.ndarray, new: Int64[np.ndarray, " c"], found: np.ndarray
) -> Any:
    """A table with the rows `found` at the ids `new`."""
    if isinstance(rows, np.ndarray):
        copy = rows.copy()
        copy[new] = found
        return copy

    def put(rows: jax.Array, found: jax.Array) -> jax.Array:
        logical = to_logical(rows, table.num_rows, table.placement).at[new].set(found.astype(rows.dtype))
        return from_logical(logical, table.num_rows, table.placement)

    where = table.row_format(jax.sharding.get_mesh())
    return jax.jit(put, out_shardings=where)(rows, jnp.asarray(found))
