import argparse
import json
import logging

import jax
import pyarrow.parquet as pq
import pytest

from jaxrec import evaluate, recommend
from jaxrec.evaluation.arguments import mesh_shape, positive


@pytest.fixture(autouse=True)
def _own_logging():
    """The entries point logging at the error stream of the test, which ends with it."""
    before = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = before[0]
    logging.root.setLevel(before[1])


@pytest.fixture
def opened(monkeypatch, make_last_item_run, make_small_dataset):
    """Makes the entries open a `LastItemRun`; records what they asked for."""
    asked = []

    def open_run(workdir, *, mesh_shape=None):
        asked.append((workdir, mesh_shape))
        return make_last_item_run(mesh_shape or (2, 4), dataset=make_small_dataset(repeats=False))

    monkeypatch.setattr(evaluate, "load_run", open_run)
    monkeypatch.setattr(recommend, "load_run", open_run)
    return asked


def test_evaluate_writes_prints_and_says_how_to_repeat_it(tmp_path, opened, capsys):
    arguments = [f"--workdir={tmp_path}", "--batch-rows=16", "--mesh-shape=8,1"]
    assert evaluate.main(arguments) == 0
    assert opened == [(tmp_path, (8, 1))]
    values = json.loads((tmp_path / "evaluation.json").read_text())
    assert values["command"] == f"python -m jaxrec.evaluate {' '.join(arguments)}"
    output = capsys.readouterr().out
    assert f"report: {tmp_path / 'report.html'}" in output
    assert "Recommended to user" in output
    assert evaluate.main(["--compare", str(tmp_path), str(tmp_path)]) == 0
    assert "ndcg@10" in capsys.readouterr().out


def test_recommend_writes_and_reports(tmp_path, opened, capsys):
    out = tmp_path / "recs.parquet"
    assert recommend.main(["--workdir=w", "--split=test", "--k=3", f"--out={out}"]) == 0
    table = pq.read_table(out)
    assert set(table["rank"].to_pylist()) == {1, 2, 3}
    assert f"{len(table):,} recommendations for" in capsys.readouterr().err


def test_recommend_asks_for_the_users_of_a_file(tmp_path, opened, capsys):
    users = tmp_path / "users.txt"
    users.write_text("4\n17\n9999\n")
    out = tmp_path / "recs.csv"
    arguments = ["--workdir=w", f"--users={users}", f"--out={out}"]
    assert recommend.main(arguments) == 2
    assert "1 of 3 users are not in dataset 'small': 9999" in capsys.readouterr().err.replace("\n", " ")
    assert not out.exists()
    assert recommend.main([*arguments, "--skip-unknown-users"]) == 0
    assert "1 unknown users skipped" in capsys.readouterr().err
    assert {line.split(",")[0] for line in out.read_text().splitlines()[1:]} <= {"4", "17"}


@pytest.mark.parametrize("entry", [evaluate, recommend])
def test_a_missing_run_is_an_error_and_no_traceback(tmp_path, entry, capsys):
    arguments = [f"--workdir={tmp_path / 'nothing'}"]
    if entry is recommend:
        arguments += [f"--out={tmp_path / 'recs.parquet'}"]
    assert entry.main(arguments) == 2
    output = capsys.readouterr().err
    assert "error:" in output
    assert "nothing" in output
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("entry", "arguments", "message"),
    [
        (evaluate, [], "give either --workdir=DIR or --compare A B"),
        (evaluate, ["--workdir=a", "--compare", "a", "b"], "give either"),
        (evaluate, ["--workdir=a", "--split=train"], "invalid choice"),
        (evaluate, ["--workdir=a", "--mesh-shape=8"], "is not two sizes"),
        (recommend, ["--workdir=a"], "--out"),
        (recommend, ["--workdir=a", "--out=b", "--k=0"], "not a whole number of at least 1"),
    ],
)
def test_wrong_arguments_are_named(entry, arguments, message, capsys):
    with pytest.raises(SystemExit):
        entry.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("entry", [evaluate, recommend])
def test_help_explains(entry, capsys):
    with pytest.raises(SystemExit):
        entry.main(["--help"])
    output = capsys.readouterr().out
    assert "--workdir DIR" in output
    assert "python -m jaxrec." in output


def test_argument_types():
    assert positive("12") == 12
    assert mesh_shape("-1,4") == (-1, 4)
    for text in ("-1", "1.5", "x", "²"):
        with pytest.raises(argparse.ArgumentTypeError):
            positive(text)


def test_the_model_sees_the_mesh(opened, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        recommend,
        "write_recommendations",
        lambda run, *_, **__: seen.append(jax.sharding.get_abstract_mesh().size),
    )
    recommend.recommend(
        recommend.parse_arguments(["--workdir=w", f"--out={tmp_path / 'r.parquet'}"]), console=None
    )
    assert seen == [8]
