"""`python -m jaxrec.prepare`: validate a source, split it, and write it as a dataset that training reads.

    python -m jaxrec.prepare --data.path=DIR --out=PREPARED
    python -m jaxrec.prepare --config=configs/ml1m_sasrec.py --config.data.split=GlobalTime --out=PREPARED

docs/data.md says what a source looks like.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from jaxrec.config import apply_overrides, describe_fields, load_config, split_overrides
from jaxrec.core.log import failed
from jaxrec.data.config import DataConfig
from jaxrec.data.prepare import Progress as StageProgress
from jaxrec.data.prepare import prepare

COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
REFRESH_SECONDS = 0.1
STAGES = {
    "read": "reading and checking rows",
    "sort": "sorting histories",
    "items": "tokenising items",
    "write": "writing users",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare one dataset; returns the exit status (0 = done, 2 = bad input, said on stderr)."""
    console = Console(stderr=True)
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    config, out = parse_arguments(arguments)
    try:
        # No refreshing thread: TFDS replaces `import` while it is imported, for all threads, and rich imports late.
        with Progress(*COLUMNS, console=console, auto_refresh=False) as bars:
            prepare(config, out, progress=_reporter(bars))
    except (ValueError, OSError) as error:
        return failed(error)
    print_summary(Console(), out)
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> tuple[DataConfig, Path]:
    """The data config and the output directory that a command line asks for."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    of_config, rest = split_overrides(given)
    of_data, rest = split_overrides(rest, prefix="data")
    parser = argparse.ArgumentParser(
        prog="python -m jaxrec.prepare",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="fields of --data (with --config=FILE, those of its `data`):\n"
        + describe_fields(DataConfig(), prefix="data"),
        usage="%(prog)s --out=DIR [--config=FILE[:VARIANT]] [--data.FIELD=VALUE ...]",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="where the prepared dataset goes"
    )
    parser.add_argument("--config", metavar="FILE[:VARIANT]", help="take the `data` of this config")
    parsed = parser.parse_args(rest)
    try:
        if parsed.config:
            data = apply_overrides(load_config(parsed.config), of_config).data
        elif of_config:
            raise ValueError(
                f"{of_config[0]} changes a config, but --config=FILE is missing; or write --data.FIELD."
            )
        else:
            data = DataConfig()
        return apply_overrides(data, of_data, prefix="data"), parsed.out
    except ValueError as error:
        parser.error(str(error))


def _reporter(bars: Progress) -> StageProgress:
    tasks: dict[str, TaskID] = {}
    shown_seconds = 0.0

    def report(stage: str, done: int, total: int) -> None:
        nonlocal shown_seconds
        if stage not in tasks:
            tasks[stage] = bars.add_task(STAGES[stage], total=total or None)
        bars.update(tasks[stage], completed=done, total=total or None)
        if time.monotonic() - shown_seconds >= REFRESH_SECONDS or done == total:
            bars.refresh()
            shown_seconds = time.monotonic()

    return report


def print_summary(console: Console, out: Path) -> None:
    """What was read, kept and set aside, from `statistics.json`."""
    statistics = json.loads((out / "statistics.json").read_text(encoding="utf-8"))
    metadata, rows, split = statistics["metadata"], statistics["rows"], statistics["split"]
    table = Table(title=escape(f"{metadata['name']} -> {out}"), show_header=False, title_justify="left")
    table.add_row(
        "rows", f"{rows['read']:,} read = {rows['kept']:,} kept + {rows['quarantined']:,} quarantined"
    )
    table.add_row("users, items", f"{metadata['num_users']:,}, {metadata['num_items']:,}")
    table.add_row(
        "exact duplicates", f"{rows['exact_duplicates']:,} ({rows['duplicates_dropped']:,} dropped)"
    )
    table.add_row(
        "repeats of an item", f"{rows['repeats_of_an_item']:,} ({rows['repeat_share']:.1%} of events)"
    )
    table.add_row("filter_seen", str(metadata["filter_seen"]).lower())
    parts = ", ".join(f"{name} {split[f'{name}_events']:,}" for name in ("train", "validation", "test"))
    table.add_row(
        f"split ({metadata['split']})", f"{parts}; {split['training_only_users']:,} users train only"
    )
    for name, counts in statistics["behaviours"].items():
        known = counts["events"] - counts["unknown"]
        table.add_row(escape(f"behaviour {name}"), f"{counts['positive']:,} of {known:,} known labels are 1")
    for one in statistics["quarantine"]:
        table.add_row("[yellow]quarantined", escape(f"{one['rows']:,} x {one['table']}: {one['reason']}"))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
