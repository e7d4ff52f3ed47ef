"""`configs/web_scale.py` planned for six machines that are not here: does it fit, how does it scale, what does it send?

Each machine is compiled in a process of its own (gigabytes each), at 32 rows a chip; answers are kept under
`runs/plan_scaling/`, so that a run that was stopped goes on. Needs `make install EXTRAS=plan-tpu`, and the CUDA plugin
(`plan-cuda`) for the GPUs. Docs: docs/planning.md.

    python benchmarks/plan_scaling.py                     # every machine, with the largest batch of each: about an hour
    python benchmarks/plan_scaling.py --only v5p:4x4x4
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import plots
import record

CONFIG, ROWS = "configs/web_scale.py", 32
MACHINES = ("v5p:4x4x4", "v5p:4x8x8", "v5p:8x8x16", "v6e:16x16", "tpu7x:4x4x4", "h100:1x32x8")
FLOAT32 = "--config.model.encoder.gather_dtype=float32"  # dense gradients as they would travel by default
TOO_LARGE = "v5e:4x4"  # 256 GB for 1.04 TB of tables
KEPT = record.ROOT / "runs" / "plan_scaling"


def plan(machine: str, *options: str, name: str = "") -> dict[str, Any]:
    """The plan of a machine: from an earlier run, or made now.

    Raises:
      RuntimeError: the planner failed, which it should not for a plan that merely does not fit.
    """
    out = KEPT / (name or machine.replace(":", "-"))
    kept = out / "plan.json"
    if not kept.exists():
        command = [
            sys.executable, "-m", "jaxrec.plan", f"--config={CONFIG}", f"--topology={machine}",
            f"--rows-per-chip={ROWS}", f"--out={out}", *options,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=record.ROOT, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}")
    found: dict[str, Any] = json.loads(kept.read_text())["plans"][0]
    return found


def bars_of(plans: dict[str, dict[str, Any]], saving: float, refused: dict[str, Any]) -> list[record.Bar]:
    """What must hold."""
    bars = [
        record.Bar(name=f"{machine} fits", value=float(p["fits"]), limit=1) for machine, p in plans.items()
    ]
    bars += [
        record.Bar(
            name=f"{machine}: share of HBM of the largest batch",
            value=p["largest"]["batch"]["share"], limit=0.85,
        )
        for machine, p in plans.items()
    ]  # fmt: skip
    bars += [
        record.Bar(
            name=f"{machine}: operations against the formula, relative difference",
            value=abs(p["work"]["compiled_over_formula"] - 1), limit=0.03, at_most=True,
        )
        for machine, p in plans.items()
    ]  # fmt: skip
    small, large = plans["v5p:4x4x4"]["work"], plans["v5p:8x8x16"]["work"]
    bars += [
        record.Bar(
            name="exchange bytes of a chip, 1,024 over 64 chips",
            value=large["exchange_bytes"] / small["exchange_bytes"], limit=1.5, at_most=True,
        ),
        record.Bar(name="dense bytes, float32 over bfloat16 gradients", value=saving, limit=1.8),
        record.Bar(
            name=f"{TOO_LARGE} is refused, and its largest tables compile",
            value=float(not refused["fits"] and "tables" in refused["largest"]), limit=1,
        ),
    ]  # fmt: skip
    return bars


def draw(path: Path, plans: dict[str, dict[str, Any]], whole: dict[str, Any]) -> None:
    """What a chip sends in a step, over the chips of a v5p."""
    kinds = {
        "exchange of ids, rows and gradients": "exchange_bytes",
        "dense gradients, bfloat16": "dense_bytes",
    }
    lines = {
        label: [
            (p["work"]["num_devices"], p["work"][kind] / 1e6)
            for machine, p in plans.items()
            if machine.startswith("v5p")
        ]
        for label, kind in kinds.items()
    }
    plots.draw_lines(
        path,
        f"{CONFIG}, {ROWS} rows of 256 events a chip, compiled for v5p",
        lines,
        level=("dense gradients, float32, 64 chips", whole["work"]["dense_bytes"] / 1e6),
        xlabel="chips",
        ylabel="MB that a chip sends in a step",
        xscale="log",
        ylim=(0, 1.35 * whole["work"]["dense_bytes"] / 1e6),  # room for the legend
    )


def main() -> int:
    """Plans every machine and checks the bars."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="MACHINE", choices=MACHINES, help="plan one machine, check nothing")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    arguments = parser.parse_args()
    if arguments.only:
        plan(arguments.only)
        return 0
    plans = {machine: plan(machine) for machine in MACHINES}
    whole = plan("v5p:4x4x4", "--no-search", FLOAT32, name="v5p-4x4x4-float32")
    refused = plan(TOO_LARGE)
    saving = whole["work"]["dense_bytes"] / plans["v5p:4x4x4"]["work"]["dense_bytes"]
    draw(arguments.results / "plan_scaling.svg", plans, whole)
    figures = {"rows_per_chip": ROWS, "plans": plans, "float32_gradients": whole, "too_large": refused}
    return record.finish("plan_scaling", figures, bars_of(plans, saving, refused), results=arguments.results)


if __name__ == "__main__":
    sys.exit(main())
