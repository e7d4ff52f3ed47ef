"""MovieLens through TFDS, offline: the mocked loader, and a builder whose files were made here."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from jaxrec.data.columns import ColumnMap, ValueLabel
from jaxrec.data.config import DataConfig
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.prepare import prepare

RATINGS = [
    # user, movie, title, genres, rating, time
    (b"3", b"50", "Amélie (2001)", [4, 14], 5.0, 300),
    (b"12", b"7", "Heat (1995)", [0], 3.0, 100),
    (b"3", b"7", "Heat (1995)", [0], 4.0, 100),
    (b"3", b"9", "Nothing", [], 1.0, 200),
]


def fake_dataset():
    """Examples with the features of movielens/*-ratings that tell users apart."""

    def examples():
        for user, movie, title, genres, rating, time in RATINGS:
            yield {
                "user_id": user, "movie_id": movie, "movie_title": title.encode(), "movie_genres": genres,
                "user_rating": rating, "timestamp": time,
            }  # fmt: skip

    signature = {
        "user_id": tf.TensorSpec((), tf.string),
        "movie_id": tf.TensorSpec((), tf.string),
        "movie_title": tf.TensorSpec((), tf.string),
        "movie_genres": tf.TensorSpec((None,), tf.int64),
        "user_rating": tf.TensorSpec((), tf.float32),
        "timestamp": tf.TensorSpec((), tf.int64),
    }
    return tf.data.Dataset.from_generator(examples, output_signature=signature)


def mocked():
    """TFDS's mock of the real builders, with our examples."""
    return tfds.testing.mock_data(
        num_examples=len(RATINGS), as_dataset_fn=lambda self, *args, **kwargs: fake_dataset()
    )


@pytest.mark.parametrize("variant", ["100k", "1m", "20m", "latest-small"])
def test_each_variant_is_read(variant, tmp_path):
    with mocked():
        prepare(DataConfig(path=f"tfds:movielens/{variant}-ratings"), tmp_path / "out")
    dataset = PreparedDataset.open(tmp_path / "out")
    assert dataset.metadata.name == f"ml-{variant}"
    assert np.asarray(dataset.user_keys).tolist() == [3, 12]
    keys = np.asarray(dataset.item_keys)
    one = dataset.histories(np.array([0]))
    assert keys[one.item_ids - 1].tolist() == [7, 9, 50]
    assert one.timestamps.tolist() == [100, 200, 300]
    assert one.labels.ravel().tolist() == [1, 0, 1]
    items = {row["item_id"]: row for row in pq.read_table(tmp_path / "out" / "items.parquet").to_pylist()}
    assert items[50]["title"] == "Amélie (2001)"
    assert len(items[50]["categories"]) == 2
    assert items[9]["categories"] == []


def test_overrides_reach_tfds(tmp_path):
    columns = ColumnMap(value=ValueLabel(at_least=5.0, name="love"))
    with mocked():
        prepare(DataConfig(path="tfds:1m", name="mine", columns=columns), tmp_path / "out")
    dataset = PreparedDataset.open(tmp_path / "out")
    assert (dataset.metadata.name, dataset.metadata.behaviours) == ("mine", ("love",))


def test_random_mock_data_of_the_real_features_is_prepared(tmp_path):
    """TFDS's own mock makes ids of random letters: strings are legal ids."""
    with tfds.testing.mock_data(num_examples=10):
        prepare(DataConfig(path="tfds:movielens/100k-ratings"), tmp_path / "out")
    dataset = PreparedDataset.open(tmp_path / "out")
    assert dataset.metadata.num_events == 10
    assert all(dataset.titles(np.arange(1, dataset.metadata.num_items + 1)))


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="not a MovieLens set of TFDS; choose"):
        prepare(DataConfig(path="tfds:movielens/3m-ratings"), "out")


def test_without_files_and_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    def offline(self, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", offline)
    config = DataConfig(path="tfds:movielens/100k-ratings", tfds_data_dir=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"cannot be downloaded \(ConnectionError: no route.*tfds_data_dir"):
        prepare(config, tmp_path / "out")
