"""Searches hyper-parameters: trains trials, judges them on validation, stops the poor ones early.

    python -m jaxrec.tune --config=configs/quickstart.py --workdir=runs/tune --trials=20 \\
      --search.optimizer.learning_rate=1e-4..1e-2:log --search.model.encoder.dropout_rate=0.1..0.5 \\
      --search.model.encoder.num_layers=1..3 --search.optimizer.schedule=constant,cosine

A range is LOW..HIGH, or LOW..HIGH:log; its values are whole where both ends are. A comma separates choices.
`--config.FIELD=VALUE` holds for every trial. The same command goes on with a search that was stopped. docs/tuning.md
says what is written.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxrec.config import split_overrides
from jaxrec.core.log import failed, start_logging
from jaxrec.tuning.plots import write_plots
from jaxrec.tuning.space import PREFIX, parse_space
from jaxrec.tuning.study import BEST_FILE, ENDED, Search, best_trial, run_search


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry; returns the exit status."""
    search = parse_arguments(arguments)
    start_logging()
    try:
        study = run_search(search)
        metric = search.any_config().evaluation.metric
        plots = write_plots(study, search.workdir, metric)
    except (ValueError, OSError) as error:
        return failed(error)
    console = Console()
    trials = sorted(
        study.get_trials(deepcopy=False, states=ENDED),
        key=lambda trial: trial.value or float("-inf"),
        reverse=True,
    )
    table = Table("trial", f"validation {metric}", *map(escape, search.space), title_justify="left")
    for trial in trials[:10]:
        value = "stopped early" if trial.value is None else f"{trial.value:.4f}"
        table.add_row(
            str(trial.number), value, *(escape(f"{trial.params.get(field, '')}") for field in search.space)
        )
    console.print(table)
    if best_trial(study) is not None:
        console.print(f"best: {search.workdir / BEST_FILE}", soft_wrap=True, markup=False, highlight=False)
    if plots:
        console.print(f"plots: {', '.join(map(str, plots))}", soft_wrap=True, markup=False, highlight=False)
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> Search:
    """The command line."""
    given, rest = split_overrides(sys.argv[1:] if arguments is None else arguments, prefix=PREFIX)
    overrides, rest = split_overrides(rest)
    parser = argparse.ArgumentParser(
        prog="python -m jaxrec.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s --config=FILE[:VARIANT] --workdir=DIR --trials=N --search.FIELD=VALUES ...",
    )
    parser.add_argument(
        "--config", metavar="FILE[:VARIANT]", required=True, help="what the trials start from"
    )
    parser.add_argument("--workdir", metavar="DIR", type=Path, required=True, help="directory of the search")
    parser.add_argument(
        "--trials", type=int, default=20, help="to end with, earlier sittings counted (default: 20)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the proposals (default: 0)")
    parsed = parser.parse_args(rest)
    try:
        space = parse_space(given)
        if not space:
            example = f"--{PREFIX}.optimizer.learning_rate=1e-4..1e-2:log"
            raise ValueError(f"nothing is searched; name a field, such as {example}.")
        if parsed.trials < 1:
            raise ValueError(f"--trials={parsed.trials} must be at least 1.")
    except ValueError as error:
        parser.error(str(error))
    return Search(
        config=parsed.config,
        overrides=overrides,
        space=space,
        given=given,
        workdir=parsed.workdir,
        num_trials=parsed.trials,
        seed=parsed.seed,
    )


if __name__ == "__main__":
    sys.exit(main())
