"""Does the cost of a step see the rows of a table? 64 floats a row, 100,000 unique ids a step, one device.

Each comparison is between two live processes that take turns: median of the pairs' ratios. Every process measures
its own peak memory, the initialisation included. Docs: docs/embedding.md.

    python benchmarks/table_scaling.py            # about 6 minutes on 2 cores, 14 GB
    python benchmarks/table_scaling.py --pairs=5
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import plots
import record
import turns
from worker_process import Worker, start_table

MILLION = 1_000_000
ROW_BYTES = 4 * 64 + 4  # a float32 row and row-wise Adagrad's float
ALLOWED_BYTES = 600 * 10**6
# name -> ((mode, rows), (mode, rows)): the second's milliseconds over the first's.
COMPARISONS: dict[str, tuple[tuple[str, int], tuple[str, int]]] = {
    "row_adagrad 10M over 100k": (("row_adagrad", MILLION // 10), ("row_adagrad", 10 * MILLION)),
    "dense_adam over row_adagrad at 1M": (("row_adagrad", MILLION), ("dense_adam", MILLION)),
    "dense_adam over row_adagrad at 10M": (("row_adagrad", 10 * MILLION), ("dense_adam", 10 * MILLION)),
    "dense_adam over lazy_adam at 10M": (("lazy_adam", 10 * MILLION), ("dense_adam", 10 * MILLION)),
}


LABELS = {
    "row_adagrad": "row-wise Adagrad, sparse",
    "lazy_adam": "lazy Adam, sparse",
    "dense_adam": "optax.adam, dense",
}


def start(kind: tuple[str, int]) -> Worker:
    """A worker of one mode and size."""
    return start_table(["--mode", kind[0], "--rows", str(kind[1]), "--ids", "unique"])


def draw(path: Path, sides: list[dict[str, Any]]) -> None:
    """Milliseconds a step over rows, a line an optimizer."""
    lines = {
        label: [(side["rows"], side["milliseconds"]) for side in sides if side["mode"] == mode]
        for mode, label in LABELS.items()
    }
    plots.draw_lines(
        path,
        "100,000 unique ids a step, 64 floats a row, one CPU device",
        lines,
        xlabel="rows of the table",
        ylabel="milliseconds a step",
        xscale="log",
        yscale="log",
    )


def main() -> int:
    """Runs the comparisons, draws them, checks the bars."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=7, help="steps of a turn")
    arguments = parser.parse_args()
    found = turns.run(COMPARISONS, start, arguments.pairs, arguments.steps)
    sides = list(turns.sides(found))
    adagrad = [side for side in sides if side["mode"] == "row_adagrad"]
    temporaries = [side["temporary_bytes"] for side in adagrad]
    excess = max(side["peak_bytes"] - 1.15 * side["rows"] * ROW_BYTES - ALLOWED_BYTES for side in adagrad)
    draw(record.RESULTS / "table_scaling.svg", sides)
    ratio = lambda name: found[name]["ratio"]  # noqa: E731
    bars = [
        record.Bar(name="pairs", value=arguments.pairs, limit=5),
        record.Bar(
            name="row-wise Adagrad, 10M rows over 100k",
            value=ratio("row_adagrad 10M over 100k"), limit=1.25, at_most=True,
        ),
        record.Bar(
            name="faster than dense Adam at 1M", value=ratio("dense_adam over row_adagrad at 1M"), limit=2
        ),
        record.Bar(
            name="faster than dense Adam at 10M", value=ratio("dense_adam over row_adagrad at 10M"), limit=12
        ),
        record.Bar(
            name="lazy Adam faster than dense Adam at 10M",
            value=ratio("dense_adam over lazy_adam at 10M"), limit=7,
        ),
        record.Bar(
            name="temporary bytes, largest over smallest",
            value=max(temporaries) / min(temporaries), limit=1.01, at_most=True,
        ),
        record.Bar(
            name="peak bytes beyond 1.15 x rows x 260 + 600 MB", value=excess, limit=0, at_most=True
        ),
    ]  # fmt: skip
    return record.finish("table_scaling", {"comparisons": found}, bars)


if __name__ == "__main__":
    sys.exit(main())
