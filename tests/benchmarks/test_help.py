"""Every program of `benchmarks/` can be started as its docstring says: it finds its modules, and tells what it does."""

import subprocess
import sys

STARTED = """
import pathlib, runpy, sys
for path in sorted(pathlib.Path("benchmarks").rglob("*.py")):
    if "rectools" in path.parts or "__main__" not in path.read_text():
        continue
    known, before = set(sys.modules), list(sys.path)
    sys.path[0], sys.argv = str(path.parent.resolve()), [str(path), "--help"]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, f"{path}: {end.code}"
    sys.path[:] = before
    # The next program finds its own.
    for name in set(sys.modules) - known:
        if "benchmarks" in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]
    print("helped:", path)
"""


def test_every_program_says_what_it_does(repository):
    done = subprocess.run(
        [sys.executable, "-c", STARTED], cwd=repository, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    # Workers keep standard output for their answers, and send all else to standard error.
    assert (done.stdout + done.stderr).count("helped:") > 25
