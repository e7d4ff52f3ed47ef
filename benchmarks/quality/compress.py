"""Smaller models of ML-1M: what codes, pruning and distillation cost, and whether a small dense model does as well.

`configs/ml1m_sasrec.py` is trained, seed by seed, and compressed by every method; a student of half the layers is
trained from scratch and taught by the seed's own run; the taught one's dropout is tried from scratch too; and for each
method with codes a dense model of equal bytes is trained. Those two in one seed, unless --side-seeds says more: what
they lose is larger than what seeds differ by.

The bars: int8 loses at most 1 % of NDCG@10 at 30 % of the bytes or less; 4 bits lose at most 2 % at 15 % or less
(product codes stand beside them); the taught student is above the same student from scratch, in pairs over users and
seeds; and each method with codes is above the dense model of equal bytes. Every method's figures are printed and kept,
whichever way it went.

    python benchmarks/quality/compress.py            # fourteen trainings, of half an hour or less each on 2 quiet cores
    python benchmarks/quality/compress.py --seeds=1
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import suite
from suite import METRIC, Seed, Variant, record

from jaxrec.evaluation.comparison import RANKS_FILE

DATA = "ml-1m-sasrec"
TEACHER = Variant(name="ml1m_sasrec", config="configs/ml1m_sasrec.py", data=DATA)
SCRATCH = Variant(name="ml1m_student", config="configs/ml1m_student.py", data=DATA)
LIGHT = Variant(  # the taught student's dropout, without a teacher: is it that which helps?
    name="ml1m_student-dropout-0.1", config="configs/ml1m_student.py:half_dropout", data=DATA
)
LIMITS = {"int8": (0.30, -0.01), "int4": (0.15, -0.02)}  # share of the bytes, relative change of the metric
HELD = (*LIMITS, "pq", "pq_int4")  # against a dense model of equal bytes


def distilled(base: Path) -> Variant:
    """The student of each seed's own teacher, whose place is seen from where the entries run, as on any machine."""
    teacher = Path(os.path.relpath(base, record.ROOT)) / f"{TEACHER.name}-seed-{{seed}}"
    return Variant(
        name="ml1m_distilled",
        config="configs/ml1m_student.py:distilled",
        overrides=(f"tasks.distillation.teacher={teacher}", f"init_from={teacher}"),
        data=DATA,
    )


def compress(seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """The summary of `jaxrec.compress` on a seed's teacher, which is trained where its run is gone.

    Raises:
        RuntimeError: an entry failed.
    """
    run = suite.tried(TEACHER, given).run(seed, given.data, given.base)
    run.finish("train")
    out = run.workdir / "compressed"
    run.finish("compress", f"--out={out}")
    summary: dict[str, Any] = json.loads((out / "compression.json").read_text())
    return summary


def rival(method: str, summary: Mapping[str, Any]) -> Variant | None:
    """The dense model of equal bytes; None where none is narrow enough."""
    command = summary["systems"][method]["command"]
    if not command:
        return None
    overrides = tuple(part.removeprefix("--config.") for part in command.split())
    return dataclasses.replace(TEACHER, name=f"compression_dense-{method}", overrides=overrides)


def seeds_of(method: str, summaries: Sequence[Mapping[str, Any]], given: argparse.Namespace) -> list[Seed]:
    """A method over the seeds, in the form of trained runs."""
    found = []
    for seed, summary in enumerate(summaries):
        workdir = suite.tried(TEACHER, given).run(seed, given.data, given.base).workdir
        table = pq.read_table(workdir / "compressed" / method / RANKS_FILE)
        figures = {"metrics": summary["systems"][method]["metrics"]}
        found.append(Seed(figures, table["rank"].to_numpy(), table["user_id"].to_numpy()))
    return found


def means(method: str, summaries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of a method over the seeds: the metric, its relative change, the share of the bytes, milliseconds."""
    rows = [summary["systems"][method] for summary in summaries]
    originals = [summary["systems"]["original"] for summary in summaries]
    value, before = (statistics.mean(row["metrics"][METRIC] for row in side) for side in (rows, originals))
    return {
        METRIC: value,
        "relative_change": value / before - 1.0 if before else float("nan"),
        "share_of_bytes": statistics.mean(row["share_of_bytes"] for row in rows),
        "num_bytes": rows[0]["num_bytes"],
        "latency_ms": statistics.mean(row["latency_ms"] for row in rows),
    }


def loss_bars(table: Mapping[str, Mapping[str, float]]) -> list[record.Bar]:
    """Bytes and loss of the methods with limits."""
    bars = []
    for name, (most_bytes, least_change) in LIMITS.items():
        share, change = (table[name][field] for field in ("share_of_bytes", "relative_change"))
        bars.append(
            record.Bar(name=f"{name}: share of the bytes", value=share, limit=most_bytes, at_most=True)
        )
        bars.append(record.Bar(name=f"{name}: relative change", value=change, limit=least_change))
    return bars


def main() -> int:
    """Trains what is missing, compresses, compares, checks."""
    parser = suite.argument_parser(__doc__)
    suite.add_trial_arguments(parser)
    parser.add_argument(
        "--side-seeds", type=int, default=1, help="of the dense models and of the other dropout (default: 1)"
    )
    given = parser.parse_args()
    few = argparse.Namespace(**vars(given) | {"seeds": min(given.side_seeds, given.seeds)})
    teachers = suite.run_variant(TEACHER, given)
    summaries = [compress(seed, given) for seed in range(given.seeds)]
    table = {name: means(name, summaries) for name in summaries[0]["systems"]}
    for name, row in table.items():
        print(
            f"{name}: {METRIC} {row[METRIC]:.4f} ({row['relative_change']:+.1%}), {row['share_of_bytes']:.1%} of the "
            f"bytes, {row['latency_ms']:.2f} ms"
        )
    bars, figures = loss_bars(table), {"table": table, "teachers": suite.summary(teachers)}
    scratch, taught = suite.run_variant(SCRATCH, given), suite.run_variant(distilled(given.base), given)
    comparison = suite.compare_variants(scratch, taught)
    bars.append(suite.paired_bar("the taught student above the same from scratch", comparison))
    light = suite.run_variant(LIGHT, few)
    lighter = suite.compare_variants(scratch[: few.seeds], light)
    print(f"  half the dropout alone: {lighter.difference:+.4f} [{lighter.low:+.4f}, {lighter.high:+.4f}]")
    figures |= {
        "scratch": suite.summary(scratch),
        "scratch, half the dropout": suite.summary(light),
        "distilled": suite.summary(taught),
    }
    figures["paired"] = {
        "distilled": dataclasses.asdict(comparison),
        "half the dropout alone": dataclasses.asdict(lighter),
    }
    for method in HELD:
        dense = rival(method, summaries[0])
        if dense is None:
            print(f"{method}: no dense model is as small")
            continue
        rivals = suite.run_variant(dense, few)
        comparison = suite.compare_variants(rivals, seeds_of(method, summaries[: few.seeds], few))
        bars.append(suite.paired_bar(f"{method} above the dense model of equal bytes", comparison))
        figures["paired"][method] = dataclasses.asdict(comparison)
        figures[dense.name] = suite.summary(rivals)
    return record.finish("quality_compression", figures, bars, results=given.results)


if __name__ == "__main__":
    sys.exit(main())
