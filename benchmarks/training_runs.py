"""Runs of the entries as a user starts them, and what they leave behind: metrics, reports and checkpoints.

Every run here is a process of its own (`python -m jaxrec.train ...`), so that the benchmarks see what a user
sees: a kill is a real kill, a second process is a real second process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from record import ROOT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training run: its config, its workdir and its overrides (`data.path=DIR`, `seed=1`, ...)."""

    config: str
    workdir: Path
    overrides: Sequence[str] = ()

    def command(self, entry: str = "train", *extra: str) -> list[str]:
        """The command line of an entry on this run; only `train` takes the config."""
        command = [sys.executable, "-m", f"jaxrec.{entry}", f"--workdir={self.workdir}"]
        if entry == "train":
            command += [f"--config={self.config}", *(f"--config.{override}" for override in self.overrides)]
        return [*command, *extra]

    def shown_command(self, entry: str = "train") -> str:
        """The command line as a reader can repeat it from the root of the repository, on any machine."""
        shown = " ".join(["python", *self.command(entry)[1:]])
        for folder in (ROOT, *ROOT.parents[:-1]):
            shown = shown.replace(f"={folder}/", f"={os.path.relpath(folder, ROOT)}/")
        return shown.replace("=./", "=")

    def start(
        self,
        entry: str = "train",
        *extra: str,
        log: IO[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """Starts an entry; its output goes to `log`, or nowhere."""
        return subprocess.Popen(
            self.command(entry, *extra),
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=log or subprocess.DEVNULL,
            stderr=subprocess.STDOUT if log else subprocess.DEVNULL,
            text=True,
        )

    def finish(self, entry: str = "train", *extra: str, environment: Mapping[str, str] | None = None) -> None:
        """Runs an entry to its end.

        Raises:
            RuntimeError: it failed; the message ends with the last lines it wrote.
        """
        self.workdir.mkdir(parents=True, exist_ok=True)
        path = self.workdir.with_name(f"{self.workdir.name}.{entry}.log")
        with path.open("w") as log:
            status = self.start(entry, *extra, log=log, environment=environment).wait()
        if status:
            raise RuntimeError(f"{entry} on {self.workdir.name} ended with status {status}:\n{tail(path)}")


def tail(path: Path, lines: int = 25) -> str:
    """The last lines of a log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last line that a kill cut off is left out."""
    found = []
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def losses(workdir: Path) -> dict[int, float]:
    """The training loss by step; where a resumed run repeated a step, its later line counts."""
    return {int(line["step"]): float(line["loss"]) for line in metrics(workdir) if "loss" in line}


def final_checkpoint(directory: Path) -> tuple[int, dict[str, Any]]:
    """The newest complete checkpoint of a directory as NumPy arrays by path, read as a restore reads it.

    Raises:
        ValueError: there is no checkpoint.
    """
    import jax
    import numpy as np

    from jaxrec.training.checkpoint import MANIFEST, Checkpoints

    checkpoints = Checkpoints(str(directory), keep=1, save_every_steps=1)
    step = checkpoints.latest_step()
    if step is None:
        raise ValueError(f"{directory} holds no complete checkpoint; let the run finish first.")
    manifest = json.loads((directory / str(step) / MANIFEST).read_text())
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    template = {
        path: jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype), sharding=here)
        for path, (shape, dtype) in manifest["arrays"].items()
    }
    restored = checkpoints.restore_latest(template)
    assert restored is not None, "latest_step() has just found it"
    return restored[0], {path: np.asarray(array) for path, array in restored[1].items()}


def fingerprint(workdir: Path) -> dict[str, int]:
    """CRC-32 of the bytes of every array of the newest and of the best checkpoint, and their steps."""
    found = {}
    for directory in sorted(path for path in (workdir / "checkpoints", workdir / "best") if path.exists()):
        step, arrays = final_checkpoint(directory)
        found[f"{directory.name}: step"] = step
        found |= {f"{directory.name}: {path}": zlib.crc32(array.tobytes()) for path, array in arrays.items()}
    return found
