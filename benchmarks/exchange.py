"""The exchange on 8 virtual devices: 8 million rows of 64 floats, 100,000 ids a step, overflow rounds on.

Ours against the same sparse update left to the compiler's partitioning, and ours on skewed ids against ours on uniform
ones: two live processes take turns, the bars hold for the median of the pairs' ratios. Docs: docs/embedding.md.

    python benchmarks/exchange.py    # about 5 minutes on 2 cores
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import plots
import record
import turns
from worker_process import Worker, start_table

ROWS, DEVICES = 8_000_000, 8
# name -> ((mode, ids), (mode, ids)): the second's milliseconds over the first's.
COMPARISONS = {
    "compiler over ours, uniform": (("row_adagrad", "uniform"), ("gspmd", "uniform")),
    "zipf over uniform": (("row_adagrad", "uniform"), ("row_adagrad", "zipf")),
    "sorted over uniform": (("row_adagrad", "uniform"), ("row_adagrad", "sorted")),
}


def draw(path: Path, found: dict[str, dict[str, Any]]) -> None:
    """A bar for each way and each kind of ids; ours on uniform ids is the mean over the comparisons."""
    uniform = statistics.mean(one["first"]["milliseconds"] for one in found.values())
    compiler, zipf, ordered = (one["second"]["milliseconds"] for one in found.values())
    bars = {
        "the compiler's partitioning,\nuniform ids": compiler,
        "ours, uniform ids": uniform,
        "ours, Zipf(1.2)": zipf,
        "ours, sorted by popularity": ordered,
    }
    title = "8 million rows of 64 floats, 100,000 ids a step, 8 virtual CPU devices"
    plots.draw_bars(path, title, bars, xlabel="milliseconds a step")


def main() -> int:
    """Runs the comparisons and checks the bars."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn")
    parser.add_argument("--rows", type=int, default=ROWS)
    arguments = parser.parse_args()

    def start(kind: tuple[str, str]) -> Worker:
        mode, ids = kind
        return start_table(
            ["--mode", mode, "--ids", ids, "--rows", str(arguments.rows), "--devices", str(DEVICES)]
        )

    found = turns.run(COMPARISONS, start, arguments.pairs, arguments.steps)
    draw(record.RESULTS / "exchange.svg", found)
    peak = max(side["peak_bytes"] for side in turns.sides(found) if side["mode"] != "gspmd")
    bars = [
        record.Bar(name="pairs", value=arguments.pairs, limit=5),
        record.Bar(
            name="faster than the compiler's partitioning",
            value=found["compiler over ours, uniform"]["ratio"], limit=2.5,
        ),
        record.Bar(
            name="Zipf(1.2) over uniform", value=found["zipf over uniform"]["ratio"], limit=1.5, at_most=True
        ),
        record.Bar(
            name="sorted by popularity over uniform",
            value=found["sorted over uniform"]["ratio"], limit=1.5, at_most=True,
        ),
        record.Bar(name="peak GB", value=peak / 1e9, limit=6, at_most=True),
    ]  # fmt: skip
    return record.finish("exchange", {"comparisons": found}, bars)


if __name__ == "__main__":
    sys.exit(main())
