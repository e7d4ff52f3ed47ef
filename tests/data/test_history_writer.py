"""The TFDS dataset on disk: TFDS itself reads it, in the order of the users, across shards."""

import numpy as np
import tensorflow_datasets as tfds

from jaxrec.data.history_writer import HistoryWriter


def write(directory, num_behaviours):
    with HistoryWriter(directory, 25, users_per_shard=10) as writer:
        for user in range(25):
            size = user % 4
            ids = np.arange(user, user + size, dtype=np.int32)
            labels = np.full((size, num_behaviours), -1, np.int8)
            writer.add(ids, ids.astype(np.int64) - 2**40, labels, ids.astype(np.float32) / 3)


def test_tfds_reads_what_was_written(tmp_path):
    write(tmp_path / "histories", 3)
    builder = tfds.builder_from_directory(tmp_path / "histories")
    assert builder.info.disable_shuffling
    assert builder.info.splits["all"].num_examples == 25
    source = builder.as_data_source(split="all")
    for user in (0, 9, 10, 24):
        example, size = source[user], user % 4
        assert example["item_ids"].tolist() == list(range(user, user + size))
        assert example["item_ids"].dtype == np.int32
        assert example["timestamps"].tolist() == [one - 2**40 for one in range(user, user + size)]
        assert example["labels"].tolist() == [-1] * size * 3
        assert example["labels"].dtype == np.int8
        np.testing.assert_array_equal(example["values"], np.arange(user, user + size, dtype=np.float32) / 3)


def test_no_behaviours_and_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, 0)
    source = tfds.builder_from_directory(tmp_path / "a").as_data_source(split="all")
    assert source[3]["labels"].shape == (0,)
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert contents[0] == contents[1]
    assert "histories-users.array_record-00002-of-00003" in contents[0]
