"""Kills a training run with SIGKILL at many random moments, resumes it each time, and compares its end.

Bar: every run that was killed and resumed ends in a state that is bit-equal to the uninterrupted run's
(parameters, optimizer slots, tables, step: every array of the final checkpoint), and its losses are too.

Half of the kills fall uniformly over the time an uninterrupted run takes. The other half wait for a checkpoint
that is being written and fall within the next tenth of a second, where a kill is most likely to hurt.

    python benchmarks/kill_resume.py --kills=100
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record
import training_runs

CONFIG = "configs/debug.py"
# Often enough that most kills meet a run with checkpoints behind it and a save close by.
OVERRIDES = (
    "num_train_steps=30",
    "checkpoint_every_steps=2",
    "log_every_steps=1",
    "evaluation.every_steps=15",
)
DURING_SAVE_SECONDS = 0.1


def wait_for_save(run: training_runs.Run, process: subprocess.Popen[str], patience_seconds: float) -> bool:
    """Waits until an unfinished checkpoint lies in the workdir; False if the run ended or none came."""
    directory = run.workdir / "checkpoints"
    deadline = time.monotonic() + patience_seconds
    seen = set(directory.glob("*tmp*"))
    while time.monotonic() < deadline and process.poll() is None:
        if set(directory.glob("*tmp*")) - seen:
            return True
        time.sleep(0.002)
    return False


def killed_run(
    run: training_runs.Run, draw: random.Random, full_seconds: float, kills_left: int
) -> dict[str, Any]:
    """Starts a run again and again, killing it, until it has finished (or `kills_left` are used up).

    Returns:
        How many kills hit, and how many of them hit while a checkpoint was being written.

    Raises:
        RuntimeError: a resumed run failed.
    """
    log_path = run.workdir.with_name(f"{run.workdir.name}.log")
    kills = in_save = starts = 0
    while True:
        starts += 1
        with log_path.open("a") as log:
            process = run.start(log=log)
            if kills < kills_left:
                if draw.random() < 0.5:
                    delay = draw.uniform(0, full_seconds)
                else:
                    wait_for_save(run, process, full_seconds)
                    delay = draw.uniform(0, DURING_SAVE_SECONDS)
                try:
                    process.wait(timeout=delay)
                except subprocess.TimeoutExpired:
                    saving = any((run.workdir / "checkpoints").glob("*tmp*"))
                    process.kill()
                    process.wait()
                    kills += 1
                    in_save += saving
                    continue
            status = process.wait()
        if status:
            raise RuntimeError(
                f"start {starts} of {run.workdir.name} ended with status {status}:\n{training_runs.tail(log_path)}"
            )
        return {"kills": kills, "kills_while_saving": in_save, "starts": starts}


def differences(reference: training_runs.Run, other: training_runs.Run) -> list[str]:
    """The arrays and losses in which two finished runs differ."""
    expected, found = training_runs.fingerprint(reference.workdir), training_runs.fingerprint(other.workdir)
    named = [path for path in sorted(expected.keys() | found.keys()) if expected.get(path) != found.get(path)]
    expected_losses, found_losses = (
        training_runs.losses(reference.workdir),
        training_runs.losses(other.workdir),
    )
    steps = sorted(expected_losses.keys() | found_losses.keys())
    return named + [f"loss of step {s}" for s in steps if expected_losses.get(s) != found_losses.get(s)]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--override", action="append", default=[], help="e.g. data.path=DIR; may be repeated")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="keep the workdirs")
    return parser.parse_args()


def main() -> int:
    """Runs the reference, then killed runs until enough kills have hit."""
    arguments = parse_arguments()
    draw = random.Random(arguments.seed)
    base = Path(tempfile.mkdtemp(prefix="kill-resume-"))
    overrides = (*OVERRIDES, *arguments.override)
    reference = training_runs.Run(
        config=arguments.config, workdir=base / "uninterrupted", overrides=overrides
    )
    reference.finish()  # prepares and compiles: later starts find the caches
    timed = training_runs.Run(config=arguments.config, workdir=base / "again", overrides=overrides)
    started = time.monotonic()
    timed.finish()
    full_seconds = time.monotonic() - started
    repeated = differences(reference, timed)
    print(f"uninterrupted: {full_seconds:.1f} s; a second one differs in {len(repeated)} places", flush=True)

    totals = {"kills": 0, "kills_while_saving": 0, "starts": 0}
    trials: list[dict[str, Any]] = []
    while totals["kills"] < arguments.kills:
        run = training_runs.Run(
            config=arguments.config, workdir=base / f"killed-{len(trials)}", overrides=overrides
        )
        run.workdir.mkdir()
        trial = killed_run(run, draw, full_seconds, arguments.kills - totals["kills"])
        totals = {name: totals[name] + trial[name] for name in totals}
        trial["differences"] = differences(reference, run)
        trials.append(trial)
        print(
            f"run {len(trials)}: {trial['kills']} kills, {len(trial['differences'])} differences", flush=True
        )
        if not trial["differences"] and not arguments.keep:
            shutil.rmtree(run.workdir)

    unequal = sum(bool(trial["differences"]) for trial in trials)
    bars = [
        record.Bar(name="kills", value=totals["kills"], limit=arguments.kills),
        record.Bar(
            name="arrays and losses of a second uninterrupted run that differ",
            value=len(repeated),
            limit=0,
            at_most=True,
        ),
        record.Bar(name="killed runs that end unequal", value=unequal, limit=0, at_most=True),
    ]
    figures = {"uninterrupted_seconds": round(full_seconds, 2), **totals, "runs": trials, "config": arguments.config,
               "overrides": list(overrides)}  # fmt: skip
    if not unequal and not arguments.keep:
        shutil.rmtree(base)
    return record.finish("kill_resume", figures, bars)


if __name__ == "__main__":
    sys.exit(main())
