"""Goes on training from the feedback of the server: `python -m jaxrec.update --workdir=runs/mine --model=exports/mine`.

Reads what has come into the server's log since the last update, trains the model that answers on it for a few steps,
compares both on the newest events, which neither was trained on, and exports the new one into --model, where the server
finds it, unless it is worse. Killed at any moment, the same command goes on. docs/updating.md says the rest.

    python -m jaxrec.serve  --model=exports/mine --state=state.db
    python -m jaxrec.update --model=exports/mine --state=state.db --workdir=runs/mine --every-seconds=3600

Exit status: 0 = a new version answers, or there was too little that is new, or it was stopped by SIGTERM; 1 = the new
model was worse, or not shown not to be, and the old one stays; 2 = an error.
"""

import argparse
import contextlib
import dataclasses
import math
import sys
from pathlib import Path

from jaxrec.config import split_overrides
from jaxrec.core.log import failed, start_logging
from jaxrec.core.mesh import initialize_platform
from jaxrec.serving.stores import open_store
from jaxrec.train import train_run
from jaxrec.training.loop import NotFiniteError
from jaxrec.updating.options import UpdateOptions
from jaxrec.updating.timer import run_on_timer
from jaxrec.updating.update import StoppedError, update_once

EVERY = "--every-seconds"
HELP = {
    "after": "number of the log up to which the run's own data have its events",
    "least_events": "events that must have come in since the last look",
    "holdout": "share of the new events, the newest, that the models are compared on",
    "passes": "how often the new events are trained on",
    "replay_share": "share of the training rows that are histories as they were before",
    "tolerance": "share of the metric that the lower end of the paired interval may lie below 0",
    "least_users": "users with held-out events, below which the old model stays",
    "most_users": "users that the models are compared on, at most",
    "keep_versions": "of the versions that updates have exported, how many of the newest stay; 0 = all",
}


def main(arguments: list[str] | None = None) -> int:
    """The entry; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given, options = parse_arguments(arguments)
    start_logging()
    if given.every_seconds is not None:
        run_on_timer([sys.executable, "-m", "jaxrec.update", *without_timer(arguments)], given.every_seconds)
        return 0
    try:
        initialize_platform()
        with contextlib.closing(open_store(given.state, must_exist=True)) as store:
            outcome = update_once(options, store, train_run)
    except StoppedError as error:
        print(error, flush=True)
        return 0
    except (ValueError, OSError, NotImplementedError, NotFiniteError, ModuleNotFoundError) as error:
        return failed(error)
    print("nothing new" if outcome is None else outcome.text, flush=True)
    return 0 if outcome is None or outcome.promoted else 1


def without_timer(arguments: list[str]) -> list[str]:
    """The command line of one update."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument.partition("=")[0] != EVERY:
            kept.append(argument)
        skip = argument == EVERY
    return kept


def parse_arguments(arguments: list[str]) -> tuple[argparse.Namespace, UpdateOptions]:
    """The command line, and what it asks an update to do."""
    overrides, rest = split_overrides(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m jaxrec.update",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="--config.FIELD=VALUE changes the training, such as --config.optimizer.learning_rate=1e-4.",
    )
    add = parser.add_argument
    add("--workdir", metavar="DIR", type=Path, required=True, help="the run that the server began with")
    add("--model", metavar="DIR", type=Path, required=True, help="the server's directory of versions")
    add(
        "--state",
        metavar="WHERE",
        default="jaxrec_state.db",
        help="the server's: SQLite file, or redis://...",
    )
    add(EVERY, metavar="S", type=float, help="update again and again, until SIGTERM; default: once")
    fields = {field.name: field.default for field in dataclasses.fields(UpdateOptions)}
    for name, text in HELP.items():
        value = fields[name]
        add(
            f"--{name.replace('_', '-')}", metavar="X", type=type(value), default=value,
            help=f"{text} (default {value})",
        )  # fmt: skip
    given = parser.parse_args(rest)
    try:
        if given.every_seconds is not None and not 0 < given.every_seconds < math.inf:
            raise ValueError(f"{EVERY}={given.every_seconds} must be above 0; leave it out to update once.")
        named = {name: getattr(given, name) for name in ("workdir", "model", *HELP)}
        return given, UpdateOptions(**named, overrides=overrides)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
