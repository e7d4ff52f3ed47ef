import importlib.util
import json
import logging

import pytest

from jaxrec.export import __main__ as entry
from jaxrec.export import exporter
from jaxrec.export.artifacts import Artifacts
from jaxrec.export.bundle import Bundle
from jaxrec.export.check import Check


@pytest.fixture(autouse=True)
def _own_logging():
    """The entry points logging at the error stream of the test, which ends with it."""
    before = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = before[0]
    logging.root.setLevel(before[1])


@pytest.fixture
def workdir(tmp_path, exported, monkeypatch):
    """A workdir that opens as the run in memory, evaluated; its artifacts are not written."""
    run = exported.run
    directory = tmp_path / "run"
    directory.mkdir()
    evaluation = {
        "split": "test",
        "protocol": "leave one out",
        "num_users": 20,
        "confidence": 0.95,
        "metrics": {"ndcg@10": 0.2, "hr@10": 0.4},
        "intervals": {"ndcg@10": [0.1, 0.3], "hr@10": [0.3, 0.5]},
        "baselines": {"popularity": {"ndcg@10": 0.1, "hr@10": 0.2}},
        "behaviours": {"click": {"auc": 0.75, "log_loss": 0.5}},
        "model": {"step": 7},
    }
    (directory / "evaluation.json").write_text(json.dumps(evaluation))
    monkeypatch.setattr(
        exporter, "load_state", lambda *_, **__: (run.config, run.dataset, run.setup, exported.state)
    )
    checks = [Check(artifact="StableHLO", program="rank", difference=2e-6, lists=0)]
    monkeypatch.setattr(Artifacts, "write", lambda *_, **__: checks)
    return directory


def test_the_entry_exports_and_sums_up(workdir, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [f"--workdir={workdir}", f"--out={out}", "--k=5", "--data-licence=CC0 of nobody"]
    assert entry.main(arguments) == 0
    (version,) = out.iterdir()
    assert version.name.endswith("Z-step0")
    shown = capsys.readouterr()
    assert "writing user_tower, item_tower, recommend, rank, behaviours" in shown.err
    assert "100.0 % of the lists of 10 the same" in shown.out
    assert f"done: {version}" in shown.out
    bundle = Bundle.open(version)
    assert bundle.facts["k"] == 5
    assert json.loads(bundle.metrics)["metrics"]["hr@10"] == 0.4
    card = (version / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "| ndcg@10 | 0.2000 | 0.1000 to 0.3000 | 0.1000 |" in card
    assert "CC0 of nobody" in card
    assert "Behaviour `click`: AUC 0.7500" in card
    assert "Measured at step 7, not at the exported step 0." in card


def test_a_version_is_never_changed(workdir, tmp_path, capsys):
    arguments = [f"--workdir={workdir}", f"--out={tmp_path / 'out'}", "--version=v1"]
    (tmp_path / "out" / "v1").mkdir(parents=True)
    assert entry.main(arguments) == 2
    assert "choose another --version" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--version=../x", "must begin with a letter"),
        ("--k=0", "not a whole number of at least 1"),
        ("--dtype=int8", "invalid choice"),
        ("--mesh-shape=8", "is not two sizes"),
    ],
)
def test_wrong_arguments_are_named(argument, message, capsys):
    with pytest.raises(SystemExit):
        entry.main(["--workdir=a", "--out=b", argument])
    assert message in capsys.readouterr().err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        entry.main(["--help"])
    assert "python -m jaxrec.export --workdir=runs/mine --out=exports/mine --onnx" in capsys.readouterr().out


def test_a_missing_run_is_an_error_and_no_traceback(tmp_path, capsys):
    assert entry.main([f"--workdir={tmp_path / 'nothing'}", f"--out={tmp_path / 'out'}"]) == 2
    assert "error:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_library_is_told_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert entry.main([f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}", "--onnx"]) == 2
    assert "pip install 'jaxrec[onnx]'" in capsys.readouterr().err
