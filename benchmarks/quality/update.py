r"""ML-1M replayed in ten windows of time: a model that is updated from the log against one that is left as it was.

The first half of the events, by time (`timestamp_est` of the data set, nearly half of which is estimated), trains a
model. The second half comes in as a server's log, in ten windows of equally many events. Before a window is logged, the
frozen model and the one that `python -m jaxrec.update` has made of all windows before it rank its events, each given
all events of its user before it, in the whole catalogue; the users are drawn, the same for both. Before the last window
a model is trained from scratch on all that came before, as many passes over its data as the first one had.

The bars: over windows 6 to 10 the updated model's NDCG@10 is above the frozen one's, by the paired test that resamples
users, and no update of those windows cost more than a fifth of the training from scratch, in processor time of the
whole processes. An update counts with its test and its export, the training without them.

    python benchmarks/quality/update.py                            # an hour on 2 quiet cores
    python benchmarks/quality/update.py --share=0.2 --windows=4 --results=runs/trial --base=runs/trial \
        --update=--least-users=5

The second is a trial, in minutes. Everything is kept under --base; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import suite
from suite import METRIC, plots, record, training_runs

from jaxrec.config import read_run_config
from jaxrec.core.mesh import initialize_platform, make_mesh
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.prepare import prepare
from jaxrec.evaluation.significance import by_user, paired_comparison
from jaxrec.evaluation.user_ranking import UserRanks
from jaxrec.metrics.ranking import ndcg_at_k
from jaxrec.runs import setup_run
from jaxrec.serving.sqlite_store import SqliteStore
from jaxrec.serving.store import Feedback
from jaxrec.updating.comparison import answering_state, rank_held_out
from jaxrec.updating.grown_data import grown_config
from jaxrec.updating.history import Outcome, read_outcomes, standing
from jaxrec.updating.options import UPDATES
from jaxrec.updating.snapshot import Mark, Plan, write_snapshot

import jax  # isort: skip

CONFIG = "configs/ml1m_sasrec.py"
MOST_COST = 0.2
MODEL = (
    "model.encoder.embed_dim=64",
    "model.encoder.mlp_dim=128",
    "model.item_dim=64",
    "evaluation.every_steps=0",
    "data.split.validation=false",
    "data.windows=all",
)


@dataclasses.dataclass(frozen=True)
class Replay:
    """The events in the order of time, cut into what the first model knows and the windows.

    Attributes:
      bounds: of the windows: window w = 1, 2, ... is `[bounds[w - 1] : bounds[w]]`.
    """

    users: np.ndarray
    items: np.ndarray
    seconds: np.ndarray
    bounds: list[int]

    @classmethod
    def read(cls, path: Path, share: float, windows: int) -> Replay:
        """A share of the users."""
        table = pq.read_table(
            path / "events.parquet", columns=["user_id", "item_id", "timestamp_est", "order"]
        )
        table = table.filter(table["timestamp_est"].is_valid())
        users, items, seconds = (table[name].to_numpy() for name in table.column_names[:3])
        place = table["order"].fill_null(0).to_numpy()
        chosen = np.random.default_rng(0).permutation(users.max() + 1) < share * (users.max() + 1)
        order = np.lexsort((place, users, seconds))
        order = order[chosen[users[order]]]
        users, items, seconds = users[order], items[order], seconds[order]
        wanted = np.linspace(len(users) // 2, len(users), windows + 1).astype(int)
        # A second lies in one window.
        bounds = [int(np.searchsorted(seconds, seconds[min(at, len(seconds) - 1)])) for at in wanted[:-1]]
        return cls(users, items, seconds, [*bounds, len(users)])

    def write(self, directory: Path, stop: int, items: Path) -> None:
        """The first events as a data set to train on."""
        directory.mkdir(parents=True, exist_ok=True)
        columns = {"user_id": self.users, "item_id": self.items, "timestamp": self.seconds}
        pq.write_table(pa.table({k: v[:stop] for k, v in columns.items()}), directory / "events.parquet")
        titles = pq.read_table(items / "items.parquet", columns=["item_id", "title", "genres"])
        pq.write_table(titles, directory / "items.parquet")

    def log(self, stop: int) -> list[tuple[int, Feedback]]:
        """The events after the first half, up to `stop`, as a server has them."""
        first = self.bounds[0]
        return [
            (
                at - first + 1,
                Feedback(
                    event_id=str(at),
                    user_id=str(self.users[at]),
                    item_id=str(self.items[at]),
                    seconds=int(self.seconds[at]),
                ),
            )
            for at in range(first, stop)
        ]


class Benchmark:
    """The directories of one replay, and what its processes have cost."""

    def __init__(self, given: argparse.Namespace):
        self.given, self.root = given, given.base / "update"
        self.replay = Replay.read(given.data / "ml-1m", given.share, given.windows)
        self.first = self.training("first", self.replay.bounds[0])
        self.exports, self.state = self.root / "exports", self.root / "state.db"

    def training(self, name: str, stop: int) -> training_runs.Run:
        """A training from scratch on the events before `stop`, in passes as many as the first one's."""
        steps = max(round(self.given.steps * self.given.share * stop / self.replay.bounds[0]), 10)
        data = self.root / f"{name}_data"
        if not (data / "items.parquet").is_file():
            self.replay.write(data, stop, self.given.data / "ml-1m")
        overrides = (*MODEL, f"data.path={data.resolve()}", f"num_train_steps={steps}", *self.given.override)
        return training_runs.Run(config=CONFIG, workdir=self.root / name, overrides=overrides)

    def costs(self) -> dict[str, float]:
        """Processor seconds of the processes so far, by name; over all sittings."""
        path = self.root / "costs.json"
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    def run(self, name: str, command: Sequence[str], fine: Sequence[int] = (0,)) -> None:
        """Runs a process to its end, unless that was done, and counts its cost.

        Raises:
            RuntimeError: it failed.
        """
        done = self.root / f"{name}.done"
        if done.exists():
            return
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        log = self.root / f"{name}.log"
        try:
            with log.open("w") as out:
                status = subprocess.run(
                    command, cwd=record.ROOT, stdout=out, stderr=subprocess.STDOUT, check=False
                ).returncode
        finally:
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            costs = self.costs()
            costs[name] = round(costs.get(name, 0.0) + spent, 1)
            temporary = self.root / "costs.tmp"
            temporary.write_text(json.dumps(costs, indent=1) + "\n")
            os.replace(temporary, self.root / "costs.json")
        if status not in fine:
            raise RuntimeError(f"{name} ended with status {status}:\n{training_runs.tail(log)}")
        done.touch()

    def update(self, window: int) -> Outcome:
        """Logs a window, whose events count once, and updates."""
        store = SqliteStore(self.state)
        store.append([event for _, event in self.replay.log(self.replay.bounds[window])])
        store.close()
        command = [
            *(sys.executable, "-m", "jaxrec.update", f"--workdir={self.first.workdir}"),
            *(f"--model={self.exports}", f"--state={self.state}", *self.given.update),
        ]
        self.run(f"update-{window}", command, fine=(0, 1))  # 1 = the old model stays
        outcomes = read_outcomes(self.first.workdir / UPDATES)
        print(outcomes[window - 1].text, flush=True)
        return outcomes[window - 1]

    def ranks(self, window: int, runs: dict[str, Path]) -> pa.Table:
        """The rank of each target of a window by each run: `user_id`, and a column a run; kept once it is there."""
        path = self.root / f"window-{window}.parquet"
        if not path.is_file():
            table = self._rank(window, runs)
            pq.write_table(table, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
        return pq.read_table(path)

    def _rank(self, window: int, runs: dict[str, Path]) -> pa.Table:
        begin, end = self.replay.bounds[window - 1], self.replay.bounds[window]
        cut = int(self.replay.seconds[begin])
        place = self.root / "window"
        log = self.replay.log(end)
        plan = Plan(since=cut, cut=cut, number=0, last=log[-1][0], new=0, held_out=end - begin)
        write_snapshot(place, plan, log, np.array([event.seconds for _, event in log]), {})
        base = read_run_config(self.first.workdir)
        known = PreparedDataset.open(self.first.workdir / "data")
        prepare(grown_config(base.data, known, place, cut), place / "data")
        dataset = PreparedDataset.open(place / "data")
        found: dict[str, UserRanks] = {}
        for name, run in runs.items():
            data = dataclasses.replace(base.data, path=str((place / "data").resolve()))
            config = dataclasses.replace(base, data=data, init_from=str(run), global_batch_size=64)
            mesh = make_mesh(config.mesh_shape)
            with jax.set_mesh(mesh):
                setup = setup_run(config, dataset, mesh, to_train=False)
                state = answering_state(run, config, dataset, setup)
                found[name] = rank_held_out(config, dataset, setup, state, most_users=self.given.users)
        users = dataset.user_keys[next(iter(found.values())).user_indices]
        return pa.table({"user_id": users} | {name: one.ranks for name, one in found.items()})


def compared(tables: Sequence[pa.Table], a: str, b: str) -> Any:
    """B against A over the targets of all tables, paired by user."""
    joined = pa.concat_tables([table.select(["user_id", a, b]) for table in tables])
    users = joined["user_id"].to_numpy()
    return paired_comparison(
        *(by_user(ndcg_at_k(joined[name].to_numpy().astype(np.int64), 10), users) for name in (a, b))
    )


def main() -> int:
    """Replays, compares, checks."""
    parser = suite.argument_parser(__doc__, seeds=1)
    suite.add_trial_arguments(parser)
    parser.add_argument("--share", type=float, default=1.0, help="of the users and of the steps, for a trial")
    parser.add_argument("--steps", type=int, default=1200, help="of the first model (default: 1200)")
    parser.add_argument("--windows", type=int, default=10, help="of the second half (default: 10)")
    parser.add_argument(
        "--users", type=int, default=150, help="drawn in each window to be ranked (default: 150)"
    )
    parser.add_argument(
        "--update", action="append", default=[], metavar="OPTION", help="of jaxrec.update, such as --passes=4"
    )
    given = parser.parse_args()
    initialize_platform()
    bench = Benchmark(given)
    bench.run("first", bench.first.command("train"))
    out = f"--out={bench.exports}"
    bench.run("export", bench.first.command("export", out, "--no-saved-model", "--version=first"))
    tables, lines = [], []
    for window in range(1, given.windows + 1):
        outcomes = read_outcomes(bench.first.workdir / UPDATES)[: window - 1]
        run, _ = standing(outcomes, Mark())
        runs = {"frozen": bench.first.workdir}
        runs["updated"] = bench.first.workdir / UPDATES / run if run else bench.first.workdir
        if window == given.windows:
            scratch = bench.training("scratch", bench.replay.bounds[window - 1])
            bench.run("scratch", scratch.command("train"))
            runs["scratch"] = scratch.workdir
        tables.append(bench.ranks(window, runs))
        means = {name: ndcg_at_k(tables[-1][name].to_numpy().astype(np.int64), 10).mean() for name in runs}
        lines.append(
            {"window": window, "targets": len(tables[-1]), **{k: float(v) for k, v in means.items()}}
        )
        print(
            " ".join(f"{name} {value:.4f}" for name, value in means.items()), f"(window {window})", flush=True
        )
        if window < given.windows:
            bench.update(window)
    later = given.windows // 2
    gain = compared(tables[-later:], "frozen", "updated")
    costs = bench.costs()
    worst = (
        max(costs[f"update-{window}"] for window in range(given.windows - later, given.windows))
        / costs["scratch"]
    )
    figures = {
        "windows": lines,
        "later": dataclasses.asdict(gain),
        "against_scratch": dataclasses.asdict(compared(tables[-1:], "scratch", "updated")),
        "processor_seconds": costs,
        "updates": [dataclasses.asdict(one) for one in read_outcomes(bench.first.workdir / UPDATES)],
        "metric": METRIC,
    }
    names = ("frozen", "updated")
    plots.draw_lines(
        given.results / "quality_update.svg",
        "ML-1M in windows of time: a model that is updated, and one that is not",
        {name: [(line["window"], line[name]) for line in lines] for name in names}
        | {"trained from scratch": [(lines[-1]["window"], lines[-1]["scratch"])]},
        xlabel="window",
        ylabel="NDCG@10 of the window's events",
        ylim=(0, None),
    )
    bars = [
        suite.paired_bar(f"updated above frozen, the last {later} windows", gain),
        record.Bar(
            name="dearest update over training from scratch", value=worst, limit=MOST_COST, at_most=True
        ),
    ]
    return record.finish("quality_update", figures, bars, results=given.results)


if __name__ == "__main__":
    sys.exit(main())
