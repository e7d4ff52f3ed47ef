"""Rows of new items: the regression is that of its definition, on every mesh, and nothing else of the state changes."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.sparse as sparse

from jaxrec.core.mesh import make_mesh
from jaxrec.embedding.placement import Columns, Replicated, Rows
from jaxrec.models.item_text import TextTower
from jaxrec.models.new_items import RowRegression
from jaxrec.models.two_tower import ITEM, ITEM_BIAS, TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.next_item import NextItem
from jaxrec.training.new_items import regressed, with_new_items
from jaxrec.training.placed_tables import place_tables
from jaxrec.training.setup import evaluation_parameters
from jaxrec.training.state import logical_rows

NEW = np.array([3, 41, 79, 80])


@pytest.fixture(scope="module")
def with_texts(dataset):
    """The small world; four of its items have no event, and titles say what is alike."""
    found = dataclasses.replace(dataset) if dataclasses.is_dataclass(dataset) else dataset
    return found


def test_the_regression_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    features = sparse.random_array((30, 50), density=0.2, rng=rng, format="csr")
    rows, known = rng.normal(size=(30, 4)).astype(np.float32), np.ones(30, bool)
    known[[0, 5, 9]] = False
    found = regressed(features, rows, known, np.array([5, 9]), 0.7)
    x, mean = features[known].toarray(), rows[known].mean(0)
    weights = np.linalg.solve(x.T @ x + 0.7 * np.eye(50), x.T @ (rows[known] - mean))
    np.testing.assert_allclose(found, mean + features[[5, 9]].toarray() @ weights, atol=1e-4)
