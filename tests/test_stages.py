"""Stages: plain configs in a row, each from the one before; stopped anywhere they end in the same bits."""

import dataclasses
import logging
import pathlib

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec import evaluate, recommend
from jaxrec.config import (
    Stage,
    TrainConfig,
    from_json,
    load_config,
    note_stages,
    override_run,
    run_directory,
    stage_configs,
    to_json,
    validate,
)
from jaxrec.data.vocabulary import known_ids
from jaxrec.models.two_tower import ITEM, ITEM_BIAS
from jaxrec.runs import load_run, start_of
from jaxrec.tasks.behaviour import Behaviour
from jaxrec.tasks.masked_item import MaskedItem
from jaxrec.tasks.next_item import NextItem
from jaxrec.train import train_workdir
from jaxrec.training.checkpoint import Checkpoints
from jaxrec.training.loop import restore
from jaxrec.training.rates import by_path
from jaxrec.training.state import to_checkpoint

DEBUG = pathlib.Path(__file__).parent.parent / "configs" / "debug.py"
NAMES = ("pretrain", "finetune")


def toy(**changes):
    base = TrainConfig(name="toy", tasks={"a": NextItem()}, num_train_steps=10, global_batch_size=8)
    stages = {"first": Stage(tasks={"b": MaskedItem()}), "second": Stage(num_train_steps=3)}
    return dataclasses.replace(base, **{"stages": stages, **changes})


def test_a_stage_is_a_plain_config(tmp_path):
    runs = stage_configs(toy(init_from="elsewhere", init_without=("item",)), tmp_path)
    plain = toy(stages={})
    assert runs == {
        "first": dataclasses.replace(
            plain, name="toy-first", tasks={"b": MaskedItem()}, init_from="elsewhere", init_without=("item",)
        ),
        "second": dataclasses.replace(
            plain, name="toy-second", num_train_steps=3, init_from=str(tmp_path / "first")
        ),
    }
    assert stage_configs(plain, tmp_path) == {}
    assert from_json(to_json(toy()), TrainConfig) == toy()


@pytest.mark.parametrize(
    ("given", "expected"),
    [("", ""), ("runs/other", "runs/other"), ("first", "DIR/first"), (None, "DIR/second")],
)
def test_where_a_stage_starts(given, expected):
    stages = {"first": Stage(), "second": Stage(), "third": Stage(init_from=given, init_without=("user",))}
    third = stage_configs(toy(stages=stages), pathlib.Path("DIR"))["third"]
    assert (third.init_from, third.init_without) == (expected, ("user",))


def test_overrides_of_a_stage_start_from_the_run():
    config = override_run(
        toy(),
        [
            "--config.stages.second.model.encoder.num_layers=3",
            "--config.stages.third=Stage",
            "--config.stages.third.tasks.a.weight=2",
            "--config.stages.first.tasks.b.mask_rate=0.5",
            "--config.stages.first.optimizer.rates.encoder.*=0",
            "--config.model.item_dim=16",
            "--config.tasks.a.weight=3",
        ],
    )
    runs = stage_configs(config, pathlib.Path("DIR"))
    assert [run.model.item_dim for run in runs.values()] == [16] * 3
    assert [run.model.encoder.num_layers for run in runs.values()] == [2, 3, 2]
    assert runs["third"].tasks == {"a": NextItem(weight=2.0)}
    assert runs["second"].tasks == {"a": NextItem(weight=3.0)}
    assert runs["first"].tasks == {"b": MaskedItem(mask_rate=0.5)}
    assert runs["first"].optimizer.rates == {"encoder.*": 0.0}
    with pytest.raises(ValueError, match=r"config.stages has no key 'secnd'; did you mean 'second'"):
        override_run(toy(), ["--config.stages.secnd.model.item_dim=3"])
    with pytest.raises(ValueError, match=r"config.stages.second has no field 'task'; did you mean 'tasks'"):
        override_run(toy(), ["--config.stages.second.task.a.weight=3"])


def test_a_workdir_keeps_its_stages(tmp_path):
    assert run_directory(tmp_path) == tmp_path
    note_stages(tmp_path, ["first"])
    note_stages(tmp_path, ["first", "second"])
    assert run_directory(tmp_path) == tmp_path / "second"
    for others in (["second"], ["first", "new", "second"], ["first"], []):
        with pytest.raises(ValueError, match="holds the stages first, second, and the config has"):
            note_stages(tmp_path, others)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run without stages; take another --workdir"):
        note_stages(tmp_path / "plain", ["first"])
    (tmp_path / "stages.json").write_text('["../elsewhere"]')
    with pytest.raises(ValueError, match=r"stages.json does not list the names of stages"):
        run_directory(tmp_path)


def test_what_is_wrong_with_stages_is_said():
    with pytest.raises(ValueError, match="stages=first, second are several runs; take one"):
        validate(toy(), num_devices=8)
    with pytest.raises(ValueError, match="stage name '../up' must consist of letters"):
        stage_configs(toy(stages={"../up": Stage()}), pathlib.Path("DIR"))


@pytest.mark.parametrize("entry", [evaluate, recommend])
def test_the_entries_mean_the_last_stage(entry, tmp_path, monkeypatch, capsys):
    note_stages(tmp_path, NAMES)

    def refuse(workdir, *, mesh_shape):
        raise ValueError(f"asked for {workdir.name}")

    monkeypatch.setattr(entry, "load_run", refuse)
    out = [f"--out={tmp_path / 'out.csv'}"] if entry is recommend else []
    assert entry.main([f"--workdir={tmp_path}", *out]) == 2
    assert "asked for finetune" in capsys.readouterr().err


def write_events(path, items):
    random = np.random.default_rng(len(items))
    users = np.repeat(np.arange(40), random.integers(4, 12, 40))
    events = {
        "user_id": users,
        "item_id": random.choice(items, len(users)),
        "timestamp": 10**9 + np.arange(len(users)),
        "rating": random.integers(1, 6, len(users)),
    }
    path.mkdir()
    pq.write_table(pa.table(events), path / "events.parquet")
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Pre-trained on one data set, fine-tuned on another that shares half of its items."""
    base = load_config(str(DEBUG))
    root = tmp_path_factory.mktemp("data")
    first, second = (
        dataclasses.replace(base.data, path=str(write_events(root / name, items)))
        for name, items in (("first", np.arange(100, 160)), ("second", np.arange(130, 180)))
    )
    return dataclasses.replace(
        base,
        data=first,
        model=dataclasses.replace(base.model, encoder=dataclasses.replace(base.model.encoder, num_layers=1)),
        checkpoint_every_steps=2,
        log_every_steps=2,
        num_train_steps=4,
        evaluation=dataclasses.replace(base.evaluation, every_steps=4, max_users=20),
        stages={
            "pretrain": Stage(tasks={"masked_item": MaskedItem()}),
            "finetune": Stage(
                data=second,
                tasks={"next_item": NextItem(), "behaviour": Behaviour()},
                optimizer=dataclasses.replace(base.optimizer, rates={"encoder.*": 0.0, ITEM: 0.0}),
            ),
        },
    )


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    train_workdir(config, workdir)
    return workdir


def newest_state(workdir):
    """The newest checkpoint of the last stage, in the order of its files."""
    run = load_run(run_directory(workdir))
    with jax.set_mesh(run.mesh):
        with Checkpoints(str(run_directory(workdir) / "checkpoints"), keep=1, save_every_steps=1) as newest:
            state = restore(run.setup, run.setup.init_state(), newest)
        return jax.tree.map(np.array, to_checkpoint(state, run.setup.tables, run.mesh))


def test_a_stage_starts_from_the_best_of_the_one_before(uninterrupted):
    before, after = (load_run(uninterrupted / name) for name in NAMES)
    for name, found in by_path(after.inference.dense["encoder"]).items():
        np.testing.assert_array_equal(found, by_path(before.inference.dense["encoder"])[name], err_msg=name)
    ids = known_ids(after.dataset.item_keys, before.dataset.item_keys)
    with jax.set_mesh(after.mesh):
        fresh = np.asarray(
            to_checkpoint(after.setup.init_state(), after.setup.tables, after.mesh)["tables"][ITEM]
        )
    rows = [logical(run, ITEM) for run in (before, after)]
    taken = np.flatnonzero(ids)
    assert 0 < len(taken) < len(ids) - 1
    np.testing.assert_array_equal(rows[1][taken], rows[0][ids[taken]])
    others = np.setdiff1d(np.arange(len(ids)), taken)
    np.testing.assert_array_equal(rows[1][others], fresh[others])
    assert np.any(after.inference.dense["behaviour_head"]["out"]["kernel"])
    assert np.any(logical(after, ITEM_BIAS)[taken] != logical(before, ITEM_BIAS)[ids[taken]])
    assert after.config.init_from == "../pretrain"


def logical(run, name):
    """The rows that a run evaluates with, by id."""
    shards = run.mesh.size
    table = np.asarray(run.inference.tables[name])
    return table.reshape(shards, -1, table.shape[1]).swapaxes(0, 1).reshape(table.shape)


def test_stops_change_no_bit(config, uninterrupted, tmp_path, monkeypatch, caplog):
    def stop(self, done):
        if self.directory.parent.name == "finetune" and done == 3:
            raise KeyboardInterrupt
        return self.directory.parent.name == "pretrain" and done == 2

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "reached_preemption", stop)
        train_workdir(config, tmp_path)
        assert (tmp_path / "pretrain" / "checkpoints" / "2").exists()
        assert not (tmp_path / "finetune" / "config.json").exists(), "a stage waits for the one before"
        with pytest.raises(KeyboardInterrupt):
            train_workdir(config, tmp_path)
    metrics = tmp_path / "pretrain" / "metrics.jsonl"
    written = metrics.stat().st_mtime_ns
    caplog.clear()
    with caplog.at_level(logging.INFO):
        train_workdir(config, tmp_path)
    assert "pretrain is trained: 4 steps" in caplog.text
    assert metrics.stat().st_mtime_ns == written
    assert f"resuming from step 2 of {tmp_path / 'finetune'}" in caplog.text
    assert "starting from" not in caplog.text
    jax.tree.map(np.testing.assert_array_equal, newest_state(tmp_path), newest_state(uninterrupted))


def test_a_finished_stage_keeps_its_config(config, uninterrupted):
    other = dataclasses.replace(config, seed=5)
    with pytest.raises(ValueError, match="pretrain belongs to another run: seed was 0, and is 5"):
        train_workdir(other, uninterrupted)


def test_what_is_wrong_with_a_later_stage_is_said_first(config, tmp_path):
    bad = override_run(config, ["--config.stages.finetune.optimizer.rates.decoder.*=0"])
    with pytest.raises(ValueError, match=r"decoder.*matches no parameter"):
        train_workdir(bad, tmp_path)
    assert not (tmp_path / "stages.json").exists()
    assert not (tmp_path / "pretrain" / "config.json").exists()


def test_a_run_may_start_from_stages(config, uninterrupted, tmp_path):
    plain = stage_configs(config, uninterrupted)["finetune"]
    again = dataclasses.replace(plain, init_from=str(uninterrupted))
    last = load_run(uninterrupted / "finetune")
    start = start_of(again, last.dataset, last.setup, tmp_path)
    assert start.summary()[0].startswith(
        f"starting from {uninterrupted / 'finetune' / 'best' / '4'} (averages): 23 of 23 dense parameters"
    )
    with pytest.raises(ValueError, match="is the run's own workdir"):
        start_of(again, last.dataset, last.setup, uninterrupted / "finetune")
