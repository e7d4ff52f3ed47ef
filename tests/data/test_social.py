"""Edges between users as items: nothing held out is seen from either side, and no row moves another."""

import collections
import pathlib
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.data.config import DataConfig, GlobalTime
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.prepare import prepare
from jaxrec.data.social import ITEMS, MOMENTS, PEOPLE, Social


def written(directory, events, edges, edge_type=None):
    """A data set of these pairs."""
    users, items = zip(*events, strict=True)
    pq.write_table(
        pa.table({"user_id": pa.array(users), "item_id": pa.array(items)}), directory / "events.parquet"
    )
    pairs = list(zip(*edges, strict=True)) or [[], []]
    pq.write_table(
        pa.table({"user_id": pa.array(pairs[0], edge_type), "friend_id": pa.array(pairs[1], edge_type)}),
        directory / "friends.parquet",
    )
    return directory


def rows_of(source):
    return [row for batch in source.event_batches() for row in batch.to_pylist()]


def parts_of_edges(rows):
    """By edge, without direction: the parts that its rows are of."""
    found = collections.defaultdict(list)
    for row in rows:
        kind, own = (row["item_id"] or ":").split(":", 1)
        if kind == PEOPLE and own != row["user_id"]:
            found[frozenset((row["user_id"], own))].append(row["timestamp"])
    return found


PAIRS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=60)


@given(events=PAIRS, edges=PAIRS, seed=st.integers(0, 3), held_out=st.sampled_from([0.2, 0.5, 0.9]))
def test_an_edge_is_in_one_part_of_both_histories_whatever_the_directions_of_the_file(
    events, edges, seed, held_out
):
    real = {frozenset(edge) for edge in edges if edge[0] != edge[1]}
    if not real:
        return
    with tempfile.TemporaryDirectory() as name:
        path = written(pathlib.Path(name), events, edges)
        source = Social(path=str(path), edges="friends.parquet", seed=seed, held_out=held_out)
        rows = rows_of(source)
        found = parts_of_edges(rows)
        assert {frozenset(map(str, edge)) for edge in real} == set(found)
        assert all(len(parts) == 2 and len(set(parts)) == 1 for parts in found.values())
        # Each user opens the own history, and everybody who is named anywhere has one.
        firsts = [row for row in rows if row["item_id"] == f"{PEOPLE}:{row['user_id']}"]
        named = {user for user, _ in events} | {user for edge in real for user in edge}
        assert sorted(row["user_id"] for row in firsts) == sorted(map(str, named))
        assert all(row["order"] == -1 and row["timestamp"] == 0 for row in firsts)
        taken = [(row["user_id"], row["item_id"]) for row in rows if row["item_id"].startswith(f"{ITEMS}:")]
        assert taken == [(str(user), f"{ITEMS}:{item}") for user, item in events]
        turned = written(pathlib.Path(name), events, [(b, a) for a, b in reversed(edges)])
        assert found == parts_of_edges(
            rows_of(Social(path=str(turned), edges="friends.parquet", seed=seed, held_out=held_out))
        )


def test_the_prepared_parts_are_the_drawn_ones(tmp_path):
    random = np.random.default_rng(0)
    events = [(int(user), int(item)) for user in range(40) for item in random.choice(90, 20, replace=False)]
    edges = [(user, (user + step) % 40) for user in range(40) for step in (1, 2, 3, 4)]
    source = Social(path=str(written(tmp_path, events, edges)), edges="friends.parquet", held_out=0.4)
    prepare(DataConfig(source=source, split=GlobalTime(moments=MOMENTS)), tmp_path / "out")
    dataset = PreparedDataset.open(tmp_path / "out")
    assert dataset.metadata.kinds == (ITEMS, PEOPLE)
    assert np.bincount(dataset.item_kinds).tolist() == [1, len({item for _, item in events}), 40]
    expected = {(row["user_id"], row["item_id"]): row["timestamp"] for row in rows_of(source)}
    seen = {}
    for user, key in enumerate(dataset.user_keys):
        items = dataset.item_keys[dataset.histories(np.array([user])).item_ids - 1]
        cuts = [0, dataset.train_end[user], dataset.validation_end[user], dataset.lengths[user]]
        assert items[0] == f"{PEOPLE}:{key}"
        for part in range(3):
            for item in items[cuts[part] : cuts[part + 1]]:
                seen[key, item] = part
    assert seen == expected
    shares = np.bincount(list(seen.values())) / len(seen)
    assert shares[1] == pytest.approx(0.2, abs=0.05)
    assert shares[2] == pytest.approx(0.2, abs=0.05)


def test_without_friends_histories_hold_none_and_the_test_part_stays(tmp_path):
    edges = [(user, other) for user in range(20) for other in range(user)]
    path = str(written(tmp_path, [(0, 1), (1, 2)], edges))
    with_friends, without = (
        parts_of_edges(rows_of(Social(path=path, edges="friends.parquet", friends_as_input=given)))
        for given in (True, False)
    )
    assert {part for parts in with_friends.values() for part in parts} == {0, 1, 2}
    assert without == {edge: parts for edge, parts in with_friends.items() if parts[0] == 2}


def test_rows_that_are_no_edge_or_no_event_are_left_out_aloud(tmp_path, caplog):
    events = [(1, item) for item in range(20)] + [(None, 6), (2, None)]
    path = written(tmp_path, events, [(1, 2), (3, 3), (None, 1), (2, 1)])
    source = Social(path=str(path), edges="friends.parquet", held_out=0.5)
    rows = rows_of(source)
    assert len(parts_of_edges(rows)) == 1
    assert "2 rows are left out" in caplog.text
    assert sum(row["user_id"] is None for row in rows) == 2
    prepare(DataConfig(source=source, split=GlobalTime(moments=MOMENTS)), tmp_path / "out")
    assert PreparedDataset.open(tmp_path / "out").metadata.num_users == 2
    assert pq.read_table(tmp_path / "out" / "quarantine.parquet").num_rows == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edges": "knows.csv"}, "there is no .*knows.csv; name a Parquet or CSV file"),
        ({"friend": "other"}, "source.friend='other' is no column of .* which has user_id, friend_id"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, changes, message):
    written(tmp_path, [(1, 5)], [(1, 2)])
    with pytest.raises(ValueError, match=message):
        rows_of(Social(path=str(tmp_path), **{"edges": "friends.parquet"} | changes))


def test_a_file_without_an_edge_and_a_share_out_of_range_are_refused(tmp_path):
    written(tmp_path, [(1, 5)], [(1, 1)])
    with pytest.raises(ValueError, match="holds no edge between two users"):
        rows_of(Social(path=str(tmp_path), edges="friends.parquet"))
    with pytest.raises(ValueError, match=r"held_out=1.0 must lie between 0 and 1"):
        Social(path="x", edges="y", held_out=1.0)


def test_moments_cut_where_they_say(tmp_path):
    pq.write_table(
        pa.table({"user_id": [1] * 4, "item_id": [1, 2, 3, 4], "timestamp": [10, 20, 30, 40]}),
        tmp_path / "events.parquet",
    )
    prepare(DataConfig(path=str(tmp_path), split=GlobalTime(moments=(20, 40))), tmp_path / "out")
    dataset = PreparedDataset.open(tmp_path / "out")
    assert (dataset.train_end.tolist(), dataset.validation_end.tolist()) == ([1], [3])
    with pytest.raises(ValueError, match=r"moments=\(5, 4\) must be two times"):
        GlobalTime(moments=(5, 4))
