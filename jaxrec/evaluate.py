"""Measures a trained run over the whole catalogue, beside baselines:

    python -m jaxrec.evaluate --workdir=runs/quickstart
    python -m jaxrec.evaluate --compare runs/a runs/b

The first writes `evaluation.json`, `ranks.parquet` (each user's rank) and `report.html` into the workdir. The second
asks whether run B differs from run A by more than luck, user by user, from the ranks that the first saved. A workdir
with stages stands for that of its last one.
docs/evaluation.md says what the numbers mean.
"""

import argparse
import shlex
import sys
from pathlib import Path

import jax
from rich.console import Console

from jaxrec.config import run_directory
from jaxrec.core.log import failed, start_logging
from jaxrec.core.mesh import initialize_platform
from jaxrec.evaluation.arguments import add_run_arguments
from jaxrec.evaluation.comparison import compare_runs
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.evaluation.console import (
    print_behaviours,
    print_comparison,
    print_evaluation,
    print_example,
    print_groups,
    print_kinds,
    print_search,
    print_slates,
)
from jaxrec.evaluation.evaluator import REPORT_FILE, Evaluation, evaluate, save_evaluation
from jaxrec.runs import load_run


def main(arguments: list[str] | None = None) -> int:
    """The entry; returns the exit status."""
    given = parse_arguments(arguments)
    start_logging()
    try:
        if given.compare:
            print_comparison_of(given.compare)
        else:
            initialize_platform()
            evaluate_workdir(given, ["jaxrec.evaluate", *(sys.argv[1:] if arguments is None else arguments)])
    except (ValueError, OSError) as error:
        return failed(error)
    return 0


def evaluate_workdir(given: argparse.Namespace, command: list[str]) -> Evaluation:
    """Evaluates the run of `--workdir`, saves what was found, and prints it."""
    workdir = run_directory(given.workdir)
    run = load_run(workdir, mesh_shape=given.mesh_shape)
    with jax.set_mesh(run.mesh):
        evaluation = evaluate(
            run,
            given.split,
            config=run.config.evaluation,
            rows_per_batch=given.batch_rows,
            command="python -m " + shlex.join(command),
        )
    if jax.process_index() == 0:
        save_evaluation(workdir, evaluation, run)
        show(Console(), evaluation, workdir)
    return evaluation


def show(console: Console, evaluation: Evaluation, workdir: Path) -> None:
    """The metrics beside the baselines, a user's recommendations, and where the report is."""
    print_evaluation(console, evaluation.values)
    if "behaviour_comparison" in evaluation.values:
        print_behaviours(console, evaluation.values["behaviour_comparison"])
    if evaluation.values["search"]:
        print_search(console, evaluation.values["search"], evaluation.values["headline_metric"])
    if evaluation.values["kinds"]:
        print_kinds(console, evaluation.values["kinds"], evaluation.values["headline_metric"])
    if evaluation.values["groups"]:
        print_groups(console, evaluation.values["groups"])
    if evaluation.values["slates"]:
        print_slates(console, evaluation.values["slates"])
    if evaluation.examples:
        print_example(console, evaluation.examples[0])
    console.print(f"report: {workdir / REPORT_FILE}", soft_wrap=True, markup=False, highlight=False)


def print_comparison_of(workdirs: list[Path]) -> None:
    """Prints the paired tests between two evaluated runs."""
    config = EvaluationConfig()
    path_a, path_b = map(run_directory, workdirs)
    comparisons = compare_runs(path_a, path_b, config=config)
    print_comparison(Console(), str(path_a), str(path_b), comparisons, config.confidence)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxrec.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_run_arguments(parser, required=False)
    parser.add_argument(
        "--split",
        choices=("test", "validation"),
        default="test",
        help="whose targets are ranked (default: test)",
    )
    parser.add_argument(
        "--compare",
        metavar=("A", "B"),
        nargs=2,
        type=Path,
        help="two evaluated workdirs; prints paired tests of B against A and writes nothing",
    )
    given = parser.parse_args(arguments)
    if (given.workdir is None) == (given.compare is None):
        parser.error("give either --workdir=DIR or --compare A B")
    return given


if __name__ == "__main__":
    sys.exit(main())
