"""Makes a trained run smaller, by several methods, and says what each gives and costs:

    python -m jaxrec.compress --workdir=runs/quickstart --out=runs/quickstart/compressed
    python -m jaxrec.compress --workdir=runs/quickstart --out=runs/small --methods=int8,pq --beside=runs/student

Writes a directory a method, `compression.json` and `report.html` into `--out`. The same command goes on where it was
stopped. docs/compression.md says what the methods do and how to read the table.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from jaxrec.compression.named_methods import METHODS
from jaxrec.compression.report import print_study, write_study_report
from jaxrec.compression.study import Request, run_study
from jaxrec.core.log import failed, start_logging
from jaxrec.core.mesh import initialize_platform
from jaxrec.evaluation.arguments import positive

REPORT_FILE = "report.html"


def main(arguments: list[str] | None = None) -> int:
    """The entry; returns the exit status."""
    request = parse_arguments(arguments)
    start_logging()
    try:
        initialize_platform()
        values = run_study(request)
        write_study_report(request.out / REPORT_FILE, values)
    except (ValueError, OSError) as error:
        return failed(error)
    console = Console()
    print_study(console, values)
    console.print(f"report: {request.out / REPORT_FILE}", soft_wrap=True, markup=False, highlight=False)
    return 0


def parse_arguments(arguments: list[str] | None) -> Request:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxrec.compress",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", metavar="DIR", type=Path, required=True, help="the trained run")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where the smaller models go")
    parser.add_argument(
        "--methods", metavar="A,B", default=",".join(METHODS), help=f"of {', '.join(METHODS)} (default: all)"
    )
    parser.add_argument(
        "--beside", metavar="DIR,DIR", default="", help="other trained runs on the same data, to compare with"
    )
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="(default: test)")
    parser.add_argument("--repeats", type=positive, default=30, help="of each latency (default: 30)")
    given = parser.parse_args(arguments)
    try:
        return Request(
            workdir=given.workdir,
            out=given.out,
            methods=[name for name in given.methods.split(",") if name],
            beside=[Path(path) for path in given.beside.split(",") if path],
            split=given.split,
            repeats=given.repeats,
        )
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
