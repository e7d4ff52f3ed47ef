"""What the command lines of `evaluate` and `recommend` have in common."""

import argparse
from pathlib import Path


def add_run_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """`--workdir`, `--batch-rows` and `--mesh-shape`."""
    parser.add_argument("--workdir", metavar="DIR", type=Path, required=required, help="the trained run")
    parser.add_argument(
        "--batch-rows",
        metavar="N",
        type=positive,
        help="packed rows at a time; changes speed and memory only",
    )
    parser.add_argument(
        "--mesh-shape",
        metavar="D,M",
        type=mesh_shape,
        help="another mesh than the run's, e.g. --mesh-shape=-1,1",
    )


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def mesh_shape(text: str) -> tuple[int, int]:
    """`D,M`."""
    try:
        data, model = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not two sizes like 2,4 or -1,1") from None
    return data, model
