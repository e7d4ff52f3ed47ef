"""The quality that the configs promise: trains each proof by the entry, evaluates it, checks its bars.

A proof is a config, its seeds and its bars; each (proof, seed) has a workdir of its own under `runs/quality/`.
A seed whose `evaluation.json` is there is read, not run again, and an interrupted training goes on from its
checkpoint, so the program may be stopped and started at will. Training time is the wall clock of the
training processes, start-up, compilation and validation included, over all sittings.

    python benchmarks/quality.py                       # everything: hours on 2 cores
    python benchmarks/quality.py ml1m_sasrec --seeds=1 # one proof, one seed
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import training_runs

METRIC = "ndcg@10"


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What one config has to reach on the test split, full ranking, on every seed.

    Attributes:
        data: the data set's directory in the shared data; "" = the set inside the package.
        at_least: bars on metrics of `evaluation.json`.
        train_minutes: bound on the training time.
        above: baselines that NDCG@10 has to exceed.
        transition: where the transition baseline's NDCG@10 has to lie, as (middle, tolerance).
    """

    name: str
    config: str
    data: str = ""
    seeds: int = 1
    at_least: tuple[tuple[str, float], ...] = ()
    train_minutes: float
    above: tuple[str, ...] = ()
    transition: tuple[float, float] | None = None


ML1M = "ml-1m-sasrec"
PROOFS = (
    Proof(
        name="quickstart",
        config="configs/quickstart.py",
        train_minutes=5,
        above=("popularity", "item_knn", "ease"),
    ),
    Proof(
        name="ml1m_sasrec",
        config="configs/ml1m_sasrec.py",
        data=ML1M,
        seeds=3,
        at_least=((METRIC, 0.175), ("hr@10", 0.30)),
        train_minutes=40,
        transition=(0.1597, 0.002),
    ),
    Proof(
        name="ml1m",
        config="configs/ml1m.py",
        data=ML1M,
        seeds=3,
        at_least=((METRIC, 0.1857),),
        train_minutes=45,
        transition=(0.1597, 0.002),
    ),
    Proof(
        name="ml1m_bert4rec",
        config="configs/ml1m_bert4rec.py",
        data=ML1M,
        at_least=((METRIC, 0.15),),
        train_minutes=40,
        transition=(0.1597, 0.002),
    ),
)


def run_seed(proof: Proof, seed: int, data: Path, base: Path) -> dict[str, Any]:
    """Trains and evaluates one seed, or what is left of it; returns its evaluation and training time.

    Raises:
        RuntimeError: an entry failed.
    """
    overrides = [f"seed={seed}"]
    if proof.data:
        overrides.append(f"data.path={data / proof.data}")
    run = training_runs.Run(
        config=proof.config, workdir=base / f"{proof.name}-seed-{seed}", overrides=overrides
    )
    evaluation = run.workdir / "evaluation.json"
    clock = run.workdir / "train_seconds.json"
    if not evaluation.exists():
        print(f"{proof.name}, seed {seed}: training", flush=True)
        run.workdir.mkdir(parents=True, exist_ok=True)
        spent = json.loads(clock.read_text()) if clock.exists() else []
        started = time.monotonic()
        try:
            run.finish("train")
        finally:
            spent.append(
                {"seconds": round(time.monotonic() - started, 1), "load_average": record.load_average()}
            )
            clock.write_text(json.dumps(spent) + "\n")
        run.finish("evaluate")
    sittings = json.loads(clock.read_text()) if clock.exists() else []
    found: dict[str, Any] = json.loads(evaluation.read_text())
    return {
        "seed": seed,
        "metrics": found["metrics"],
        "intervals": found.get("intervals", {}),
        "baselines": found["baselines"],
        "paired": {name: found["paired"][name][METRIC] for name in proof.above},
        "train_minutes": sum(sitting["seconds"] for sitting in sittings) / 60 if sittings else float("nan"),
        "sittings": sittings,
        "command": run.shown_command("train"),
    }


def check(proof: Proof, seeds: Sequence[dict[str, Any]]) -> list[record.Bar]:
    """The bars of a proof: each holds for the worst of its seeds."""
    bars = []
    for metric, limit in proof.at_least:
        worst = min(seed["metrics"][metric] for seed in seeds)
        bars.append(record.Bar(name=f"{proof.name}: {metric}, worst seed", value=worst, limit=limit))
    for baseline in proof.above:
        lead = min(seed["metrics"][METRIC] - seed["baselines"][baseline][METRIC] for seed in seeds)
        bars.append(
            record.Bar(name=f"{proof.name}: {METRIC} above {baseline}", value=lead, limit=0, strict=True)
        )
    if proof.transition:
        middle, tolerance = proof.transition
        off = max(abs(seed["baselines"]["transition"][METRIC] - middle) for seed in seeds)
        name = f"{proof.name}: transition baseline off {middle}"
        bars.append(record.Bar(name=name, value=off, limit=tolerance, at_most=True))
    minutes = max(seed["train_minutes"] for seed in seeds)
    name = f"{proof.name}: minutes of training"
    return [*bars, record.Bar(name=name, value=minutes, limit=proof.train_minutes, at_most=True)]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [proof.name for proof in PROOFS]
    parser.add_argument("proofs", nargs="*", metavar="PROOF", help=f"of {', '.join(names)}; none = all")
    parser.add_argument("--seeds", type=int, default=0, help="at most so many seeds of each proof; 0 = all")
    parser.add_argument("--data", default=os.environ.get("JAXREC_DATA") or str(record.SHARED_DATA))
    parser.add_argument("--base", default=str(record.ROOT / "runs" / "quality"))
    arguments = parser.parse_args()
    if unknown := set(arguments.proofs) - set(names):
        parser.error(f"{', '.join(sorted(unknown))}: no such proof; choose from {', '.join(names)}.")
    return arguments


def main() -> int:
    """Runs what is missing, prints a line a seed, checks everything."""
    arguments = parse_arguments()
    figures: dict[str, Any] = {}
    bars: list[record.Bar] = []
    for proof in PROOFS:
        if arguments.proofs and proof.name not in arguments.proofs:
            continue
        count = min(proof.seeds, arguments.seeds or proof.seeds)
        seeds = []
        for seed in range(count):
            seeds.append(run_seed(proof, seed, Path(arguments.data), Path(arguments.base)))
            metrics = seeds[-1]["metrics"]
            for name, pair in seeds[-1]["paired"].items():
                low, high = pair["interval"]
                print(f"  {METRIC} above {name}: {pair['difference']:+.4f} [{low:+.4f}, {high:+.4f}], paired")
            print(
                f"{proof.name}, seed {seed}: ndcg@10 {metrics[METRIC]:.4f}, hr@10 {metrics['hr@10']:.4f}, "
                f"{seeds[-1]['train_minutes']:.1f} min",
                flush=True,
            )
        middle = {
            name: statistics.mean(seed["metrics"][name] for seed in seeds) for name in (METRIC, "hr@10")
        }
        figures[proof.name] = {"mean": middle, "seeds": seeds}
        bars += check(proof, seeds)
    # A part of the proofs has a file of its own, so that it never hides the whole.
    return record.finish("-".join(["quality", *arguments.proofs]), figures, bars)


if __name__ == "__main__":
    sys.exit(main())
