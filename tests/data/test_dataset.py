"""What the reader gives back is what the writer was given, from memory and from the files alike."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.data.dataset import UNKNOWN_TIME, DatasetMetadata, Histories, PreparedDataset
from jaxrec.data.evaluation_batches import evaluation_batches
from jaxrec.data.history_writer import HistoryWriter
from jaxrec.data.packing import Windows
from jaxrec.data.pipeline import TrainingRows, build_batch, train_batches

LENGTHS = np.array([5, 1, 0, 30, 2, 7, 3, 12])
NUM_ITEMS = 40


def make_histories(lengths=LENGTHS, num_behaviours=3):
    rng = np.random.default_rng(1)
    size = int(sum(lengths))
    timestamps = np.cumsum(rng.integers(0, 10**6, size)) + 1_500_000_000
    timestamps[::7] = UNKNOWN_TIME
    return Histories(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        rng.integers(1, NUM_ITEMS + 1, size).astype(np.int32),
        timestamps.astype(np.int64),
        rng.integers(-1, 2, (size, num_behaviours)).astype(np.int8),
        np.where(np.arange(size) % 5, rng.normal(size=size), np.nan).astype(np.float32),
    )


def write_directory(directory, dataset, users_per_shard=3):
    """A prepared directory of the dataset, by the contract of docs/architecture.md."""
    histories = dataset.histories(np.arange(dataset.metadata.num_users))
    directory.mkdir()
    with HistoryWriter(directory / "histories", len(histories), users_per_shard) as writer:
        for start, stop in zip(histories.offsets[:-1], histories.offsets[1:], strict=True):
            writer.add(
                *(
                    column[start:stop]
                    for column in (
                        histories.item_ids,
                        histories.timestamps,
                        histories.labels,
                        histories.values,
                    )
                )
            )
    num_items = dataset.metadata.num_items
    pq.write_table(
        pa.table(
            {
                "user_id": [f"user {index}" for index in range(len(histories))],
                "train_end": dataset.train_end,
                "validation_end": dataset.validation_end,
                "length": dataset.lengths,
            }
        ),
        directory / "users.parquet",
    )
    pq.write_table(
        pa.table(
            {
                "item_id": np.arange(num_items) * 10,
                "title": [f"Amélie {index} 映画" if index else "" for index in range(num_items)],
                "categories": [["Drama", "War"][: index % 3] for index in range(num_items)],
                "train_count": dataset.item_counts[1:],
            }
        ),
        directory / "items.parquet",
    )
    np.save(directory / "item_tokens.npy", np.arange((num_items + 1) * 4, dtype=np.int32).reshape(-1, 4))
    statistics = {"metadata": dataset.metadata.to_json(), "other": 1}
    (directory / "statistics.json").write_text(json.dumps(statistics), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def in_memory():
    return PreparedDataset.from_histories(make_histories(), num_items=NUM_ITEMS, behaviours=("a", "b", "c"))


@pytest.fixture(scope="module")
def directory(in_memory, tmp_path_factory):
    return write_directory(tmp_path_factory.mktemp("dataset") / "prepared", in_memory)


@pytest.fixture(params=[1 << 30, 0], ids=["loaded", "from files"])
def opened(request, directory):
    return PreparedDataset.open(directory, memory_budget_bytes=request.param)


def assert_equal_histories(first, second):
    for name in ("offsets", "item_ids", "timestamps", "labels"):
        a, b = getattr(first, name), getattr(second, name)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_an_opened_directory_equals_what_was_written(opened, in_memory):
    assert opened.metadata == in_memory.metadata
    for name in ("train_end", "validation_end", "lengths", "item_counts"):
        np.testing.assert_array_equal(getattr(opened, name), getattr(in_memory, name))
    for users in ([0, 1, 2, 3, 4, 5, 6, 7], [7, 3, 3, 2], [2], []):
        users = np.array(users, np.int64)
        assert_equal_histories(opened.histories(users), in_memory.histories(users))
    windows = Windows(users=np.array([3, 3, 7]), starts=np.array([0, 25, 4]), lengths=np.array([25, 5, 8]))
    assert_equal_histories(opened.windows(windows), in_memory.windows(windows))


def test_batches_do_not_depend_on_where_the_events_lie(opened, in_memory):
    arguments = dict(global_batch_size=4, history_length=8, windows="all", stop_step=5)
    for first, second in zip(
        train_batches(opened, **arguments), train_batches(in_memory, **arguments), strict=True
    ):
        for name in ("item_ids", "segment_ids", "positions", "time_gaps", "times", "labels"):
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    arguments = dict(split="test", rows_per_batch=2, history_length=8)
    for first, second in zip(
        evaluation_batches(opened, **arguments), evaluation_batches(in_memory, **arguments), strict=True
    ):
        np.testing.assert_array_equal(first.seen_items, second.seen_items)
        np.testing.assert_array_equal(first.target_labels, second.target_labels)


def test_one_pass_over_blocks_of_users(opened, in_memory):
    found = list(opened.history_blocks(users_per_block=3))
    assert np.concatenate([users for users, _ in found]).tolist() == list(range(8))
    for users, histories in found:
        assert_equal_histories(histories, in_memory.histories(users))


def test_the_catalogue_is_read_by_item_id(opened):
    assert opened.titles(np.array([0, 1, 2, NUM_ITEMS])) == [
        "",
        "",
        "Amélie 1 映画",
        f"Amélie {NUM_ITEMS - 1} 映画",
    ]
    assert opened.item_categories[:3] == [(), ("Drama",), ("Drama", "War")]
    assert opened.item_keys[:3].tolist() == [0, 10, 20]
    assert opened.user_keys[:2].tolist() == ["user 0", "user 1"]
    assert opened.item_tokens[2].tolist() == [8, 9, 10, 11]
    assert opened.item_tokens.shape == (NUM_ITEMS + 1, 4)


def test_a_dataset_in_memory_has_a_plain_catalogue(in_memory):
    assert in_memory.item_keys.tolist() == list(range(1, NUM_ITEMS + 1))
    assert in_memory.user_keys.tolist() == list(range(len(LENGTHS)))
    assert in_memory.titles(np.array([0, 5])) == ["", ""]
    assert in_memory.item_categories == [()] * NUM_ITEMS
    with pytest.raises(ValueError, match=r"has no item_tokens\.npy"):
        _ = in_memory.item_tokens
    titled = PreparedDataset.from_histories(
        make_histories([1, 1]), num_items=NUM_ITEMS, item_titles=["x"] * NUM_ITEMS
    )
    assert titled.titles(np.array([1])) == ["x"]


def test_without_cut_points_the_last_two_events_are_left_out(in_memory):
    assert in_memory.train_end.tolist() == [3, 1, 0, 28, 2, 5, 1, 10]
    assert in_memory.validation_end.tolist() == [4, 1, 0, 29, 2, 6, 2, 11]
    assert in_memory.item_counts.sum() == in_memory.train_end.sum()
    assert in_memory.item_counts[0] == 0


def test_a_dataset_without_behaviours(tmp_path):
    dataset = PreparedDataset.from_histories(make_histories(num_behaviours=0), num_items=NUM_ITEMS)
    opened = PreparedDataset.open(write_directory(tmp_path / "prepared", dataset))
    rows = TrainingRows.make(opened, history_length=8)
    assert build_batch(rows, 0, global_batch_size=2).labels.shape == (2, 8, 0)


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    seed=st.integers(0, 9),
    size=st.integers(0, 20),
)
def test_stretches_are_taken_by_index(lengths, seed, size):
    histories = make_histories(lengths, num_behaviours=1)
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, len(lengths), size)
    starts = rng.integers(0, np.asarray(lengths)[indices] + 1)
    taken = histories.take(indices, starts, np.asarray(lengths)[indices] - starts)
    for place, (index, start) in enumerate(zip(indices, starts, strict=True)):
        here = slice(taken.offsets[place], taken.offsets[place + 1])
        there = slice(histories.offsets[index] + start, histories.offsets[index + 1])
        np.testing.assert_array_equal(taken.item_ids[here], histories.item_ids[there])
        np.testing.assert_array_equal(taken.timestamps[here], histories.timestamps[there])
        np.testing.assert_array_equal(taken.labels[here], histories.labels[there])


def test_metadata_survives_json(in_memory):
    values = json.loads(json.dumps(in_memory.metadata.to_json()))
    assert DatasetMetadata.from_json({**values, "of_a_newer_writer": 1}) == in_memory.metadata
    del values["split"]
    with pytest.raises(ValueError, match=r"lacks \['split'\]"):
        DatasetMetadata.from_json(values)


def remove_statistics(directory):
    (directory / "statistics.json").unlink()


def break_statistics(directory):
    (directory / "statistics.json").write_text("{", encoding="utf-8")


def remove_histories(directory):
    for path in (directory / "histories").iterdir():
        path.unlink()


def drop_a_user(directory):
    table = pq.read_table(directory / "users.parquet")
    pq.write_table(table.slice(0, 7), directory / "users.parquet")
    rewrite_metadata(directory, num_users=7, num_events=int(LENGTHS[:7].sum()))


def swap_lengths(directory):
    table = pq.read_table(directory / "users.parquet")
    lengths = table["length"].to_pylist()
    lengths[0], lengths[3] = lengths[3], lengths[0]
    columns = {"train_end": [0] * 8, "validation_end": [0] * 8, "length": lengths}
    pq.write_table(pa.table({"user_id": table["user_id"], **columns}), directory / "users.parquet")


def cross_the_cuts(directory):
    table = pq.read_table(directory / "users.parquet").to_pydict()
    table["train_end"][3] = 31
    pq.write_table(pa.table(table), directory / "users.parquet")


def miscount_items(directory):
    rewrite_metadata(directory, num_items=41)


def rewrite_metadata(directory, **changes):
    path = directory / "statistics.json"
    statistics = json.loads(path.read_text(encoding="utf-8"))
    statistics["metadata"] |= changes
    path.write_text(json.dumps(statistics), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_statistics, r"not a prepared dataset: statistics\.json is missing.*jaxrec\.prepare"),
        (break_statistics, r"statistics\.json.* cannot be read"),
        (remove_histories, "no readable histories"),
        (drop_a_user, "8 histories, but .* 7 users"),
        (swap_lengths, "user 0 has 20 bytes of item_ids .* 30 events"),
        (cross_the_cuts, "user 3 has train_end=31"),
        (miscount_items, "num_items=41, but the tables hold 40"),
    ],
)
def test_a_damaged_directory_is_named(tmp_path, in_memory, damage, message):
    directory = write_directory(tmp_path / "prepared", in_memory)
    damage(directory)
    with pytest.raises(ValueError, match=message):
        PreparedDataset.open(directory)


def test_impossible_histories_are_named():
    histories = make_histories([3, 4], num_behaviours=2)
    with pytest.raises(ValueError, match=r"item ids must lie in 1 \.\. num_items=5"):
        PreparedDataset.from_histories(histories, num_items=5)
    with pytest.raises(ValueError, match="1 behaviours are named, but the labels have 2"):
        PreparedDataset.from_histories(histories, behaviours=("one",))
    with pytest.raises(ValueError, match="both train_end and validation_end"):
        PreparedDataset.from_histories(histories, train_end=np.array([1, 1]))
    with pytest.raises(ValueError, match="user 1 has train_end=3"):
        PreparedDataset.from_histories(histories, train_end=np.array([1, 3]), validation_end=np.array([2, 2]))
    with pytest.raises(ValueError, match="1 and 1 cut points are given for 2 users"):
        PreparedDataset.from_histories(histories, train_end=np.array([1]), validation_end=np.array([2]))
