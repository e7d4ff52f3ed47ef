"""Plans a run on machines that need not be there: `python -m jaxrec.plan --config=FILE --topology=v5p:8x8x16`.

    python -m jaxrec.plan --config=configs/web_scale.py --topology=v5p:4x4x4 --rows-per-chip=32
    python -m jaxrec.plan --config=configs/web_scale.py --topology=h100:1x32x8 --config.mesh_shape="(256, 1)"
    python -m jaxrec.plan --config=configs/web_scale.py --rows-per-chip=32 --scaling v5p:4x4x4 v5p:4x8x8 v5p:8x8x16

It compiles the real train step ahead of time and prints and writes (`plan.json`, `plan.html`): bytes a chip by kind,
operations and bytes of a step, the time that the chip's published peaks allow, and the largest batch and tables that
fit. No accelerator is needed, only a compiler: `make install EXTRAS=plan-tpu` (or `plan-cuda`); `cpu:8` needs neither.

A topology is [SLICES*]CHIP:SHAPE: v5p:8x8x16, 2*v6e:16x16, tpu7x:4x4x4; for GPUs slices x hosts x GPUs of a host:
h100:1x32x8; for a CPU its virtual devices: cpu:8. A plan that does not fit is an answer, with the largest that does.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxrec.config import TrainConfig, apply_overrides, describe_fields, load_config, split_overrides
from jaxrec.core.files import write_whole
from jaxrec.core.log import failed, start_logging
from jaxrec.planning.console import print_plan, print_scaling
from jaxrec.planning.document import make_plan, sources
from jaxrec.planning.program import make_case, plan_facts
from jaxrec.planning.report import write_report
from jaxrec.planning.topology import Topology, parse_topology

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """What the command line says."""

    config: TrainConfig
    topologies: list[Topology]
    scaling: list[Topology]
    rows_per_chip: int | None
    facts: str
    search: bool
    out: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry; returns the exit status (2 = bad input, said on stderr). A plan that does not fit is no failure."""
    start_logging()
    given = parse_arguments(arguments)
    try:
        plan_run(given, Console())
    except (ValueError, OSError) as error:
        return failed(error)
    return 0


def plan_run(given: PlanArguments, console: Console) -> dict[str, Any]:
    """Plans every topology, prints and writes the answers, and returns them."""
    use_cpu([*given.topologies, *given.scaling])
    facts = plan_facts(given.config, given.facts)
    # Every case is checked before the first is compiled: that takes minutes.
    cases = [make_case(given.config, one, facts, given.rows_per_chip) for one in given.topologies]
    scaled = [make_case(given.config, one, facts, given.rows_per_chip) for one in given.scaling]

    started = time.perf_counter()
    tell = lambda text: logger.info("%6.0f s  %s", time.perf_counter() - started, text)  # noqa: E731
    plans, scaling = [], []
    for case in cases:
        plans.append(make_plan(case, search=given.search, tell=tell))
        print_plan(console, plans[-1])
    for case in scaled:
        known = [plan for plan in plans if plan["topology"] == case.topology.text]
        scaling.append(known[0] if known else make_plan(case, search=False, tell=tell))
    print_scaling(console, scaling)

    command = "python -m jaxrec.plan " + " ".join(sys.argv[1:])
    values = {
        "command": command,
        "plans": plans,
        "scaling": scaling,
        "chips": sources([*plans, *scaling]),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    write_whole(given.out / "plan.json", json.dumps(values, indent=2) + "\n")
    write_report(given.out / "plan.html", values)
    console.print(
        f"written: {given.out / 'plan.json'}, {given.out / 'plan.html'}", markup=False, highlight=False
    )
    return values


def use_cpu(topologies: Sequence[Topology]) -> None:
    """Makes this process one of CPU devices: a planner must not take an accelerator that is there.

    Raises:
      ValueError: two CPU topologies of different sizes, which one process cannot be.
    """
    sizes = sorted({one.num_devices for one in topologies if one.family == "cpu"})
    if len(sizes) > 1:
        raise ValueError(f"cpu:{sizes[0]} and cpu:{sizes[-1]} in one command: plan them one by one.")
    with contextlib.suppress(
        RuntimeError
    ):  # JAX runs already; the topology says what is wrong, if anything is
        jax.config.update("jax_platforms", "cpu")
        if sizes:
            jax.config.update("jax_num_cpu_devices", sizes[0])


def parse_arguments(arguments: Sequence[str] | None) -> PlanArguments:
    """Reads the command line; what is wrong ends the program."""
    overrides, rest = split_overrides(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m jaxrec.plan",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        usage="%(prog)s --config=FILE[:VARIANT] --topology=CHIP:SHAPE [--config.FIELD=VALUE ...]",
    )
    parser.add_argument("--config", metavar="FILE[:VARIANT]", help="config file, and the function in it")
    parser.add_argument(
        "--topology",
        metavar="CHIP:SHAPE",
        action="append",
        default=[],
        help="a machine; may come several times",
    )
    parser.add_argument(
        "--scaling", metavar="CHIP:SHAPE", nargs="+", default=[],
        help="machines of a scaling table, compiled without a search",
    )  # fmt: skip
    parser.add_argument(
        "--rows-per-chip", metavar="N", type=int,
        help="sets global_batch_size to N x chips; without it the config's stands",
    )  # fmt: skip
    parser.add_argument(
        "--facts", metavar="PATH", default="",
        help="a prepared dataset, or a JSON file with num_items and num_users, where the config's data are elsewhere",
    )  # fmt: skip
    parser.add_argument(
        "--search", action=argparse.BooleanOptionalAction, default=True,
        help="look for the largest batch and tables that fit (a few compilations more)",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("runs/plan"), help="default: runs/plan"
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this, and the fields of the config")
    parsed, unknown = parser.parse_known_args(rest)
    try:
        config = apply_overrides(load_config(parsed.config), overrides) if parsed.config else None
        if parsed.help:
            if config:
                parser.epilog = "fields of the config:\n" + describe_fields(config)
            parser.print_help()
            parser.exit()
        if unknown:
            raise ValueError(
                f"unknown argument {unknown[0]!r}; a field of the config is written --config.FIELD=VALUE."
            )
        if config is None:
            raise ValueError("--config=FILE is missing, such as --config=configs/web_scale.py.")
        if not parsed.topology and not parsed.scaling:
            raise ValueError("--topology=CHIP:SHAPE is missing, such as --topology=v5p:4x4x4.")
        topologies = [parse_topology(text) for text in parsed.topology]
        scaling = [parse_topology(text) for text in parsed.scaling]
    except ValueError as error:
        parser.error(str(error))
    return PlanArguments(
        config=config,
        topologies=topologies,
        scaling=scaling,
        rows_per_chip=parsed.rows_per_chip,
        facts=parsed.facts,
        search=parsed.search,
        out=parsed.out,
    )


if __name__ == "__main__":
    sys.exit(main())
