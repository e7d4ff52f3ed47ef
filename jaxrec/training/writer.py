"""What a run says while it trains: `metrics.jsonl`, TensorBoard event files, and a progress bar.

Only process 0 writes. A resumed run cuts what was logged after the step that it resumes from, so that no curve is
drawn twice.
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import jax
import tensorboardX
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from jaxrec.core.files import write_whole

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIRECTORY = "tensorboard"


class MetricWriter:
    """Writes the metrics of a run, one line of `metrics.jsonl` a call and one TensorBoard point a value.

    Args:
        workdir: the run's directory; made where it is missing.
        resume_step: lines of later steps are removed.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, resume_step: int = 0):
        self._file: TextIO | None = None
        self._tensorboard: tensorboardX.SummaryWriter | None = None
        if jax.process_index() != 0:
            return
        root = Path(workdir)
        root.mkdir(parents=True, exist_ok=True)
        _cut_after(root / METRICS_FILE, resume_step)
        self._file = (root / METRICS_FILE).open("a", encoding="utf-8")
        self._tensorboard = tensorboardX.SummaryWriter(
            str(root / TENSORBOARD_DIRECTORY),
            # TensorBoard then forgets the points of a killed run that lie after the checkpoint.
            purge_step=resume_step + 1 if resume_step else None,
            # Its file names count seconds, and a file of the same second would be overwritten.
            filename_suffix=f".{os.getpid()}.{resume_step}",
            flush_secs=10,
        )

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes scalars (numbers or arrays of no dims, on any device) as those of `step`.

        Raises:
            ValueError: a metric is not a scalar, or is called "step".
        """
        if self._file is None or self._tensorboard is None:
            return
        values = {name: _as_float(name, value) for name, value in jax.device_get(dict(metrics)).items()}
        line = {"step": int(step), **{name: _to_json_number(value) for name, value in values.items()}}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            # TensorBoard allows no "@" in a name.
            self._tensorboard.add_scalar(name.replace("@", "_at_"), value, int(step))

    def close(self) -> None:
        """Flushes and closes the files; calling it again does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl`, oldest first; a last line that a kill cut short is left out.

    Raises:
        ValueError: a line before the last is not a JSON object with a step.
    """
    path = Path(workdir) / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    metrics = []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            metrics.append(
                {name: float(value) for name, value in values.items()} | {"step": int(values["step"])}
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number}: {line.strip()[:80]!r} is not a line of metrics."
            ) from error
    return metrics


def _cut_after(path: Path, step: int) -> None:
    """Keeps the whole lines up to `step`; the file is replaced at once, so that a kill loses nothing."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and int(json.loads(line)["step"]) <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    write_whole(path, "".join(kept))


def _as_float(name: str, value: Any) -> float:
    if name == "step":
        raise ValueError("a metric is called 'step', which is the name of the line's step; rename it.")
    if getattr(value, "ndim", 0) != 0:
        raise ValueError(
            f"metric {name!r} has shape {value.shape}, and only scalars are logged; reduce it first."
        )
    return float(value)


def _to_json_number(value: float) -> float | str:
    # JSON has no NaN or infinity; `float` reads the word back.
    return value if math.isfinite(value) else str(value)


class TrainingProgress:
    """A bar with the steps, the loss, events/s and the time left; a plain line an interval where there is no terminal.

    Args:
        num_train_steps: the last step of the run.
        start_step: the step that the run resumes from.
        stream: where it is drawn; standard error by default, so that it never mixes with results.
    """

    def __init__(self, num_train_steps: int, *, start_step: int = 0, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._num_train_steps = num_train_steps
        self._start_step = start_step
        self._start_seconds = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._quiet = jax.process_index() != 0

    def __enter__(self) -> Self:
        self._start_seconds = time.monotonic()
        if not self._quiet and self._stream.isatty():
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}  {task.fields[speed]} events/s"),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
            )
            self._task = self._bar.add_task(
                "training", total=self._num_train_steps, completed=self._start_step, loss="-", speed="-"
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, step: int, *, loss: float, events_per_second: float) -> None:
        """Shows the state after `step`; call it at each log interval."""
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                completed=step,
                loss=f"{float(loss):.4f}",
                speed=f"{float(events_per_second):,.0f}",
            )
        elif not self._quiet:
            print(
                f"step {step}/{self._num_train_steps}  loss {float(loss):.4f}"
                f"  {float(events_per_second):,.0f} events/s  {self._time_left(step)} left",
                file=self._stream,
                flush=True,
            )

    def _time_left(self, step: int) -> str:
        done = step - self._start_step
        if done <= 0:
            return "?"
        elapsed = time.monotonic() - self._start_seconds
        seconds = round(elapsed / done * (self._num_train_steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
