"""Processes that measure when asked and idle otherwise, one JSON request and one JSON answer a line.

Two frameworks that are compared must share the cores in turns: each lives in a process (and, if need be, an
environment) of its own from the first measurement to the last, so that start-up and compilation are paid
once, and only one of them works at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from record import ROOT

RECTOOLS = ROOT / "benchmarks" / "rectools"
RECTOOLS_ENVIRONMENT = ROOT / ".venv-rectools"


class Worker:
    """A measuring process; use it as a context manager."""

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str] | None = None):
        self.command = list(command)
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
        )
        self.ready = self._answer()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer.

        Raises:
            RuntimeError: the process ended instead.
        """
        assert self._process.stdin is not None, "the process was started with a pipe"
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "the process was started with a pipe"
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"{' '.join(self.command)} ended with status {self._process.wait()}; see its errors above."
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None, "the process was started with a pipe"
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()


def rectools_python() -> Path:
    """The interpreter of RecTools' own environment, which is made when it is missing or its pins changed.

    RecTools needs NumPy 1 and torch: they never enter our environment. The pins name `torch` without a build;
    where the package index serves several, choose the CPU one (PIP_INDEX_URL or PIP_FIND_LINKS).
    """
    requirements = RECTOOLS / "requirements.txt"
    stamp = RECTOOLS_ENVIRONMENT / "requirements.sha256"
    python = RECTOOLS_ENVIRONMENT / "bin" / "python"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if python.exists() and stamp.exists() and stamp.read_text() == digest:
        return python
    base = shutil.which("python3.11") or sys.executable
    print(f"making {RECTOOLS_ENVIRONMENT.name} with {Path(base).name} (minutes, 1.5 GB)", flush=True)
    subprocess.run([base, "-m", "venv", "--clear", str(RECTOOLS_ENVIRONMENT)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)], check=True)
    stamp.write_text(digest)
    return python


def start_rectools(arguments: Sequence[str]) -> Worker:
    """RecTools' worker."""
    return Worker([str(rectools_python()), str(RECTOOLS / "worker.py"), *arguments])


def start_ours(arguments: Sequence[str]) -> Worker:
    """Our worker, in the environment that runs this program."""
    return Worker([sys.executable, str(ROOT / "benchmarks" / "jaxrec_worker.py"), *arguments])


def start_table(arguments: Sequence[str]) -> Worker:
    """A table that trains, in the environment that runs this program."""
    return Worker([sys.executable, str(ROOT / "benchmarks" / "table_worker.py"), *arguments])
