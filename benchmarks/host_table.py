"""What a miss costs where a table's rows are on the host, in memory or on disk, against a table on the device.

4 million rows of 64 floats with row-wise Adagrad, 20,000 distinct rows a step, a cache of 200,000 on one CPU device.
For each share of the step's rows that the cache holds, two live processes take turns: the whole table on the device,
and the cache in front of the host's rows, which are in memory, mapped from files that the system holds in its page
cache ("disk"), or from files that it was told to forget before each turn ("cold disk"). Afterwards all rows and slots
of the two must agree to the bit. Docs: docs/embedding.md.

    python benchmarks/host_table.py      # about 10 minutes on 2 cores, 5 GB of memory, 1.1 GB of disk
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
from host_table_worker import IDS
from worker_process import Worker

HIT_RATES = (1.0, 0.9, 0.5, 0.0)
STORES = ("memory", "disk", "cold disk")
LABELS = {
    "memory": "host memory",
    "disk": "mapped files, in the page cache",
    "cold disk": "mapped files, cold",
}


def start(where: str, hit_rate: float, arguments: argparse.Namespace) -> Worker:
    """A table that trains, in the environment that runs this program."""
    options = [f"--rows={arguments.rows}", f"--where={where}", f"--hit-rate={hit_rate}"]
    if arguments.directory:
        options.append(f"--directory={arguments.directory}")
    return Worker([sys.executable, str(record.ROOT / "benchmarks" / "host_table_worker.py"), *options])


def compare(store: str, hit_rate: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """The table on the device and on the host, in turns, with what the difference is for each missed row."""
    with start("device", hit_rate, arguments) as one, start(store, hit_rate, arguments) as other:
        found = turns.compare(one, other, arguments.pairs, arguments.steps)
        last = other.ask(count=arguments.steps)
        one.ask(count=arguments.steps)
        digests = [worker.ask(count=0, digest=True)["digest"] for worker in (one, other)]
    extra = statistics.median(pair[1] - pair[0] for pair in found["pairs"])
    missed = last["missed"]
    found |= {
        "extra_milliseconds": extra,
        "missed_rows": missed,
        "hit_rate": 1 - missed / IDS,
        "microseconds_a_missed_row": 1e3 * extra / missed if missed else None,
        "major_faults_a_step": last["major_faults"] / arguments.steps,
        "same_bits": digests[0] == digests[1],
    }
    miss = f"{1e3 * extra / missed:.2f} us a missed row" if missed else "nothing missed"
    print(
        f"{store}, {hit_rate:.0%} hits: {found['second']['milliseconds']:.1f} ms a step against "
        f"{found['first']['milliseconds']:.1f} on the device, {miss}, load {found['load_average'][0]}",
        flush=True,
    )
    return found


def draw(path: Path, found: dict[str, dict[str, Any]]) -> None:
    """Milliseconds a step over missed rows, a line a store; the device's are the mean over the hit rates."""
    lines: dict[str, list[tuple[float, float]]] = {label: [] for label in LABELS.values()}
    for one in found.values():
        lines[LABELS[one["second"]["where"]]].append((one["missed_rows"], one["second"]["milliseconds"]))
    device = statistics.mean(one["first"]["milliseconds"] for one in found.values())
    plots.draw_lines(
        path,
        "4 million rows of 64 floats, a cache of 200,000, one CPU device",
        lines,
        level=("whole table on the device", device),
        xlabel=f"rows of a step's {IDS:,} that the cache lacks",
        ylabel="milliseconds a step",
        yscale="log",
    )


def main() -> int:
    """Runs the comparisons, draws them, checks the bars."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn")
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--directory", help="for the files; default: the system's for temporary ones")
    arguments = parser.parse_args()
    found = {
        f"{store}, {hit_rate:.0%} hits": compare(store, hit_rate, arguments)
        for store in STORES
        for hit_rate in HIT_RATES
    }
    draw(record.RESULTS / "host_table.svg", found)
    far = max(abs(one["hit_rate"] - one["second"]["hit_rate"]) for one in found.values())
    bars = [
        record.Bar(name="pairs", value=arguments.pairs, limit=5),
        record.Bar(
            name="tables whose bits differ from the device's",
            value=sum(not one["same_bits"] for one in found.values()), limit=0, at_most=True,
        ),
        record.Bar(name="a hit rate's distance from its name", value=far, limit=0.001, at_most=True),
    ]  # fmt: skip
    return record.finish("host_table", {"comparisons": found}, bars)


if __name__ == "__main__":
    sys.exit(main())
