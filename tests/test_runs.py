"""A run on disk, from training to answers: causal and masked models, on other meshes, after damage."""

import dataclasses
import json
import pathlib
import shutil
import xml.etree.ElementTree

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec import interference
from jaxrec.config import load_config, write_run_config
from jaxrec.data.config import GlobalTime, LeaveOneOut
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.prepare import prepare, prepared_fingerprint
from jaxrec.evaluation.user_ranking import UserRanker, evaluation_rows
from jaxrec.runs import dataset_of_run, load_run, open_dataset
from jaxrec.tasks.masked_item import MaskedItem
from jaxrec.train import main, train_run, validation_users
from jaxrec.training.checkpoint import DamagedCheckpointError

DEBUG = pathlib.Path(__file__).parent.parent / "configs" / "debug.py"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Forty users whose events have ratings."""
    path = tmp_path_factory.mktemp("events")
    random = np.random.default_rng(0)
    users = np.repeat(np.arange(40), random.integers(4, 12, 40))
    events = {
        "user_id": [f"user {u}" for u in users],
        "item_id": random.integers(100, 160, len(users)),
        "timestamp": 10**9 + np.arange(len(users)),
        "rating": random.integers(1, 6, len(users)),
    }
    pq.write_table(pa.table(events), path / "events.parquet")
    return path


def config_for(directory, **changes):
    config = load_config(str(DEBUG))
    data = dataclasses.replace(config.data, path=str(directory))
    quick = {"num_train_steps": 4, "checkpoint_every_steps": 2, "log_every_steps": 2}
    return dataclasses.replace(config, data=data, **(quick | changes))


@pytest.fixture(scope="module", params=["causal", "masked"])
def workdir(request, directory, tmp_path_factory):
    """A trained run whose best state was kept."""
    path = tmp_path_factory.mktemp(request.param)
    evaluation = dataclasses.replace(load_config(str(DEBUG)).evaluation, every_steps=2, max_users=20)
    config = config_for(directory, evaluation=evaluation)
    if request.param == "masked":
        config = dataclasses.replace(config, tasks={"masked_item": MaskedItem()})
    train_run(config, path)
    return path


def ranks_of(workdir, mesh_shape, rows_per_batch):
    run = load_run(workdir, mesh_shape=mesh_shape)
    with jax.set_mesh(run.mesh):
        rows = evaluation_rows(run, "test", rows_per_batch=rows_per_batch)
        ranks, _ = UserRanker(run, top_k=5).rank(rows)
        # Another number of rows packs other users into the first batch.
        batch = evaluation_rows(run, "test", rows_per_batch=8).build(0)
        logits = run.behaviour_logits(batch) if run.setup.outputs.num_behaviours else None
    return ranks, logits


def test_results_do_not_depend_on_mesh_or_batch(workdir):
    first, logits = ranks_of(workdir, (8, 1), 8)
    assert len(first) == 40
    assert (first.ranks >= 0).all()
    assert (logits is None) == (load_run(workdir).config.tasks.keys() == {"masked_item"})
    other, other_logits = ranks_of(workdir, (2, 4), 16)
    np.testing.assert_array_equal(first.ranks, other.ranks)
    np.testing.assert_array_equal(first.top_item_ids, other.top_item_ids)
    np.testing.assert_allclose(first.top_scores, other.top_scores, atol=1e-5)
    if logits is not None:
        np.testing.assert_allclose(logits, other_logits, atol=1e-5)


def test_the_interference_of_tasks_is_measured(workdir, capsys):
    arguments = [f"--workdir={workdir}", "--batches=3"]
    if load_run(workdir).config.tasks.keys() == {"masked_item"}:
        assert interference.main(arguments) == 2
        assert "tasks=masked_item: one task has no other to interfere with" in capsys.readouterr().err
        return
    assert interference.main(arguments) == 0
    values = json.loads((workdir / "interference.json").read_text())
    assert list(values["parts"]) == ["all", "embedding", "block 0", "block 1", "behaviour_head", "projection"]
    assert [pair["tasks"] for pair in values["parts"]["block 1"]["pairs"]] == [
        ["next_item", "masked_item"], ["next_item", "behaviour"], ["masked_item", "behaviour"],
    ]  # fmt: skip
    for part, found in values["parts"].items():
        assert all(
            -1 <= pair["interval"][0] <= pair["cosine"] <= pair["interval"][1] <= 1 for pair in found["pairs"]
        )
        moved = {"behaviour"} if part == "behaviour_head" else {"next_item", "masked_item", "behaviour"}
        assert {name for name, norm in found["norms"].items() if norm > 0} == moved
    assert "behaviour_head" in capsys.readouterr().out
    xml.etree.ElementTree.parse(workdir / "interference.svg")


def test_a_damaged_best_state_gives_way_to_the_newest(workdir, caplog):
    (step,) = (workdir / "best").glob("[0-9]*")
    largest = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    try:
        largest.write_bytes(content[: len(content) // 2])
        assert load_run(workdir).step == 4
        assert "taking the newest checkpoint of the run instead" in caplog.text
    finally:
        largest.write_bytes(content)


def test_a_workdir_without_a_checkpoint_says_so(directory, tmp_path):
    never = dataclasses.replace(load_config(str(DEBUG)).evaluation, every_steps=0)
    train_run(config_for(directory, evaluation=never), tmp_path)
    for step in (tmp_path / "checkpoints").glob("[0-9]*"):
        step.rename(tmp_path / f"moved-{step.name}")
    with pytest.raises(ValueError, match="holds no complete checkpoint yet"):
        load_run(tmp_path)
    (tmp_path / "moved-4").rename(tmp_path / "checkpoints" / "4")
    manifest = tmp_path / "checkpoints" / "4" / "manifest.json"
    data_file = max(
        (path for path in manifest.parent.rglob("*") if path.is_file() and path != manifest),
        key=lambda path: path.stat().st_size,
    )
    data_file.write_bytes(b"")
    with pytest.raises(DamagedCheckpointError):
        load_run(tmp_path)


def test_bad_input_ends_the_entry_with_one_line(directory, tmp_path, capsys):
    arguments = [f"--config={DEBUG}", f"--workdir={tmp_path}", f"--config.data.path={directory}"]
    assert main([*arguments, "--config.global_batch_size=12"]) == 2
    assert "global_batch_size=12 does not divide evenly over 8 devices" in capsys.readouterr().err
    assert main([*arguments[:2], "--config.data.path=/nowhere"]) == 2
    assert "/nowhere" in capsys.readouterr().err


def test_where_a_run_cannot_start_is_said_and_leaves_nothing(workdir, directory, tmp_path):
    itself = config_for(directory, init_from=str(tmp_path / "run" / ".." / "run"))
    with pytest.raises(ValueError, match="is the run's own workdir; name another run"):
        train_run(itself, tmp_path / "run")
    with pytest.raises(ValueError, match="nowhere holds no run"):
        train_run(config_for(directory, init_from=str(tmp_path / "nowhere")), tmp_path / "run")
    wider = dataclasses.replace(load_config(str(DEBUG)).model, item_dim=12)
    with pytest.raises(ValueError, match=r"projection is \[16, 8\] there and \[16, 12\] here"):
        train_run(config_for(directory, init_from=str(workdir), model=wider), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_task_without_its_column_is_named(tmp_path, capsys):
    events = {"user_id": [1, 1, 1, 1], "item_id": [1, 2, 3, 4], "timestamp": [1, 2, 3, 4]}
    pq.write_table(pa.table(events), tmp_path / "events.parquet")
    arguments = [f"--config={DEBUG}", f"--workdir={tmp_path / 'run'}", f"--config.data.path={tmp_path}"]
    assert main(arguments) == 2
    assert "task Behaviour needs behaviour labels" in capsys.readouterr().err


def test_prepared_data_are_opened_where_they_are(directory, tmp_path):
    first = open_dataset(config_for(directory), tmp_path)
    again = open_dataset(config_for(tmp_path / "data"), tmp_path / "elsewhere")
    assert again.metadata == first.metadata
    assert not (tmp_path / "elsewhere").exists()


@pytest.fixture
def own_run(directory, tmp_path):
    """A run whose source may be changed: (source, workdir, keys of its items)."""
    source, path = tmp_path / "source", tmp_path / "run"
    shutil.copytree(directory, source)
    never = dataclasses.replace(load_config(str(DEBUG)).evaluation, every_steps=0)
    config = config_for(source, evaluation=never, num_train_steps=1)
    keys = open_dataset(config, path).item_keys
    write_run_config(path, config, data_fingerprint=prepared_fingerprint(path / "data"))
    return config, source, path, keys


def rewrite(source):
    events = pq.read_table(source / "events.parquet")
    reversed_ids = pa.array(events["item_id"].to_numpy()[::-1])
    pq.write_table(events.set_column(1, "item_id", reversed_ids), source / "events.parquet")


def test_a_run_keeps_its_data_whatever_becomes_of_their_source(own_run):
    config, source, path, keys = own_run
    rewrite(source)
    np.testing.assert_array_equal(dataset_of_run(config, path).item_keys, keys)
    shutil.rmtree(source)
    np.testing.assert_array_equal(dataset_of_run(config, path).item_keys, keys)


def test_lost_data_are_prepared_again_only_where_they_are_the_same(own_run):
    config, source, path, keys = own_run
    shutil.rmtree(path / "data")
    np.testing.assert_array_equal(dataset_of_run(config, path).item_keys, keys)
    shutil.rmtree(path / "data")
    rewrite(source)
    with pytest.raises(ValueError, match="Bring the former data back"):
        dataset_of_run(config, path)
    prepare(config.data, source.with_name("prepared"))
    moved = dataclasses.replace(
        config, data=dataclasses.replace(config.data, path=str(source.parent / "prepared"))
    )
    with pytest.raises(ValueError, match="prepared has [0-9a-f]+ now"):
        dataset_of_run(moved, path)


def test_a_refused_training_leaves_the_data_of_the_run(own_run):
    config, source, path, keys = own_run
    other_split = dataclasses.replace(config.data, split=LeaveOneOut(min_events=5))
    with pytest.raises(ValueError, match="belongs to another run: data.split.min_events was 3, and is 5"):
        train_run(dataclasses.replace(config, data=other_split), path)
    rewrite(source)
    with pytest.raises(ValueError, match="take another --workdir"):
        train_run(config, path)
    np.testing.assert_array_equal(PreparedDataset.open(path / "data").item_keys, keys)


def test_validation_asks_those_who_have_a_target(directory, tmp_path):
    config = config_for(directory)
    events = pq.read_table(directory / "events.parquet")
    times = 10**9 + np.random.default_rng(1).permutation(len(events))
    pq.write_table(events.set_column(2, "timestamp", pa.array(times)), tmp_path / "events.parquet")
    split = GlobalTime(validation_quantile=0.9, test_quantile=0.95)
    late = dataclasses.replace(config.data, path=str(tmp_path), split=split)
    some = dataclasses.replace(config.evaluation, max_users=2, every_steps=1)
    config = dataclasses.replace(config, data=late, evaluation=some)
    dataset = open_dataset(config, tmp_path / "late")
    users = validation_users(config, dataset)
    asked = (dataset.validation_end > dataset.train_end) & (dataset.train_end > 0)
    assert len(users) == 2 < asked.sum() < dataset.metadata.num_users
    assert asked[users].all()
    nobody = dataclasses.replace(config.data, split=LeaveOneOut(validation=False))
    config = dataclasses.replace(config, data=nobody)
    with pytest.raises(ValueError, match="every_steps=1, and no user has a validation event"):
        validation_users(config, open_dataset(config, tmp_path / "nobody"))


def test_validation_may_ask_some_users_only(directory, tmp_path):
    dataset = open_dataset(config_for(directory), tmp_path)
    some = dataclasses.replace(load_config(str(DEBUG)).evaluation, max_users=7)
    users = validation_users(config_for(directory, evaluation=some), dataset)
    assert len(users) == 7
    assert (np.diff(users) > 0).all()
    all_users = dataclasses.replace(some, max_users=0)
    assert validation_users(config_for(directory, evaluation=all_users), dataset) is None
