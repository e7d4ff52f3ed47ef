"""Trials: proposed, followed, stopped early, resumed. A stand-in for the training entry knows the best rate."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from jaxrec.tune import main
from jaxrec.tuning.plots import write_plots
from jaxrec.tuning.space import parse_space
from jaxrec.tuning.study import Search, best_trial, run_search

# Validates four times; the nearer the rate is to 0.003, the better. Counts its starts, resumes after what is there.
TRAINER = """
import json, math, pathlib, sys, time
given = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
workdir = pathlib.Path(given["workdir"])
rate = float(given["config.optimizer.learning_rate"])
(workdir / "best").mkdir(parents=True, exist_ok=True)
with (workdir / "starts").open("a") as starts:
    starts.write("1")
lines = (workdir / "metrics.jsonl").read_text().splitlines() if (workdir / "metrics.jsonl").exists() else []
for step in range(len(lines) + 1, 5):
    if rate > {fails_above}:
        sys.exit("bang")
    value = 1 - abs(math.log10(rate / 0.003)) - 0.1 / step
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "validation/ndcg@10": value}) + chr(10))
    time.sleep({pause})
"""


@pytest.fixture
def search(tmp_path, repository):
    def make(
        *, pause=0.0, fails_above=1.0, trials=4, space=("--search.optimizer.learning_rate=1e-4..1e-1:log",)
    ):
        script = tmp_path / "trainer.py"
        script.write_text(TRAINER.replace("{pause}", str(pause)).replace("{fails_above}", str(fails_above)))
        return Search(
            config=str(repository / "configs" / "debug.py"),
            overrides=["--config.evaluation.every_steps=1", "--config.data.path=elsewhere"],
            space=parse_space(space),
            given=space,
            workdir=tmp_path / "search",
            num_trials=trials,
            seed=0,
            train=(sys.executable, str(script)),
        )

    return make


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    """The stand-in reads no data."""
    monkeypatch.setattr("jaxrec.tuning.study.is_prepared", lambda path: True)


def test_a_search_finds_the_best_and_goes_on_where_it_ended(search):
    study = run_search(search())
    best = json.loads((search().workdir / "best.json").read_text())
    assert best["value"] == pytest.approx(
        max(trial.value for trial in study.trials if trial.value is not None)
    )
    assert best["command"].startswith("python ")
    assert (
        f"--config.optimizer.learning_rate={best_trial(study).params['optimizer.learning_rate']}"
        in best["command"]
    )
    assert [path.parent.name for path in search().workdir.glob("trials/*/best")] == [
        best["workdir"].split("/")[1]
    ]
    more = run_search(search(trials=6))
    assert len(more.trials) == 6
    assert len({trial.params["optimizer.learning_rate"] for trial in more.trials}) == 6
    plots = write_plots(more, search().workdir, "ndcg@10")
    assert [path.name for path in plots] == ["history.svg", "curves.svg", "fields.svg"]
    assert all(path.stat().st_size > 1000 for path in plots)
    with pytest.raises(ValueError, match="holds another search: overrides was"):
        run_search(dataclasses.replace(search(), overrides=["--config.evaluation.every_steps=2"]))


def test_poor_trials_are_stopped_early(search, monkeypatch):
    monkeypatch.setattr("jaxrec.tuning.study.POLL_SECONDS", 0.02)
    job = search(pause=0.3, trials=6)
    job.workdir.mkdir()
    queue = optuna.create_study(
        study_name="jaxrec", direction="maximize",
        storage=JournalStorage(JournalFileBackend(str(job.workdir / "study.journal"))),
    )  # fmt: skip
    for rate in (0.003, 0.0025, 0.0035, 0.002, 0.004, 1e-4):
        queue.enqueue_trial({"optimizer.learning_rate": rate})
    study = run_search(job)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 5 + [TrialState.PRUNED]


def test_a_killed_search_resumes_the_trial_that_was_under_way(search, tmp_path):
    job = search(pause=0.5, trials=1)
    fields = {
        name: getattr(job, name) for name in ("config", "overrides", "given", "num_trials", "seed", "train")
    }
    program = (
        "import pathlib, jaxrec.tuning.study as s; from jaxrec.tuning.space import parse_space\n"
        f"fields = {fields!r}\n"
        "s.is_prepared = lambda path: True\n"
        f"workdir = pathlib.Path({str(job.workdir)!r})\n"
        "s.run_search(s.Search(space=parse_space(fields['given']), workdir=workdir, **fields))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    trial = job.workdir / "trials" / "0000"
    deadline = time.monotonic() + 60
    while not (trial / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    study = run_search(job)
    assert [one.state for one in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert study.trials[0].params == study.trials[1].params
    assert (trial / "starts").read_text() == "11"
    assert len((trial / "metrics.jsonl").read_text().splitlines()) == 4


def test_trial_after_trial_that_fails_ends_the_search(search):
    with pytest.raises(
        ValueError, match=r"3 trials in a row failed; the log of the last one is .*0002/train.log"
    ):
        run_search(search(fails_above=0.0))


def test_values_that_do_not_fit_together_are_passed_over(search):
    space = (
        "--search.optimizer.learning_rate=1e-4..1e-1:log",
        "--search.model.encoder.embed_dim=30,32",
        "--search.model.encoder.num_heads=4,2",
        "--search.model.item_dim=32,30",
    )
    study = run_search(search(space=space, trials=8))
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE, TrialState.PRUNED}


@pytest.mark.parametrize(
    ("space", "first", "overrides"),
    [
        (["--search.model.encoder.num_heads=3,2"], ["model.encoder.num_heads=3"], []),
        (["--search.model.encoder.embed_dim=15..18"], ["model.encoder.embed_dim=15"], []),
        # What holds for every trial fits none of the config's own values.
        (["--search.model.encoder.embed_dim=16,15"], [], ["model.encoder.num_heads=3"]),
        # One of the classes alone has the field.
        (
            ["--search.data.split=LeaveOneOut,GlobalTime", "--search.data.split.test_quantile=0.91..0.95"],
            ["data.split=LeaveOneOut", "data.split.test_quantile=0.91"],
            [],
        ),
    ],
)
def test_the_first_values_need_not_fit(search, space, first, overrides):
    job = dataclasses.replace(search(space=space), overrides=[f"--config.{one}" for one in overrides])
    with pytest.raises(ValueError):
        job.config_of(dict(one.split("=") for one in first))
    assert job.any_config() == job.any_config()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--search.optimizer.learning_rat=1..2"], "did you mean"),
        (["--search.num_train_steps=a,b"], "expected int"),
        (["--search.num_train_steps=1.5..9"], "expected int"),
        (
            ["--search.model.encoder.num_heads=3,5"],
            "none of 200 draws of the searched values fits the config",
        ),
        (
            ["--search.num_train_steps=1..9", "--config.evaluation.every_steps=0"],
            "set --config.evaluation.every_steps",
        ),
    ],
)
def test_bad_searches_end_with_one_line(arguments, problem, repository, tmp_path, capsys):
    assert (
        main([f"--config={repository / 'configs' / 'debug.py'}", f"--workdir={tmp_path / 'x'}", *arguments])
        == 2
    )
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_nothing_to_search_is_said(capsys):
    with pytest.raises(SystemExit):
        main(["--config=configs/debug.py", "--workdir=x"])
    assert "nothing is searched" in capsys.readouterr().err


def test_the_entry_trains_on_data_that_are_prepared_once(tmp_path, repository, monkeypatch, capsys):
    monkeypatch.undo()
    workdir = tmp_path / "real"
    config = f"--config={repository / 'configs' / 'debug.py'}"
    overrides = [
        "--config.num_train_steps=2",
        "--config.evaluation.every_steps=2",
        "--config.evaluation.max_users=20",
    ]
    assert (
        main(
            [
                config,
                f"--workdir={workdir}",
                "--trials=1",
                "--search.optimizer.learning_rate=1e-4..1e-2",
                *overrides,
            ]
        )
        == 0
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert "validation ndcg@10" in printed
    assert (workdir / "trials" / "0000" / "best").is_dir()
    assert not (workdir / "trials" / "0000" / "data").exists()
