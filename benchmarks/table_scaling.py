"""Does the cost of a step see the rows of a table? 64 floats a row, 100,000 unique ids a step, one device.

Each comparison is between two live processes that take turns: median of the pairs' ratios. Every process measures
its own peak memory, the initialisation included. Docs: docs/embedding.md.

    python benchmarks/table_scaling.py            # about 6 minutes on 2 cores, 14 GB
    python benchmarks/table_scaling.py --pairs=5
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import record
from scaling_plot import write_svg
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


def start(kind: tuple[str, int]) -> Worker:
    """A worker of one mode and size."""
    return start_table(["--mode", kind[0], "--rows", str(kind[1]), "--ids", "unique"])


def compare(first: Worker, second: Worker, pairs: int, steps: int) -> dict[str, Any]:
    """Medians of either, and of the pairs' ratios."""
    for worker in (first, second):
        worker.ask(count=2)  # the first step touches memory for the first time
    answers = [(first.ask(count=steps), second.ask(count=steps)) for _ in range(pairs)]
    medians = [[statistics.median(side["milliseconds"]) for side in pair] for pair in answers]
    return {
        "first": first.ready | {"milliseconds": statistics.median(m[0] for m in medians)},
        "second": second.ready | {"milliseconds": statistics.median(m[1] for m in medians)},
        "pairs": medians,
        "ratio": statistics.median(m[1] / m[0] for m in medians),
        "peak_bytes": [side["peak_bytes"] for side in answers[-1]],
        "load_average": record.load_average(),
    }


def main() -> int:
    """Runs the comparisons, draws them, checks the bars."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=7, help="steps of a turn")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    for name, (first, second) in COMPARISONS.items():
        with start(first) as one, start(second) as other:
            found[name] = compare(one, other, arguments.pairs, arguments.steps)
        result = found[name]
        print(
            f"{name}: {result['first']['milliseconds']:.0f} and {result['second']['milliseconds']:.0f} ms, "
            f"ratio {result['ratio']:.2f}, load {result['load_average'][0]}",
            flush=True,
        )
    sides = [
        (side["mode"], side["rows"], side["milliseconds"], side["temporary_bytes"], peak)
        for result in found.values()
        for side, peak in zip((result["first"], result["second"]), result["peak_bytes"], strict=True)
    ]
    adagrad = [side for side in sides if side[0] == "row_adagrad"]
    temporaries = [side[3] for side in adagrad]
    excess = max(side[4] - 1.15 * side[1] * ROW_BYTES - ALLOWED_BYTES for side in adagrad)
    write_svg(record.RESULTS / "table_scaling.svg", sides)
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
