"""Rows of items from what the items table says of them: at the start, and of new items at the end.

A random row says nothing. `model.feature_init_scale` starts every item from its features instead, so that items that
are alike start alike. Of items without a training event nothing is learned: what rows of such items look like is known
from training, and `models.new_items.RowRegression` learns their rows from those of the others. The towers then see a
new item as they see any other, as an event of a history and as a candidate.

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
from jax.experimental import multihost_utils
from jaxtyping import Float, Float32, Int64

from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.item_features import item_features
from jaxrec.embedding.table import TableSpec, from_logical, to_logical
from jaxrec.models.two_tower import ITEM, ITEM_OUTPUT
from jaxrec.training.setup import Setup
from jaxrec.training.state import TrainState, logical_rows

logger = logging.getLogger(__name__)

TOLERANCE, MOST_STEPS = 1e-4, 300  # of the least squares: what they leave out is far below what is not known
# Rows of items with more events are surer, but the others are most of what there is to learn from.
TRUST = 0.25


def with_feature_rows(setup: Setup, state: TrainState, dataset: PreparedDataset) -> TrainState:
    """A fresh state whose item rows start from the items' features; unchanged where `feature_init_scale` is 0.

    An item of which nothing is known keeps its random row, and so do dims past what the features have.

    Raises:
      ValueError: the dataset says nothing of its items.
    """
    scale = setup.model.feature_init_scale
    if not scale:
        return state
    features = _features(dataset, "model.feature_init_scale")
    tables = dict(state.tables)
    for name in (ITEM, ITEM_OUTPUT):
        if name in tables:
            first = first_rows(features, logical_rows(setup.tables[name], tables[name]), scale)
            tables[name] = _placed(setup.tables[name], tables[name], np.arange(len(first)), first)
    # Copied: a step donates its state, and the averages start as the same rows.
    ema = state.ema and state.ema | {"tables": {name: jnp.copy(tables[name]) for name in state.ema["tables"]}}
    return dataclasses.replace(state, tables=tables, ema=ema)


def first_rows(
    features: sparse.csr_array, rows: Float32[np.ndarray, "v d"], scale: float
) -> Float32[np.ndarray, "v d"]:
    """The leading singular vectors of the features over all items, times the values, at `scale`; else `rows`.

    The first of them is left out: it is what all items share.

    Source: Deerwester et al., JASIS 1990 (latent semantic analysis).
    """
    count = min(rows.shape[1] + 1, min(features.shape) - 1)
    vectors, values, _ = scipy.sparse.linalg.svds(features, k=count, random_state=0)
    order = np.argsort(-values)[1:]
    found = vectors[:, order] * values[order]
    some = np.flatnonzero(np.diff(features.indptr))
    first = rows.copy()
    first[some, : found.shape[1]] = scale * found[some] / np.sqrt(np.mean(found[some] ** 2))
    return first


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
    features = _features(dataset, "model.new_items")
    logger.info("%d items without a training event get rows from %d features", len(new), features.shape[1])

    def filled(tables: dict[str, Any]) -> dict[str, Any]:
        of_items = {name: rows for name, rows in tables.items() if setup.tables[name].keyed_by == ITEM}
        for name, rows in of_items.items():
            table = setup.tables[name]
            found = regressed(features, logical_rows(table, rows), counts, new, config.regularization)
            of_items[name] = _placed(table, rows, new, found)
        return tables | of_items

    averages = filled(state.ema["tables"]) if state.ema else {}
    asked = {name: rows for name, rows in state.tables.items() if name not in averages}
    ema = state.ema and state.ema | {"tables": averages}
    return dataclasses.replace(state, tables=state.tables | filled(asked), ema=ema)


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
    settings = {"atol": TOLERANCE, "btol": TOLERANCE, "iter_lim": MOST_STEPS}
    solved = [
        scipy.sparse.linalg.lsqr(given, column, damp=regularization**0.5, **settings)[0]
        for column in wanted.T
    ]
    return (mean + features[new] @ np.stack(solved, axis=1)).astype(np.float32)


def _features(dataset: PreparedDataset, field: str) -> sparse.csr_array:
    features = item_features(dataset)
    if not features.nnz:
        raise ValueError(
            f"{field} is set, but dataset {dataset.metadata.name!r} says nothing of its items; give it an items table "
            f"with text, categories or data.columns.features, or leave {field} at its default."
        )
    return features


def _placed(
    table: TableSpec, rows: jax.Array | np.ndarray, new: Int64[np.ndarray, " c"], found: np.ndarray
) -> Any:
    """A table with the rows `found` at the ids `new`; the same on every process, whatever its libraries compute."""
    if jax.process_count() > 1:
        found = multihost_utils.broadcast_one_to_all(found)
    if isinstance(rows, np.ndarray):
        copy = rows.copy()
        copy[new] = found
        return copy

    def put(rows: jax.Array, found: jax.Array) -> jax.Array:
        logical = to_logical(rows, table.num_rows, table.placement).at[new].set(found.astype(rows.dtype))
        return from_logical(logical, table.num_rows, table.placement)

    where = table.row_format(jax.sharding.get_mesh())
    return jax.jit(put, out_shardings=where)(rows, jnp.asarray(found))
