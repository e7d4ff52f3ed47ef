"""Exports a trained run: `python -m jaxrec.export --workdir=runs/quickstart --out=exports/quickstart`.

Writes a new directory OUT/VERSION with the programs (user tower, item tower, recommend, rank, and what else the model
can do) as StableHLO and as a TensorFlow SavedModel, with --onnx as ONNX too; the weights and item vectors; the
catalogue with your own ids and titles; config, metrics, a model card, and a manifest with the SHA-256 of every file.
Each artifact is loaded back in a process of its own and compared with JAX before the version gets its name.

    python -m jaxrec.export --workdir=runs/mine --out=exports/mine --version=2026-11-27 --k=200
    python -m jaxrec.export --workdir=runs/mine --out=exports/mine --onnx --dtype=bfloat16
    python -m jaxrec.export --workdir=runs/mine --out=exports/mine --compressed=runs/mine/compressed/int8

A workdir with stages stands for that of its last one. docs/export.md says what each file is and how it is read.
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jaxrec.config import run_directory
from jaxrec.core.log import failed, start_logging
from jaxrec.core.mesh import initialize_platform
from jaxrec.evaluation.arguments import mesh_shape, positive
from jaxrec.export.candidates import METHODS
from jaxrec.export.compressed import export_compressed
from jaxrec.export.exporter import Export, ExportOptions, export_run
from jaxrec.export.manifest import check_name
from jaxrec.export.weights import DTYPES


def main(arguments: list[str] | None = None) -> int:
    """The entry; returns the exit status."""
    given = parse_arguments(arguments)
    start_logging()
    console, started = Console(stderr=True), time.perf_counter()
    options = ExportOptions(
        version=given.version or "",
        k=given.k,
        dtype=given.dtype,
        saved_model=not given.no_saved_model,
        onnx=given.onnx,
        data_licence=given.data_licence,
        histories=given.histories,
        candidates=tuple(given.candidates),
        index=given.index,
    )

    def say(text: str) -> None:
        seconds = f"[{time.perf_counter() - started:4.0f} s]"
        console.print(f"{seconds} {text}", markup=False, highlight=False, soft_wrap=True)

    try:
        check_libraries(given)
        initialize_platform()
        workdir, how = run_directory(given.workdir), {"mesh_shape": given.mesh_shape, "say": say}
        if given.compressed is None:
            export = export_run(workdir, given.out, options, **how)
        else:
            export = export_compressed(workdir, given.compressed, given.out, options, **how)
    except (ValueError, OSError, NotImplementedError) as error:
        return failed(error)
    show(Console(), export)
    return 0


def check_libraries(given: argparse.Namespace) -> None:
    """Raises ValueError where a library of an option is missing."""
    wanted = {
        "onnx": ("onnx", "onnxruntime") if given.onnx else (),
        "index": ("faiss",) if given.index else (),
    }
    for extra, names in wanted.items():
        for name in names:
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"--{extra} needs the package {name}: pip install 'jaxrec[{extra}]'.")


def show(console: Console, export: Export) -> None:
    """The artifacts with their bytes and largest differences, and where they lie."""
    table = Table("artifact", "files", "bytes", "largest difference from JAX", box=None)
    sizes: dict[str, list[int]] = {}
    for path, entry in export.manifest.files.items():
        sizes.setdefault(path.split("/")[0], []).append(entry.num_bytes)
    worst = {"StableHLO": "stablehlo", "SavedModel": "saved_model", "ONNX": "onnx"}
    largest: dict[str, float] = {}
    for check in export.checks:
        name = worst[check.artifact]
        largest[name] = max(largest.get(name, 0.0), check.difference)
    for name, of_files in sorted(sizes.items()):
        found = f"{largest[name]:.1e}" if name in largest else ""
        table.add_row(name, str(len(of_files)), f"{sum(of_files):,}", found)
    console.print(table)
    apart, same = export.agreement
    console.print(
        f"beside the run's own recommendations: largest difference {apart:.1e}, {100 * same:.1f} % of the lists of 10 "
        "the same",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    console.print(f"done: {export.directory}", soft_wrap=True, markup=False, highlight=False)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxrec.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", metavar="DIR", type=Path, required=True, help="the trained run")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where versions are kept")
    parser.add_argument("--version", metavar="NAME", type=version_name, help="default: the time and the step")
    parser.add_argument(
        "--k", metavar="N", type=positive, default=100, help="items of the longest list (default 100)"
    )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float32", help="of the stored weights (default float32)"
    )
    parser.add_argument(
        "--compressed",
        metavar="DIR",
        type=Path,
        help="a model that jaxrec.compress has made of the run, in its stead: OUT/METHOD there",
    )
    parser.add_argument(
        "--no-saved-model",
        action="store_true",
        help="no TensorFlow SavedModel; jaxrec.serve does not read it",
    )
    parser.add_argument("--onnx", action="store_true", help="write ONNX too; needs the extra `onnx`")
    parser.add_argument(
        "--histories",
        action="store_true",
        help="write the users' histories too, for jaxrec.serve; personal data",
    )
    parser.add_argument(
        "--candidates",
        metavar="METHOD",
        action="append",
        choices=tuple(METHODS),
        default=[],
        help=f"candidates beside the model's, for jaxrec.serve: {', '.join(METHODS)}; give it once for each",
    )
    parser.add_argument(
        "--index",
        action="store_true",
        help="an approximate index, for catalogues of a million items; needs the extra `index`",
    )
    parser.add_argument("--data-licence", metavar="TEXT", default="", help="of the data, for the model card")
    parser.add_argument(
        "--mesh-shape", metavar="D,M", type=mesh_shape, help="another mesh than the run's, e.g. -1,1"
    )
    return parser.parse_args(arguments)


def version_name(text: str) -> str:
    """A strict name."""
    try:
        return check_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
