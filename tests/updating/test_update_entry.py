"""The entry: its statuses, what it refuses, and the timer."""

import signal
import subprocess
import sys
import time
import types

import pytest

from jaxrec import update
from jaxrec.serving.sqlite_store import SqliteStore
from jaxrec.updating.update import StoppedError


@pytest.fixture
def command(tmp_path):
    SqliteStore(tmp_path / "state.db").close()
    return [f"--workdir={tmp_path}", f"--model={tmp_path}", f"--state={tmp_path / 'state.db'}"]


@pytest.mark.parametrize(
    ("result", "status"),
    [
        (None, 0),
        (types.SimpleNamespace(promoted=True, text="yes"), 0),
        (types.SimpleNamespace(promoted=False, text="no"), 1),
        (StoppedError("stopped"), 0),
        (ValueError("wrong"), 2),
    ],
)
def test_the_status_says_what_became_of_it(result, status, command, monkeypatch, capsys):
    def once(options, store, train):
        assert (options.passes, options.overrides) == (3.0, ["--config.seed=4"])
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(update, "update_once", once)
    assert update.main([*command, "--passes=3", "--config.seed=4"]) == status
    printed = capsys.readouterr()
    assert ("error: wrong" in printed.err) == (status == 2)


def test_a_state_must_be_there(command, tmp_path, capsys):
    assert update.main([*command[:2], f"--state={tmp_path / 'other.db'}"]) == 2
    assert "there is no state" in capsys.readouterr().err
    assert not (tmp_path / "other.db").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--holdout=0", "--holdout=0.0 must be above 0 and below 1"),
        ("--passes=nan", "--passes=nan must be above 0"),
        ("--least-events=0", "--least-events=0 must be at least 1"),
        ("--every-seconds=0", "--every-seconds=0.0 must be above 0"),
    ],
)
def test_options_are_checked(option, message, command, capsys):
    with pytest.raises(SystemExit):
        update.main([*command, option])
    assert message in capsys.readouterr().err


def test_the_timer_runs_the_command_without_the_timer(command, monkeypatch):
    found = []
    monkeypatch.setattr(update, "run_on_timer", lambda *given: found.append(given))
    assert update.main([*command, "--every-seconds=5", "--config.seed=4"]) == 0
    assert update.main(["--every-seconds", "7", *command]) == 0
    assert [(line[3:], seconds) for line, seconds in found] == [
        ([*command, "--config.seed=4"], 5.0),
        (command, 7.0),
    ]


TIMER = """
import sys
from jaxrec.updating.timer import run_on_timer
run_on_timer([sys.executable, "-c", sys.argv[1], *sys.argv[3:]], float(sys.argv[2]))
"""
NOTE = "import sys; open(sys.argv[1], 'a').write('x'); sys.exit(3)"
HANG = "import sys, time; open(sys.argv[1], 'a').write('x'); time.sleep(600)"


@pytest.mark.parametrize(("program", "seconds", "runs"), [(NOTE, "0.1", 3), (NOTE, "600", 1), (HANG, "1", 1)])
def test_a_timer_ends_at_sigterm(program, seconds, runs, tmp_path, repository):
    """Between two runs, and while one hangs; one that fails is no end."""
    notes = tmp_path / "notes"
    timer = subprocess.Popen([sys.executable, "-c", TIMER, program, seconds, str(notes)], cwd=repository)
    try:
        deadline = time.monotonic() + 60
        while (not notes.exists() or len(notes.read_text()) < runs) and time.monotonic() < deadline:
            time.sleep(0.02)
        timer.send_signal(signal.SIGTERM)
        assert timer.wait(60) == 0
    finally:
        timer.kill()
    assert len(notes.read_text()) >= runs
