"""The entry `python -m jaxrec.prepare`: what it prints, what it refuses, and with which exit status."""

import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.data.config import GlobalTime
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.prepare import prepare
from jaxrec.prepare import main, parse_arguments


@pytest.fixture
def source(tmp_path):
    (tmp_path / "shop [old]").mkdir()
    table = pa.table(
        {
            "user_id": [1, 1, 1, None],
            "item_id": [5, 6, 7, 8],
            "timestamp": [1, 2, 3, 4],
            "rating": [5, 3, None, 1],
            "[/x]": [1, 0, 1, 0],
        }
    )
    pq.write_table(table, tmp_path / "shop [old]" / "events.parquet")
    return tmp_path / "shop [old]"


def test_it_prepares_and_tells_the_counts(source, tmp_path, capsys):
    assert (
        main(
            [
                f"--data.path={source}",
                f"--out={tmp_path / 'out'}",
                "--data.columns.value.at_least=3",
                "--data.columns.flags=[/x],",
            ]
        )
        == 0
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert "4 read = 3 kept + 1 quarantined" in printed
    assert "2 of 2 known labels are 1" in printed
    assert "user_id is null" in printed
    assert "shop [old] -> " in printed
    assert "behaviour [/x]" in printed
    assert PreparedDataset.open(tmp_path / "out").metadata.name == "shop [old]"


def test_bad_input_is_told_on_stderr_with_status_2(source, tmp_path, capsys):
    assert main([f"--data.path={source}", f"--out={tmp_path / 'out'}", "--data.columns.user=who"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "error:" in error
    assert "columns.user='who'" in error
    assert not (tmp_path / "out").exists()


def test_no_thread_of_ours_runs_while_tfds_replaces_import(source, tmp_path, monkeypatch):
    """TFDS swaps `builtins.__import__` while it is imported; a thread that imports just then would crash."""
    before, during = set(threading.enumerate()), []

    def prepare_and_look(config, out, *, progress):
        progress("read", 1, 2)
        during.extend(threading.enumerate())
        prepare(config, out, progress=progress)

    monkeypatch.setattr("jaxrec.prepare.prepare", prepare_and_look)
    assert main([f"--data.path={source}", f"--out={tmp_path / 'out'}"]) == 0
    assert set(during) <= before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--out"),
        (["--out=x", "--data.pth=y"], "did you mean"),
        (["--out=x", "--data.split=Sideways"], "expected one of the classes"),
        (["--out=x", "--data.split.min_events=1"], "use 3 or more"),
        (["--out=x", "--config.data.path=y"], "--config=FILE is missing"),
        (["--out=x", "--nonsense"], "--nonsense"),
        (["--out=x", "--config=nowhere.py"], "nowhere.py"),
    ],
)
def test_a_bad_command_line_is_refused(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(arguments)
    assert stopped.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for field in (
        "--data.columns.timestamp_unit",
        "--data.text.vocabulary",
        "--data.duplicates",
        "python -m jaxrec",
    ):
        assert field in printed


def test_overrides_of_data_are_applied():
    config, out = parse_arguments(["--out=there", "--data.split=GlobalTime", "--data.columns.order=-"])
    assert (config.split, config.columns.order, str(out)) == (GlobalTime(), "-", "there")
