import itertools

import jax
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.evaluation import recommendations
from jaxrec.evaluation.recommendations import COLUMNS, find_users, read_user_ids, write_recommendations
from jaxrec.evaluation.user_ranking import UserRanks


def written(path):
    table = pyarrow.csv.read_csv(path) if path.suffix == ".csv" else pq.read_table(path)
    assert tuple(table.column_names) == COLUMNS
    lists = {}
    for row in table.to_pylist():
        lists.setdefault(row["user_id"], []).append(row)
    for rows in lists.values():
        assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
        scores = [row["score"] for row in rows]
        assert scores == sorted(scores, reverse=True)
    return lists


def items_of(lists):
    return {user: [row["item_id"] for row in rows] for user, rows in lists.items()}


@pytest.mark.parametrize("name", ["recs.parquet", "deep/recs.csv"])
def test_lists_hold_the_best_unseen_items_in_the_users_own_ids(tmp_path, make_last_item_run, name):
    run = make_last_item_run()
    run.dataset.user_keys = np.array([f"user {i}" for i in range(60)])
    run.dataset.item_keys = np.arange(1, 46) * 10**12
    counts = write_recommendations(run, tmp_path / name, split="test", k=7, rows_per_batch=8)
    lists = written(tmp_path / name)
    asked = np.flatnonzero(
        (run.dataset.validation_end > 0) & (run.dataset.lengths > run.dataset.validation_end)
    )
    assert sorted(lists) == sorted(f"user {i}" for i in asked)
    assert (counts.num_users, counts.num_rows) == (len(asked), sum(map(len, lists.values())))
    assert counts.num_without_target == 60 - len(asked)
    for user in asked:
        history = run.dataset.histories(np.array([user])).item_ids[: run.dataset.validation_end[user]]
        scores = run.vectors @ run.vectors[history[-1]] + run.bias
        scores[[0, *history]] = -np.inf
        best = np.argsort(-scores, kind="stable")[:7]
        rows = lists[f"user {user}"]
        assert [row["item_id"] for row in rows] == (best * 10**12).tolist()
        np.testing.assert_allclose([row["score"] for row in rows], scores[best], rtol=1e-5)
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == [(tmp_path / name).name]


def test_batches_and_meshes_change_nothing(tmp_path, make_last_item_run):
    for i, (mesh_shape, rows_per_batch) in enumerate([((1, 1), 64), ((2, 4), 8)]):
        run = make_last_item_run(mesh_shape)
        write_recommendations(run, tmp_path / f"{i}.parquet", split="all", k=5, rows_per_batch=rows_per_batch)
    assert written(tmp_path / "0.parquet") == written(tmp_path / "1.parquet")


def test_seen_items_stay_where_the_dataset_says_so(tmp_path, make_last_item_run, make_small_dataset):
    run = make_last_item_run(dataset=make_small_dataset(filter_seen=False))
    write_recommendations(run, tmp_path / "recs.parquet", split="all", k=45, rows_per_batch=8)
    assert all(
        sorted(items) == list(range(1, 46)) for items in items_of(written(tmp_path / "recs.parquet")).values()
    )


def test_short_catalogues_give_short_lists(tmp_path, make_last_item_run):
    run = make_last_item_run()
    write_recommendations(run, tmp_path / "recs.parquet", split="all", k=1000, rows_per_batch=8)
    for user, items in items_of(written(tmp_path / "recs.parquet")).items():
        seen = set(run.dataset.histories(np.array([user])).item_ids)
        assert set(items) == set(range(1, 46)) - seen


@pytest.mark.parametrize("name", ["recs.parquet", "recs.csv"])
def test_a_batch_with_nothing_left_to_recommend_has_the_types_of_the_others(
    tmp_path, make_small_dataset, name
):
    dataset = make_small_dataset()
    dataset.user_keys = dataset.item_keys = np.array(
        [str(i) for i in range(60)], object
    )  # as files give them

    def table(user, best):
        none, tops = np.zeros(1, np.int32), np.array([[best, 0]], np.int32)
        ranks = UserRanks(
            user_indices=np.array([user]),
            targets=none,
            ranks=none,
            top_item_ids=tops,
            top_scores=np.zeros((1, 2), np.float32),
        )
        return recommendations._table(dataset, ranks)

    tables = [table(user, best) for user, best in ((3, 0), (4, 7), (5, 0))]
    assert recommendations.write_tables(iter(tables), tmp_path / name) == 1
    assert {table.schema for table in tables} == {tables[1].schema}


def test_a_failure_leaves_the_old_file_and_no_rubbish(tmp_path, make_last_item_run):
    run = make_last_item_run()
    out = tmp_path / "recs.parquet"
    write_recommendations(run, out, split="test", k=3, rows_per_batch=8)
    before = out.read_bytes()
    answers = itertools.chain([1, 1], itertools.repeat(np.nan))
    good = run.query_fn
    run.query_fn = lambda batch: (good(batch)[0] * next(answers), None)
    with pytest.raises(ValueError, match="hold NaN"):
        write_recommendations(run, out, split="test", k=3, rows_per_batch=1)
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


def test_nobody_to_recommend_to(tmp_path, make_last_item_run, make_small_dataset):
    run = make_last_item_run(dataset=make_small_dataset(lengths=[1, 2, 0]))
    with pytest.raises(ValueError, match="use --split=all"):
        write_recommendations(run, tmp_path / "recs.parquet", split="test", k=3, rows_per_batch=8)
    counts = write_recommendations(run, tmp_path / "recs.parquet", split="all", k=3, rows_per_batch=8)
    assert (counts.num_users, counts.num_without_history) == (2, 1)


def test_only_the_first_process_writes(tmp_path, make_last_item_run, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    tables = (pa.table({"user_id": [1, 2]}) for _ in range(3))
    assert recommendations.write_tables(tables, tmp_path / "recs.parquet") == 6
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("u.txt", b"7\n\n  3 \r\n7\n"),
        ("u.txt", b"\xef\xbb\xbf7\n3"),
        ("u.csv", b"name,user_id\nx,7\ny,3\n"),
        ("u.csv", b"anything\n7\n3\n"),
    ],
)
def test_user_ids_are_read_from_text_and_csv(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read_user_ids(tmp_path / name, pa.int64()).to_pylist() == [7, 3]


def test_user_ids_are_read_from_parquet_and_keep_their_type(tmp_path):
    pq.write_table(pa.table({"user_id": ["007", "7", None], "x": [1, 2, 3]}), tmp_path / "u.parquet")
    assert read_user_ids(tmp_path / "u.parquet", pa.string()).to_pylist() == ["007", "7"]
    (tmp_path / "u.csv").write_text("user_id\n007\n")
    assert read_user_ids(tmp_path / "u.csv", pa.string()).to_pylist() == ["007"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("u.txt", b" \n", "holds no user id"),
        ("u.txt", b"\xff\xfe\x00", "cannot be read"),
        ("u.csv", b"", "cannot be read"),
        ("u.csv", b"a,b\n1,2\n", "none is called user_id"),
        ("u.parquet", b"no parquet", "cannot be read"),
        ("u.txt", b"7\nseven\n", "of type int64, and .*seven"),
        ("u.txt", b"99999999999999999999\n", "of type int64"),
    ],
)
def test_files_that_hold_no_user_ids_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_user_ids(tmp_path / name, pa.int64())


@pytest.mark.parametrize("ids", [pa.array([[1]]), pa.array([{"a": 1}]), pa.array([1], pa.date32())])
def test_user_ids_of_a_type_that_is_none_of_ids_are_named(tmp_path, ids):
    pq.write_table(pa.table({"user_id": ids}), tmp_path / "u.parquet")
    with pytest.raises(
        ValueError, match=r"of type int64, which (list|struct|date32).* cannot be turned into"
    ):
        read_user_ids(tmp_path / "u.parquet", pa.int64())


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Zl", "Zp", "Cc", "Zs"])), min_size=1))
def test_any_text_id_survives_the_file(tmp_path_factory, ids):
    path = tmp_path_factory.mktemp("users") / "u.txt"
    path.write_text("\n".join(ids), encoding="utf-8")
    expected = list(dict.fromkeys(name for name in ids if name))
    if expected and not expected[0].startswith("\ufeff"):
        assert read_user_ids(path, pa.string()).to_pylist() == expected


def test_unknown_users_are_an_error_or_reported(make_small_dataset):
    dataset = make_small_dataset()
    users, unknown = find_users(dataset, pa.array([5, 3]))
    assert users.tolist() == [3, 5]
    assert unknown == []
    with pytest.raises(
        ValueError, match="2 of 3 users are not in dataset 'small': 99, 98; .*--skip-unknown-users"
    ):
        find_users(dataset, pa.array([99, 5, 98]))
    assert find_users(dataset, pa.array([99, 5, 98]), skip_unknown=True)[1] == [99, 98]
    with pytest.raises(ValueError, match="99"):
        find_users(dataset, pa.array([99]), skip_unknown=True)
