"""One config on every mesh: the losses agree, arrays lie where they are declared, no table is gathered.

The same float32 run of 20 steps on meshes 1x1, 8x1, 2x4 and 1x8 (virtual CPU devices) and in two processes
with four devices each. Bars: each step's loss agrees with the 1x1 run's to 1e-4 relative; every parameter,
table and slot of the state has its declared sharding; the compiled step holds no all-gather whose operand or
result is as large as a table, nor one over a dim of a table's rows.

    python benchmarks/mesh_parity.py
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record
import training_runs

CONFIG = "configs/debug.py"
STEPS = 20
OVERRIDES = (f"num_train_steps={STEPS}", "log_every_steps=1", "checkpoint_every_steps=1000000")
RELATIVE_BAR = 1e-4
# name -> (mesh, processes, devices of each)
LAYOUTS: dict[str, tuple[tuple[int, int], int, int]] = {
    "1x1": ((1, 1), 1, 1),
    "8x1": ((8, 1), 1, 8),
    "2x4": ((2, 4), 1, 8),
    "1x8": ((1, 8), 1, 8),
    "2 processes, 8x1": ((8, 1), 2, 4),
    "2 processes, 2x4": ((2, 4), 2, 4),
}


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def train(run: training_runs.Run, processes: int, devices: int) -> dict[int, float]:
    """Trains in `processes` processes and returns the losses by step.

    Raises:
        RuntimeError: a process failed.
    """
    shared = {"JAXREC_CPU_DEVICES": str(devices)}
    if processes == 1:
        run.finish(environment=shared)
        return training_runs.losses(run.workdir)
    shared |= {"JAXREC_COORDINATOR": f"127.0.0.1:{free_port()}", "JAXREC_NUM_PROCESSES": str(processes)}
    started: list[tuple[subprocess.Popen[str], Path]] = []
    for index in range(processes):
        path = run.workdir.with_name(f"{run.workdir.name}.process-{index}.log")
        with path.open("w") as log:
            started.append((run.start(log=log, environment=shared | {"JAXREC_PROCESS_ID": str(index)}), path))
    failed = [(path, status) for process, path in started if (status := process.wait())]
    if failed:
        logs = "\n".join(
            f"{path.name} (status {status}):\n{training_runs.tail(path)}" for path, status in failed
        )
        raise RuntimeError(f"{run.workdir.name} failed:\n{logs}")
    return training_runs.losses(run.workdir)


def largest_relative_difference(found: dict[int, float], expected: dict[int, float]) -> float:
    """Over all steps; infinite where a step is missing on one side."""
    if found.keys() != expected.keys() or not found:
        return float("inf")
    return max(abs(found[step] - loss) / abs(loss) for step, loss in expected.items())


def inspect(config: str, overrides: list[str], shape: tuple[int, int]) -> dict[str, Any]:
    """Shardings and all-gathers of the compiled step on one mesh, found in a process with 8 devices.

    Raises:
        RuntimeError: the inspection failed.
    """
    done = subprocess.run(
        [sys.executable, str(record.ROOT / "benchmarks" / "inspect_step.py"), f"--config={config}",
         *(f"--config.{override}" for override in overrides), f"--config.mesh_shape={shape}"],
        cwd=record.ROOT, env={**os.environ, "JAXREC_CPU_DEVICES": "8"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the inspection of {shape} failed:\n{done.stderr[-4000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--override", action="append", default=[], help="e.g. data.path=DIR; may be repeated")
    return parser.parse_args()


def compare_layouts(config: str, given: list[str], base: Path) -> tuple[dict[str, Any], list[str]]:
    """Trains on every layout, the first one's prepared data serving all, and compares with the first.

    Returns:
        The figures by layout, and the override that names the prepared data.
    """
    layouts: dict[str, Any] = {}
    expected: dict[int, float] = {}
    prepared: list[str] = []
    for name, (shape, processes, devices) in LAYOUTS.items():
        workdir = base / name.replace(" ", "-").replace(",", "")
        overrides = [*OVERRIDES, *given, *prepared, f"mesh_shape={shape}"]
        run = training_runs.Run(config=config, workdir=workdir, overrides=overrides)
        found = train(run, processes, devices)
        if not expected:
            expected = found
            prepared = [f"data.path={workdir / 'data'}"] if (workdir / "data").exists() else []
        difference = largest_relative_difference(found, expected)
        layouts[name] = {"losses": list(found.values()), "largest_relative_difference": difference}
        print(f"{name:18s} last loss {list(found.values())[-1]:.7f}, differs by {difference:.2e}", flush=True)
    return layouts, prepared


def main() -> int:
    """Trains on every layout, compares, inspects."""
    arguments = parse_arguments()
    figures: dict[str, Any] = {"config": arguments.config, "layouts": {}, "inspections": {}}
    with tempfile.TemporaryDirectory(prefix="mesh-parity-") as base:
        figures["layouts"], prepared = compare_layouts(arguments.config, arguments.override, Path(base))
        for shape in ((8, 1), (2, 4), (1, 8)):
            found = inspect(arguments.config, [*OVERRIDES, *arguments.override, *prepared], shape)
            figures["inspections"]["x".join(map(str, shape))] = found
            print(
                f"{shape}: {found['num_arrays']} arrays, {len(found['misplaced'])} misplaced; "
                f"{len(found['all_gathers'])} all-gathers, {len(found['table_gathers'])} of a table",
                flush=True,
            )
    layouts, inspections = figures["layouts"].values(), figures["inspections"].values()
    worst = max(layout["largest_relative_difference"] for layout in layouts)
    steps = min(len(layout["losses"]) for layout in layouts)
    bars = [
        record.Bar(name="steps compared", value=steps, limit=STEPS),
        record.Bar(
            name="largest relative difference of a loss", value=worst, limit=RELATIVE_BAR, at_most=True
        ),
        record.Bar(
            name="arrays that do not lie where they are declared",
            value=sum(len(found["misplaced"]) for found in inspections),
            limit=0,
            at_most=True,
        ),
        record.Bar(
            name="all-gathers of a table",
            value=sum(len(found["table_gathers"]) for found in inspections),
            limit=0,
            at_most=True,
        ),
    ]
    return record.finish("mesh_parity", figures, bars)


if __name__ == "__main__":
    sys.exit(main())
