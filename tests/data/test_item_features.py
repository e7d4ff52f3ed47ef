"""What the items table says of items, as numbers: shared words, near numbers, nothing where nothing is known."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.data.columns import ColumnMap
from jaxrec.data.config import DataConfig
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.histories import UNKNOWN_TIME, Histories
from jaxrec.data.item_features import _interpolated, _numbers, item_features, unit_rows, word_features
from jaxrec.data.prepare import prepare


@pytest.fixture
def shop(tmp_path):
    """Prepares a small shop; keywords are columns of its items table."""

    def make(features=(), text=(), **columns):
        source = tmp_path / "shop"
        source.mkdir(exist_ok=True)
        items = [10, 11, 12, 13, 14, 15]
        events = {
            "user_id": np.repeat(np.arange(4), 6),
            "item_id": items * 4,
            "timestamp": np.tile(np.arange(6), 4),
        }
        pq.write_table(pa.table(events), source / "events.parquet")
        pq.write_table(pa.table({"item_id": items} | columns), source / "items.parquet")
        config = DataConfig(path=str(source), columns=ColumnMap(features=features, text=text))
        prepare(config, tmp_path / "data")
        return PreparedDataset.open(tmp_path / "data")

    return make


def likeness(features, dataset, *items):
    """Products of the rows of items by their own ids."""
    rows = 1 + np.array([list(dataset.item_keys).index(item) for item in items])
    return (features[rows] @ features[rows].T).toarray()


def test_words_count_by_their_rarity():
    found = word_features(["red shoe", "red shoe", "blue shoe", "blue hat", "rare"]).toarray()
    assert found.shape[0] == 6 and not found[0].any()
    np.testing.assert_allclose(np.linalg.norm(found[1:5], axis=1), 1.0)
    assert found[1] @ found[2] == pytest.approx(1.0)
    assert found[1] @ found[3] < found[3] @ found[4], "a shared rare word says more than a common one"
    assert not found[5].any(), "a word of one item says nothing of another"


def test_columns_of_numbers_and_of_words(shop):
    dataset = shop(
        features=("year", "brand"),
        text=("-",),
        year=pa.array([1990, 1991, 2020, 2021, None, 1950]),
        brand=pa.array(["a", "b", "a", None, "b", "c"]),
    )
    features = item_features(dataset)
    alike = likeness(features, dataset, 10, 11, 12, 13, 14, 15)
    assert alike[0, 1] > alike[0, 5], "1990 is nearer to 1991 than to 1950"
    assert alike[2, 3] > alike[1, 3]
    assert alike[1, 4] == pytest.approx(1.0), "the same brand, and no year"
    assert alike[4, 5] == 0.0
    assert set(dataset.item_features[list(dataset.item_keys).index(10)]) == {"year=1990", "brand=a"}


def test_categories_and_text_count_alike(shop):
    dataset = shop(
        text=("title",),
        title=["red cup", "red cup", "blue cup", "blue cup", "green hat", "green hat"],
        categories=["x|y", "x|y", "x", "z", "z", ""],
    )
    alike = likeness(item_features(dataset), dataset, 10, 11, 12, 13, 14, 15)
    assert alike[0, 1] == pytest.approx(2.0)
    assert alike[4, 5] == pytest.approx(1.0)


def test_without_an_items_table_there_is_nothing():
    histories = Histories(
        offsets=np.array([0, 3]),
        item_ids=np.array([1, 2, 3], np.int32),
        timestamps=np.full(3, UNKNOWN_TIME),
        labels=np.zeros((3, 0), np.int8),
    )
    features = item_features(PreparedDataset.from_histories(histories, num_items=3))
    assert features.shape[0] == 4 and not features.nnz


def test_a_column_that_is_not_there_is_named(shop):
    with pytest.raises(ValueError, match=r"columns\.features='colour'"):
        shop(features=("colour",), title=["a"] * 6)


def test_the_fingerprint_knows_features_and_nothing_else_new(shop):
    columns = {"title": ["a b"] * 6, "year": [1, 2, 3, 4, 5, 6]}
    without, again = (shop(**columns).metadata.fingerprint for _ in range(2))
    assert without == again != shop(features=("year",), **columns).metadata.fingerprint


@given(st.lists(st.one_of(st.none(), st.floats(-1e9, 1e9), st.integers(-5, 5)), min_size=6, max_size=6))
def test_any_numbers_have_rows_of_length_one(values):
    """Whatever the numbers are: constant, few, far apart, unknown."""
    numbers = _numbers([() if value is None else (str(value),) for value in values])
    if numbers is None:
        assert all(value is None for value in values)
        return
    rows = unit_rows(_interpolated(numbers)).toarray()
    known = np.array([value is not None for value in values])
    np.testing.assert_allclose(np.linalg.norm(rows[1:], axis=1), known.astype(float), atol=1e-9)
    assert (rows >= -1e-12).all() and not rows[0].any()
