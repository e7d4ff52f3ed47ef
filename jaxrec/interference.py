"""Says whether the tasks of a trained run pull its model the same way:

    python -m jaxrec.interference --workdir=runs/quickstart

Takes each task's gradient on training batches, by part of the model, prints the cosines between them and writes
`interference.json` and `interference.svg` into the workdir. docs/multitask.md says how to read them.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxrec.config import run_directory, validate
from jaxrec.core.log import failed, start_logging
from jaxrec.core.mesh import initialize_platform
from jaxrec.data.pipeline import train_batches
from jaxrec.evaluation.arguments import positive
from jaxrec.evaluation.interference import heat_map, measure, print_interference, summary
from jaxrec.runs import load_state

JSON_FILE, PLOT_FILE = "interference.json", "interference.svg"


def main(arguments: list[str] | None = None) -> int:
    """The entry; returns the exit status."""
    given = parse_arguments(arguments)
    start_logging()
    try:
        initialize_platform()
        given.workdir = run_directory(given.workdir)
        values = interference_of(given)
    except (ValueError, OSError) as error:
        return failed(error)
    if jax.process_index() == 0:
        (given.workdir / JSON_FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        (given.workdir / PLOT_FILE).write_text(heat_map(values), encoding="utf-8")
        console = Console()
        print_interference(console, values)
        console.print(f"heat map: {given.workdir / PLOT_FILE}", soft_wrap=True, markup=False, highlight=False)
    return 0


def interference_of(given: argparse.Namespace) -> dict[str, Any]:
    """Opens the run and measures it on the batches that its training would go on with."""
    config, dataset, setup, state = load_state(given.workdir)
    validate(dataclasses.replace(config, mesh_shape=(-1, 1)), setup.mesh.size)
    step = int(jax.device_get(state.step))
    batches = train_batches(
        dataset,
        global_batch_size=config.global_batch_size,
        history_length=config.data.history_length,
        user_share=config.data.train_users,
        train_since=config.data.train_since,
        replay_share=config.data.replay_share,
        domain_temperature=config.data.domain_temperature,
        windows=config.data.windows,
        seed=config.seed,
        start_step=step,
        stop_step=step + given.batches,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    with jax.set_mesh(setup.mesh):
        products = measure(setup, state, batches)
    return {"step": step, "num_batches": given.batches} | summary(products, list(config.tasks))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxrec.interference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", metavar="DIR", type=Path, required=True, help="the trained run")
    parser.add_argument(
        "--batches", metavar="N", type=positive, default=32, help="training batches, at least 2 (default 32)"
    )
    given = parser.parse_args(arguments)
    if given.batches < 2:
        parser.error("--batches=1: an interval takes at least 2 batches")
    return given


if __name__ == "__main__":
    sys.exit(main())
