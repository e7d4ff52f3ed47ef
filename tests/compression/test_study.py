"""The command on a trained run: what it writes, that it goes on where it stopped, that files give what was measured."""

import dataclasses
import json
import pathlib
import shutil
import xml.etree.ElementTree as ET

import jax
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from jaxrec import compress
from jaxrec.compression.files import ARRAYS_FILE, DESCRIPTION_FILE, read_model
from jaxrec.compression.pruning import PrunedHeads
from jaxrec.compression.served import RescoredRun, compressed_run, rank_users
from jaxrec.config import load_config
from jaxrec.core.mesh import make_mesh
from jaxrec.metrics.ranking import mean_metrics
from jaxrec.runs import load_run, open_dataset, setup_run
from jaxrec.tasks.distillation import Distillation
from jaxrec.tasks.next_item import NextItem
from jaxrec.train import train_run

DEBUG = pathlib.Path(__file__).parents[2] / "configs" / "debug.py"
METHODS = ("int8", "pq_rescored", "pruned_layers")


def config_for(directory, **changes):
    config = load_config(str(DEBUG))
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=str(directory)),
        tasks={"next_item": NextItem()},
        num_train_steps=4,
        checkpoint_every_steps=4,
        evaluation=dataclasses.replace(config.evaluation, every_steps=0, bootstrap_samples=100),
        **changes,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A trained run, and a student that learned from it with half the layers."""
    base = tmp_path_factory.mktemp("runs")
    random = np.random.default_rng(0)
    users = np.repeat(np.arange(40), random.integers(4, 12, 40))
    events = {
        "user_id": [f"user {u}" for u in users],
        "item_id": random.integers(100, 160, len(users)),
        "timestamp": 10**9 + np.arange(len(users)),
    }
    (base / "events").mkdir()
    pq.write_table(pa.table(events), base / "events" / "events.parquet")
    config = config_for(base / "events")
    train_run(config, base / "teacher")
    small = dataclasses.replace(config.model.encoder, num_layers=1)
    student = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, encoder=small),
        tasks=config.tasks | {"distillation": Distillation(teacher=str(base / "teacher"), temperature=2.0)},
    )
    train_run(student, base / "student")
    return base


@pytest.fixture(scope="module")
def out(runs):
    """What the command has written."""
    assert compress.main(arguments(runs)) == 0
    return runs / "out"


def arguments(runs, **changes):
    given = {
        "workdir": runs / "teacher",
        "out": runs / "out",
        "methods": ",".join(METHODS),
        "beside": runs / "student",
        "repeats": 2,
    } | changes
    return [f"--{name}={value}" for name, value in given.items()]


def test_the_summary_holds_bytes_quality_and_latency(runs, out):
    values = json.loads((out / "compression.json").read_text())
    systems = values["systems"]
    assert set(systems) == {"original", "beside-student", *METHODS}
    run = load_run(runs / "teacher")
    with jax.set_mesh(run.mesh):
        expected = mean_metrics(rank_users(run, "test").ranks, run.config.evaluation.ks)
    assert systems["original"]["metrics"] == expected
    for name, row in systems.items():
        assert row["latency_ms"] > 0
        assert row["share_of_bytes"] == row["num_bytes"] / systems["original"]["num_bytes"]
        if name != "original":
            assert row["num_bytes"] < systems["original"]["num_bytes"]
            low, high = row["against_original"]["ndcg@10"]["interval"]
            assert low <= row["against_original"]["ndcg@10"]["difference"] <= high
    heavier = [
        name for name in METHODS if systems[name]["num_bytes"] >= systems["beside-student"]["num_bytes"]
    ]
    assert {name for name in METHODS if "rival" in systems[name]} == set(heavier)
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3 and "pruned_layers" in page
    for drawing in page.split("<svg")[1:]:
        ET.fromstring("<svg" + drawing.split("</svg>")[0] + "</svg>")


def test_bytes_are_those_of_the_file(out):
    for name in METHODS:
        found, path = read_model(out / name), out / name / ARRAYS_FILE
        header = int.from_bytes(path.read_bytes()[:8], "little") + 8
        assert path.stat().st_size - header == found.num_bytes


@pytest.mark.parametrize("method", ["int8", "pq_rescored"])
def test_a_directory_gives_what_was_measured_on_every_mesh(runs, out, mesh, method):
    model = read_model(out / method)
    run = compressed_run(model, open_dataset(model.config, runs / "teacher"), mesh)
    assert isinstance(run, RescoredRun) == (method == "pq_rescored")
    found = rank_users(run, "test")
    measured = json.loads((out / method / "measured.json").read_text())
    assert mean_metrics(found.ranks, run.config.evaluation.ks) == measured["metrics"]
    np.testing.assert_array_equal(found.ranks, pq.read_table(out / method / "ranks.parquet")["rank"])


def test_the_command_goes_on_where_it_stopped(runs, out):
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/measured.json")}
    (out / "int8" / "measured.json").unlink()
    assert compress.main(arguments(runs)) == 0
    after = {path: path.stat().st_mtime_ns for path in before}
    assert [path.parent.name for path in before if after[path] != before[path]] == ["int8"]


def test_a_method_that_cannot_be_applied_is_noted_and_the_others_go_on(
    runs, out, tmp_path, monkeypatch, capsys
):
    shutil.copytree(out, tmp_path / "out")
    monkeypatch.setitem(compress.METHODS, "pruned_heads", PrunedHeads(keep=0.9))  # of two heads
    given = {"out": tmp_path / "out", "beside": ""}
    assert compress.main(arguments(runs, methods="pruned_heads,int8", **given)) == 0
    values = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert set(values["systems"]) == {"original", "int8"}
    reason = "the encoder has 2 heads, and keep=0.9 leaves all; nothing is pruned."
    assert values["refused"] == {"pruned_heads": reason}
    said = f"pruned_heads cannot be applied: {reason}"
    assert said in " ".join(capsys.readouterr().out.split())
    assert said in (tmp_path / "out" / "report.html").read_text()
    assert compress.main(arguments(runs, methods="pruned_heads", **given)) == 2
    assert "no method can be applied" in capsys.readouterr().err


def test_a_pruned_run_can_be_opened(runs, out):
    pruned, original = load_run(out / "pruned_layers" / "run"), load_run(runs / "teacher")
    assert pruned.config.model.encoder.num_layers == 1
    np.testing.assert_array_equal(*(np.asarray(run.inference.tables["item"]) for run in (pruned, original)))


def test_a_teacher_knows_the_same_items(runs, tmp_path):
    events = pq.read_table(runs / "events" / "events.parquet")
    at = events.column_names.index("item_id")
    moved = events.set_column(at, "item_id", pc.add(events["item_id"], 1))
    (tmp_path / "events").mkdir()
    pq.write_table(moved, tmp_path / "events" / "events.parquet")
    tasks = {"next_item": NextItem(), "distillation": Distillation(teacher=str(runs / "teacher"))}
    config = dataclasses.replace(config_for(tmp_path / "events"), tasks=tasks)
    with pytest.raises(ValueError, match="items of its own"):
        setup_run(config, open_dataset(config, tmp_path), make_mesh((8, 1)))


def test_rescoring_ranks_candidates_by_the_rows_of_the_table(runs, out):
    """Where every item is a candidate, the ranks are those of the rows alone."""
    model = read_model(out / "pq_rescored")
    dataset = open_dataset(model.config, runs / "teacher")
    with jax.set_mesh(mesh := make_mesh((1, 1), jax.devices()[:1])):
        rescored = compressed_run(dataclasses.replace(model, num_candidates=60), dataset, mesh)
        codes = {name: code for name, code in model.codes.items() if not name.startswith("scan.")}
        exact = compressed_run(dataclasses.replace(model, num_candidates=0, codes=codes), dataset, mesh)
        a, b = rank_users(rescored, "test"), rank_users(exact, "test")
        assert (
            np.mean(np.abs(a.ranks - b.ranks)) < 0.5
        )  # scores are rounded otherwise: ties may fall otherwise


def break_description(directory, **changes):
    path = directory / DESCRIPTION_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut_arrays(directory):
    path = directory / ARRAYS_FILE
    path.write_bytes(path.read_bytes()[:-7])


def widen(directory):
    path = directory / DESCRIPTION_FILE
    values = json.loads(path.read_text())
    values["codes"]["table.item"]["full_shape"] = [10**9, 8]
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / DESCRIPTION_FILE).unlink(), "holds no compressed model"),
        (lambda d: break_description(d, format=9), "format 9 is not 1"),
        (lambda d: break_description(d, codes=[]), "is damaged"),
        (lambda d: break_description(d, codes={}), "alone"),
        (cut_arrays, "cannot be read"),
        (widen, "table.item: values is int8"),
    ],
)
def test_damage_is_an_error_that_names_the_file(out, tmp_path, damage, words):
    shutil.copytree(out / "int8", tmp_path / "int8")
    damage(tmp_path / "int8")
    with pytest.raises(ValueError, match=words):
        read_model(tmp_path / "int8")


def test_arguments_that_do_not_fit_are_errors(runs, out, capsys):
    assert compress.main(arguments(runs, workdir=runs / "student")) == 2
    assert "take another --out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compress.main(arguments(runs, methods="int7"))
    assert "methods='int7' is unknown" in capsys.readouterr().err
    model = read_model(out / "int8")
    dataset = open_dataset(model.config, runs / "teacher")
    with pytest.raises(ValueError, match="trained on data of fingerprint other"):
        compressed_run(dataclasses.replace(model, fingerprint="other"), dataset, make_mesh((8, 1)))
    codes = {name: code for name, code in model.codes.items() if name != "dense.mask_vector"}
    with pytest.raises(ValueError, match="dense.mask_vector has the shape None"):
        compressed_run(dataclasses.replace(model, codes=codes), dataset, make_mesh((8, 1)))
