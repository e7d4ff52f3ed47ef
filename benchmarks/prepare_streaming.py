"""Prepare 50 million events in less than 2 GB of memory.

    python benchmarks/prepare_streaming.py                                   # the full run, 10 to 35 minutes on 2 cores
    python benchmarks/prepare_streaming.py --events=1000000 --results=/tmp   # a minute

The events are generated as Parquet files in a shuffled order of users, with times, ratings and bad rows; prepare runs
in a process of its own, whose peak resident memory the kernel reports. The exit status is 1 when the peak reaches the
limit, or when rows are lost.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import record

LIMIT_BYTES = 2 * 10**9
ROWS_AT_ONCE = 1_000_000
BAD_SHARE = 0.001


def generate(directory: Path, num_events: int, num_users: int, num_items: int, seed: int) -> int:
    """Write the events and the titles; returns the number of rows that cannot be used."""
    random = np.random.default_rng(seed)
    (directory / "events").mkdir(parents=True)
    bad = 0
    for part, start in enumerate(range(0, num_events, ROWS_AT_ONCE)):
        rows = min(ROWS_AT_ONCE, num_events - start)
        # Popularity falls as a power law; users differ in activity as well.
        items = np.minimum(random.zipf(1.2, rows) - 1, num_items - 1) * 7919 % num_items
        users = (num_users * random.random(rows) ** 2).astype(np.int64)
        unknown = random.random(rows) < BAD_SHARE
        bad += int(unknown.sum())
        table = pa.table(
            {
                "user_id": pa.array(users, mask=unknown),
                "item_id": items,
                "timestamp": 1_500_000_000 + random.integers(0, 10**8, rows),
                "rating": pa.array(random.integers(1, 6, rows), pa.int8()),
            }
        )
        pq.write_table(table, directory / "events" / f"part-{part:05d}.parquet")
    items = np.arange(num_items)
    titles = [f"Item number {item} of the generated catalogue" for item in items.tolist()]
    pq.write_table(pa.table({"item_id": items, "title": titles}), directory / "items.parquet")
    return bad


def run_prepare(source: Path, out: Path) -> tuple[float, int]:
    """(seconds, peak resident bytes) of `python -m jaxrec.prepare` in a process of its own."""
    command = [sys.executable, "-m", "jaxrec.prepare", f"--data.path={source}", f"--out={out}"]
    start = time.monotonic()
    subprocess.run(command, check=True)
    seconds = time.monotonic() - start
    return seconds, record.peak_bytes(resource.RUSAGE_CHILDREN)


def main() -> int:
    """Generate, prepare, compare; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=50_000_000)
    parser.add_argument("--users", type=int, default=0, help="0 = one per 50 events")
    parser.add_argument("--items", type=int, default=0, help="0 = one per 250 events")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="where to work (default: a temporary directory)")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="where the JSON goes")
    options = parser.parse_args()
    num_users, num_items = options.users or options.events // 50, options.items or options.events // 250
    work = Path(tempfile.mkdtemp(prefix="jaxrec-prepare-", dir=options.directory))
    try:
        bad = generate(work / "source", options.events, num_users, num_items, options.seed)
        seconds, peak = run_prepare(work / "source", work / "prepared")
        statistics = json.loads((work / "prepared" / "statistics.json").read_text(encoding="utf-8"))
        size = sum(path.stat().st_size for path in (work / "prepared").rglob("*") if path.is_file())
    finally:
        shutil.rmtree(work, ignore_errors=True)
    rows = statistics["rows"]
    figures = {
        "events": options.events,
        "users": statistics["metadata"]["num_users"],
        "items": statistics["metadata"]["num_items"],
        "quarantined": rows["quarantined"],
        "seconds": round(seconds, 1),
        "events_per_second": round(options.events / seconds),
        "peak_resident_bytes": peak,
        "prepared_bytes": size,
    }
    lost = abs(options.events - rows["read"]) + abs(rows["read"] - bad - rows["kept"])
    bars = [
        record.Bar(name="peak resident bytes", value=peak, limit=LIMIT_BYTES, at_most=True),
        record.Bar(name="rows lost", value=lost, limit=0, at_most=True),
        record.Bar(
            name="rows wrongly quarantined or let through", value=abs(rows["quarantined"] - bad),
            limit=0, at_most=True,
        ),
    ]  # fmt: skip
    return record.finish("prepare_streaming", figures, bars, results=options.results)


if __name__ == "__main__":
    sys.exit(main())
