"""Results of the benchmark programs: one JSON file each, the verdict printed last.

A benchmark hands its figures and its bars (`Bar`) to `finish`, which writes
`benchmarks/results/<name>.json` together with what is needed to judge the figures (command, commit,
machine, load), prints every bar and the verdict, and returns the exit status: 0 only if every bar is met.
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHARED_DATA = ROOT.parent / "shared" / "data"
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "optax", "orbax-checkpoint", "tensorflow-cpu")


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One requirement on a figure: `value` at least (at most; with `strict`, above) `limit`."""

    name: str
    value: float
    limit: float
    at_most: bool = False
    strict: bool = False

    @property
    def met(self) -> bool:
        """Whether the figure reaches the limit; NaN never does."""
        if self.strict:
            return self.value > self.limit
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    @property
    def relation(self) -> str:
        """How the figure has to stand to the limit."""
        return ">" if self.strict else "<=" if self.at_most else ">="

    def __str__(self) -> str:
        verdict = "met   " if self.met else "MISSED"
        return f"{verdict} {self.name}: {self.value:.6g} (bar {self.relation} {self.limit:g})"


def cpu_model() -> str:
    """The CPU's name as the system gives it, or the architecture where it gives none."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpus() -> list[str]:
    """The names of the machine's GPUs, as their driver gives them."""
    asked = shutil.which("nvidia-smi")
    if asked is None:
        return []
    command = [asked, "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def machine() -> dict[str, Any]:
    """What ran the benchmark: CPU, cores, memory, GPUs where there are any, Python and package versions."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found = gpus()
    return ({"gpus": found} if found else {}) | {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
    }


def commit() -> str:
    """The checked-out commit, with `+changes` where tracked files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "HEAD")
    if not head:
        return "none"
    return head + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def load_average() -> list[float]:
    """The 1, 5 and 15 minute load averages: figures taken under other load say so."""
    return [round(value, 2) for value in os.getloadavg()]


def peak_bytes(of: int = resource.RUSAGE_SELF) -> int:
    """Most memory that this process (or, with `RUSAGE_CHILDREN`, the largest child that ended) ever held."""
    return resource.getrusage(of).ru_maxrss * 1024


def command_line() -> str:
    """The command as typed, with the interpreter and script shortened to what a reader can repeat."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return " ".join(["python", str(shown), *sys.argv[1:]])


def finish(name: str, figures: dict[str, Any], bars: Sequence[Bar], *, results: Path = RESULTS) -> int:
    """Writes `<results>/<name>.json`, prints the bars and, last, the verdict; returns the exit status."""
    passed = bool(bars) and all(bar.met for bar in bars)
    document = {
        "benchmark": name,
        "verdict": "pass" if passed else "fail",
        "bars": [
            {"name": b.name, "value": b.value, "bar": f"{b.relation} {b.limit:g}", "met": b.met} for b in bars
        ],
        "figures": figures,
        "command": command_line(),
        "commit": commit(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": load_average(),
        "machine": machine(),
    }
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{name}.json"
    path.write_text(json.dumps(_finite(document), indent=2, allow_nan=False) + "\n")
    for bar in bars:
        print(bar)
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    print(f"written: {shown}")
    print(f"{name}: {'PASS' if passed else 'FAIL'}", flush=True)
    return 0 if passed else 1


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: such figures are written as their names."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
