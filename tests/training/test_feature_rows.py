"""Rows of new items: the regression is that of its definition, on every mesh, and nothing else of the state changes."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.sparse as sparse

from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.item_features import item_features
from jaxrec.embedding.placement import Columns, Replicated, Rows
from jaxrec.models.item_text import TextTower
from jaxrec.models.new_items import RowRegression
from jaxrec.models.two_tower import ITEM, ITEM_BIAS, USER, TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.candidates import SampledSoftmax
from jaxrec.tasks.next_item import NextItem
from jaxrec.training.feature_rows import TRUST, first_rows, regressed, with_feature_rows, with_new_items
from jaxrec.training.placed_tables import place_tables
from jaxrec.training.setup import dataset_facts, evaluation_parameters
from jaxrec.training.state import logical_rows

NEW = np.array([3, 41, 79, 80])
WORDS = np.array(["red", "green", "blue", "large", "small", "old"])


@pytest.fixture(scope="module")
def with_new(dataset):
    """The small world with titles, where four items are in no event."""
    histories = dataset.histories(np.arange(dataset.metadata.num_users))
    item_ids = np.where(np.isin(histories.item_ids, NEW), 1, histories.item_ids)
    titles = [" ".join(WORDS[np.random.default_rng(item).integers(0, 6, 3)]) for item in range(80)]
    return PreparedDataset.from_histories(
        dataclasses.replace(histories, item_ids=item_ids),
        num_items=80,
        item_titles=titles,
        behaviours=("click", "buy"),
    )


@pytest.fixture(scope="module")
def filled(make, with_new):
    """Makes setup, state before and after, and the rows that are evaluated of both."""

    def rows(mesh, placement=Rows()):
        encoder = make(mesh).model.encoder
        model = TwoTowerConfig(encoder=encoder, item_dim=8, user_dim=8, new_items=RowRegression())
        # Sampled candidates leave the choice of a placement.
        tasks = {"next_item": NextItem(candidates=SampledSoftmax())}
        setup = make(mesh, model=model, tasks=tasks, facts=dataset_facts(with_new))
        setup = place_tables(setup, {ITEM: placement}, global_batch_size=16, history_length=16)
        with jax.set_mesh(mesh):
            before = setup.init_state()
            after = with_new_items(setup, before, with_new)
            found = [
                {
                    name: logical_rows(setup.tables[name], rows)
                    for name, rows in evaluation_parameters(state)[1].items()
                }
                for state in (before, after)
            ]
        return setup, before, after, *found

    return rows


def test_the_regression_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    features = sparse.random_array((30, 50), density=0.2, rng=rng, format="csr")
    rows, counts = rng.normal(size=(30, 4)).astype(np.float32), rng.integers(1, 50, 30)
    counts[[0, 5, 9]] = 0
    found = regressed(features, rows, counts, np.array([5, 9]), 0.7)
    known = counts > 0
    trust = np.diag((counts[known] / np.median(counts[known])) ** TRUST)
    x, mean = features[known].toarray(), trust.diagonal() @ rows[known] / np.trace(trust)
    weights = np.linalg.solve(x.T @ trust @ x + 0.7 * np.eye(50), x.T @ trust @ (rows[known] - mean))
    np.testing.assert_allclose(found, mean + features[[5, 9]].toarray() @ weights, atol=1e-3)


def test_items_that_are_alike_get_rows_that_are_alike(filled, with_new, one_device):
    *_, before, after = filled(one_device)
    counts = np.asarray(with_new.item_counts)
    assert np.flatnonzero(counts[1:] == 0).tolist() == [*(NEW - 1)]
    wanted = regressed(item_features(with_new), before[ITEM], counts, NEW, RowRegression().regularization)
    np.testing.assert_array_equal(after[ITEM][NEW], wanted)
    assert not np.allclose(after[ITEM][NEW], before[ITEM][NEW])


def test_nothing_else_changes(filled, with_new, one_device):
    _, state, filled_state, before, after = filled(one_device)
    rest = np.setdiff1d(np.arange(81), NEW)
    for name in (ITEM, ITEM_BIAS):
        np.testing.assert_array_equal(after[name][rest], before[name][rest])
    np.testing.assert_array_equal(after[USER], before[USER])
    assert after[ITEM].dtype == before[ITEM].dtype
    same = jax.tree.map(np.array_equal, state.dense, filled_state.dense)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("placement", [Rows(), Columns(parts=2), Replicated()], ids=str)
def test_every_mesh_gives_the_same_rows(filled, mesh, one_device, placement):
    wanted = filled(one_device)[-1]
    _, before, after, _, found = filled(mesh, placement)
    np.testing.assert_allclose(found[ITEM], wanted[ITEM], atol=1e-6)
    was, now = (evaluation_parameters(state)[1][ITEM] for state in (before, after))
    assert now.sharding.is_equivalent_to(was.sharding, 2) and now.shape == was.shape


def test_a_dataset_without_words_is_refused(make, dataset, with_new, one_device):
    histories = with_new.histories(np.arange(with_new.metadata.num_users))
    bare = PreparedDataset.from_histories(histories, num_items=80, behaviours=("click", "buy"))
    model = TwoTowerConfig(encoder=make(one_device).model.encoder, item_dim=8, new_items=RowRegression())
    setup = make(one_device, model=model)
    with pytest.raises(ValueError, match=r"says nothing of its items.*data\.columns\.features"):
        with_new_items(setup, setup.init_state(), bare)


def test_without_new_items_the_state_is_as_it_was(make, dataset, one_device):
    model = TwoTowerConfig(encoder=make(one_device).model.encoder, item_dim=8, new_items=RowRegression())
    setup = make(one_device, model=model)
    state = setup.init_state()
    assert with_new_items(setup, state, dataset) is state


def test_what_it_refuses():
    with pytest.raises(ValueError, match="must be above 0"):
        RowRegression(regularization=0.0)
    reader = EncoderConfig(vocab_size=50, type_vocab_size=1)
    with pytest.raises(ValueError, match=r"model\.text reads new items by itself"):
        TwoTowerConfig(text=TextTower(encoder=reader), new_items=RowRegression())


def test_rows_start_from_the_features(make, with_new, mesh, one_device):
    found = []
    for on in (one_device, mesh):
        model = TwoTowerConfig(encoder=make(on).model.encoder, item_dim=4, feature_init_scale=0.1)
        setup = make(on, model=model, facts=dataset_facts(with_new))
        with jax.set_mesh(on):
            state = with_feature_rows(setup, setup.init_state(), with_new)
            rows, averages = (
                logical_rows(setup.tables[ITEM], t[ITEM]) for t in (state.tables, state.ema["tables"])
            )
        np.testing.assert_array_equal(rows, averages)
        found.append(rows)
    np.testing.assert_allclose(*found, atol=1e-6)
    rows = found[0]
    assert not rows[0].any() and np.sqrt(np.mean(rows[1:] ** 2)) == pytest.approx(0.1)
    features = item_features(with_new).toarray()
    same = [(a, b) for a in range(1, 81) for b in range(a + 1, 81) if np.allclose(features[a], features[b])]
    assert same, "no two titles are alike"
    for a, b in same:
        np.testing.assert_allclose(rows[a], rows[b], atol=1e-6)


def test_what_no_feature_says_stays_random():
    features = sparse.csr_array(
        np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0], [1, 1, 0], [0, 1, 1]], float)
    )
    rows = np.full((6, 4), 7.0, np.float32)
    found = first_rows(features, rows, 0.1)
    assert (found[[0, 3]] == 7.0).all(), "nothing is known of these"
    assert (found[:, 1:] == 7.0).all(), "three features have one direction beside the common one and the last"
    assert np.sqrt(np.mean(found[[1, 2, 4, 5], 0] ** 2)) == pytest.approx(0.1, rel=1e-5)
