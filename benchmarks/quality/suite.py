"""What the quality programs share: variants trained seed by seed, kept with their ranks, compared user by user.

A seed of a variant is trained and evaluated by the entries, in a workdir of its own under `runs/quality/`, and what is
to be kept of it is written to `benchmarks/results/quality/`: figures, command, commit, machine, config, and every
user's rank. A seed that is there is read, not run again, unless its config has changed since; an interrupted training
goes on from its checkpoint. Training time is that of the training processes, start-up, compilation and validation
included, over all sittings. What a limit is held against is the processor time, shared by two cores: other programs on
the machine lengthen the wall clock, which is kept beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where plots.py, record.py and others are

import plots as plots
import record
import training_runs

from jaxrec.config import TrainConfig, apply_overrides, from_json, load_config, to_json
from jaxrec.config.stages import run_directory
from jaxrec.data.config import DataConfig
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.domains import Domains
from jaxrec.data.prepare import prepare
from jaxrec.evaluation.comparison import COLD_RANKS_FILE, RANKS_FILE
from jaxrec.evaluation.significance import Comparison, paired_comparison
from jaxrec.metrics.ranking import per_user_metrics

METRIC = "ndcg@10"
SHOWN = ("hr@10", METRIC)
RESULTS = record.RESULTS / "quality"
CLOCK_FILE = "train_seconds.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A config with overrides, under a name.

    Attributes:
        overrides: `{seed}` stands for the seed's number, where a seed also draws the data.
        data: the data set's directory in the shared data; "" = as the config says.
    """

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    data: str = ""

    def run(self, seed: int, data: Path, base: Path) -> training_runs.Run:
        """The training run of a seed."""
        overrides = [*(text.format(seed=seed) for text in self.overrides), f"seed={seed}"]
        if self.data:
            overrides.append(f"data.path={data / self.data}")
        return training_runs.Run(
            config=self.config, workdir=base / f"{self.name}-seed-{seed}", overrides=overrides
        )


@dataclasses.dataclass(frozen=True)
class Seed:
    """What one seed of a variant has shown.

    Attributes:
        figures: the kept JSON.
        ranks: of every user's target, from 0; users in the order of the data set.
        users: their own ids, one a target.
        cold_users, cold_ranks: of the new targets among the new items, where the config asks for them.
    """

    figures: dict[str, Any]
    ranks: np.ndarray
    users: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    cold_users: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    cold_ranks: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def metrics(self) -> dict[str, float]:
        """Means over users."""
        return self.figures["metrics"]

    @property
    def minutes(self) -> float:
        """Of training, by the wall clock."""
        return self.figures["train_minutes"]

    @property
    def two_core_minutes(self) -> float:
        """Of training, by the processor time."""
        return two_core_minutes(self.figures["sittings"])


def run_seeds(
    variant: Variant,
    seeds: int,
    data: Path,
    base: Path,
    results: Path = RESULTS,
    measure: Callable[[Path], dict[str, Any]] | None = None,
) -> list[Seed]:
    """Every seed of a variant: what is missing is trained; prints a line a seed.

    Args:
        measure: what else is to be kept of a run, from its workdir.
    """
    found = []
    for seed in range(seeds):
        found.append(_run_seed(variant, seed, data, base, results, measure))
        values = " ".join(f"{name} {found[-1].metrics[name]:.4f}" for name in SHOWN)
        print(f"{variant.name}, seed {seed}: {values}, {found[-1].minutes:.1f} min", flush=True)
    return found


def _run_seed(
    variant: Variant,
    seed: int,
    data: Path,
    base: Path,
    results: Path,
    measure: Callable[[Path], dict[str, Any]] | None,
) -> Seed:
    run = variant.run(seed, data, base)
    kept = results / f"{run.workdir.name}.json"
    config = config_of(run)
    if not kept.exists() or not is_same(json.loads(kept.read_text())["config"], config):
        train_and_evaluate(run, f"{variant.name}, seed {seed}")
        _keep(run, config, kept, measure(run.workdir) if measure else {}, data)
    arrays = _ranks(kept.with_suffix(".parquet"))
    cold = kept.with_suffix(".cold.parquet")
    return Seed(json.loads(kept.read_text()), *arrays, *(_ranks(cold)[::-1] if cold.exists() else ()))


def config_of(run: training_runs.Run) -> dict[str, Any]:
    """The config of a run, as JSON."""
    overrides = [f"--config.{text}" for text in run.overrides]
    config: dict[str, Any] = json.loads(to_json(apply_overrides(load_config(run.config), overrides)))
    return config


def is_same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two configs ask for the same, wherever the data lie."""
    return _without_place(a) == _without_place(b)


def _ranks(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Ranks, and whose they are."""
    table = pq.read_table(path)
    return table["rank"].to_numpy(), table["user_id"].to_numpy()


def _without_place(config: dict[str, Any]) -> TrainConfig:
    """The config but for where the data lie; a field that is newer than the result has its default."""
    read = from_json(json.dumps(config), TrainConfig)
    stages = {
        name: stage if stage.data is None else dataclasses.replace(stage, data=_somewhere(stage.data))
        for name, stage in read.stages.items()
    }
    return dataclasses.replace(read, data=_somewhere(read.data), stages=stages)


def _somewhere(data: DataConfig) -> DataConfig:
    source: Any = data.source
    if hasattr(source, "directory"):  # of all sets, for one: its name is as free as its place
        source = dataclasses.replace(source, directory="")
    if isinstance(source, Domains):
        source = Domains(paths={domain: Path(path).name for domain, path in source.paths.items()})
    return dataclasses.replace(data, path=Path(data.path).name, source=source)


def train_and_evaluate(run: training_runs.Run, name: str) -> None:
    """Trains and evaluates a run by the entries, or goes on with it; its sittings are kept in its workdir.

    Raises:
        RuntimeError: an entry failed.
    """
    clock = run.workdir / CLOCK_FILE
    print(f"{name}: training", flush=True)
    run.workdir.mkdir(parents=True, exist_ok=True)
    spent = sittings(run)
    started, processor = time.monotonic(), _processor_seconds()
    try:
        run.finish("train")
    finally:
        spent.append(
            {
                "seconds": round(time.monotonic() - started, 1),
                "processor_seconds": round(_processor_seconds() - processor, 1),
                "load_average": record.load_average(),
            }
        )
        clock.write_text(json.dumps(spent) + "\n")
    run.finish("evaluate")


def sittings(run: training_runs.Run) -> list[dict[str, Any]]:
    """The training processes of a run so far: seconds, of the processor too, and the load when each ended."""
    clock = run.workdir / CLOCK_FILE
    found: list[dict[str, Any]] = json.loads(clock.read_text()) if clock.exists() else []
    return found


def _processor_seconds() -> float:
    """Of the processes that have been waited for, over all cores."""
    times = os.times()
    return times.children_user + times.children_system


def minutes(sittings: Sequence[Mapping[str, Any]]) -> float:
    """Of training, over all sittings."""
    return sum(sitting["seconds"] for sitting in sittings) / 60


def two_core_minutes(sittings: Sequence[Mapping[str, Any]]) -> float:
    """Half the processor time of training, over all sittings."""
    return sum(sitting["processor_seconds"] for sitting in sittings) / 2 / 60


def without_place(text: str, data: Path) -> str:
    """A text without the folder where the data lie on this machine: they lie beside the repository on any."""
    beside = os.path.relpath(record.SHARED_DATA, record.ROOT)
    return text.replace(str(data), beside) if data.is_absolute() else text


def _keep(
    run: training_runs.Run, config: dict[str, Any], kept: Path, measured: dict[str, Any], data: Path
) -> None:
    """Copies what counts out of the workdir; the figures come last, so that they never lack their ranks."""
    workdir = run_directory(run.workdir)
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    figures = {name: evaluation[name] for name in ("metrics", "intervals", "baselines", "paired")}
    figures |= {name: evaluation[name] for name in ("cold_items",) if name in evaluation}
    figures |= measured | {
        "validation": _best_validation(workdir),
        "train_minutes": minutes(sittings(run)),
        "sittings": sittings(run),
        "command": run.shown_command("train"),
        "commit": record.commit(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": record.machine(),
        "config": config,
    }
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(workdir / RANKS_FILE, kept.with_suffix(".parquet"))
    kept.with_suffix(".cold.parquet").unlink(missing_ok=True)
    if "cold_items" in figures:
        shutil.copyfile(workdir / COLD_RANKS_FILE, kept.with_suffix(".cold.parquet"))
    temporary = kept.with_suffix(".tmp")
    temporary.write_text(without_place(json.dumps(figures, indent=1) + "\n", data))
    os.replace(temporary, kept)


def _best_validation(workdir: Path) -> float | None:
    """The metric of the state that was evaluated, on the validation targets; None where none was measured."""
    name = f"validation/{METRIC}"
    found = [line[name] for line in training_runs.metrics(workdir) if name in line]
    return max(found, default=None)


def summary(seeds: Sequence[Seed]) -> dict[str, Any]:
    """Mean and spread over the seeds, and what each of them shows."""
    over: dict[str, Any] = {}
    for name in SHOWN:
        values = [seed.metrics[name] for seed in seeds]
        over[name] = {
            "mean": statistics.mean(values),
            "standard_deviation": statistics.stdev(values) if len(values) > 1 else None,
            "seeds": values,
        }
    return over | {
        "train_minutes": [seed.minutes for seed in seeds],
        "two_core_minutes": [seed.two_core_minutes for seed in seeds],
        "baselines": {name: values[METRIC] for name, values in seeds[0].figures["baselines"].items()},
        "commands": [seed.figures["command"] for seed in seeds],
        "commits": [seed.figures["commit"] for seed in seeds],
    }


def of_users(seeds: Sequence[Seed], metric: str = METRIC) -> np.ndarray:
    """Of each user, averaged over the seeds."""
    return np.mean([per_user_metrics(seed.ranks, (10,))[metric] for seed in seeds], axis=0)


def compare_variants(
    a: Sequence[Seed], b: Sequence[Seed], metric: str = METRIC, *, confidence: float = 0.95
) -> Comparison:
    """B against A over the same users, each user's metric averaged over the seeds.

    Raises:
        ValueError: the runs were asked about other users, or about the same in another order.
    """
    if not all(np.array_equal(seed.users, a[0].users) for seed in (*a, *b)):
        raise ValueError(
            "the runs ranked other users, or the same in another order; evaluate all on the same data."
        )
    return paired_comparison(of_users(a, metric), of_users(b, metric), confidence=confidence)


def mean_bar(name: str, seeds: Sequence[Seed], limit: float, metric: str = METRIC) -> record.Bar:
    """The mean over seeds lies above a published or simple figure."""
    value = statistics.mean(seed.metrics[metric] for seed in seeds)
    return record.Bar(
        name=f"{name}: {metric}, mean of {len(seeds)} seeds", value=value, limit=limit, strict=True
    )


def paired_bar(name: str, comparison: Comparison) -> record.Bar:
    """B lies above A by more than luck: the lower end of the paired interval."""
    print(
        f"  {name}: {comparison.difference:+.4f} [{comparison.low:+.4f}, {comparison.high:+.4f}], "
        f"p = {comparison.p_value:.4f}"
    )
    return record.Bar(name=f"{name}, lower end", value=comparison.low, limit=0, strict=True)


def minutes_bar(name: str, seeds: Sequence[Seed], limit: float) -> record.Bar:
    """The slowest seed trains within the limit, on two cores that do nothing else."""
    value = max(seed.two_core_minutes for seed in seeds)
    return record.Bar(
        name=f"{name}: minutes of training on two cores", value=value, limit=limit, at_most=True
    )


def argument_parser(
    description: str | None, *, seeds: int = 3, seeds_help: str = "of each variant"
) -> argparse.ArgumentParser:
    """The command line that the quality programs share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = Path(os.environ.get("JAXREC_DATA") or record.SHARED_DATA)
    parser.add_argument("--seeds", type=int, default=seeds, help=f"{seeds_help} (default: {seeds})")
    parser.add_argument("--data", type=Path, default=data, help=f"the shared data sets (default: {data})")
    parser.add_argument(
        "--base", type=Path, default=record.ROOT / "runs" / "quality", help="where the runs lie"
    )
    return parser


def add_trial_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for a program that can be tried in minutes: smaller runs, kept apart from what counts."""
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="where the results are kept")
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="of every config, for a trial; say --results and --base with it",
    )


def tried(variant: Variant, given: argparse.Namespace) -> Variant:
    """The variant with the overrides of a trial; one of a stage only where the config has that stage."""
    stages = load_config(variant.config).stages
    own = [text for text in given.override if not text.startswith("stages.") or text.split(".")[1] in stages]
    return dataclasses.replace(variant, overrides=(*variant.overrides, *own))


def prepared(variant: Variant, seed: int, given: argparse.Namespace) -> PreparedDataset:
    """The data of a run, as it has prepared them in its workdir; prepared anew where they are gone."""
    run = variant.run(seed, given.data, given.base)
    config = apply_overrides(load_config(variant.config), [f"--config.{text}" for text in run.overrides])
    prepare(config.data, run.workdir / "data")
    return PreparedDataset.open(run.workdir / "data")


def run_variant(
    variant: Variant, given: argparse.Namespace, measure: Callable[[Path], dict[str, Any]] | None = None
) -> list[Seed]:
    """`run_seeds`, as a command line with the trial options says."""
    results = given.results / "quality"
    return run_seeds(tried(variant, given), given.seeds, given.data, given.base, results, measure)
