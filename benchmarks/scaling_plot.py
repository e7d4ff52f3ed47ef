"""The plot of `table_scaling.py`: milliseconds a step against rows, both on logarithmic axes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

LABELS = {
    "row_adagrad": "row-wise Adagrad, sparse",
    "lazy_adam": "lazy Adam, sparse",
    "dense_adam": "optax.adam, dense",
}


def write_svg(path: Path, sides: Sequence[Mapping[str, Any]]) -> None:
    """Draws the `milliseconds` of sides over their `rows`, a line a `mode`; repeated ones are averaged."""
    times: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for side in sides:
        times[side["mode"]][side["rows"]].append(side["milliseconds"])
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for mode, found in times.items():
        rows = sorted(found)
        axes.plot(rows, [sum(found[r]) / len(found[r]) for r in rows], marker="o", label=LABELS[mode])
    axes.set(xscale="log", yscale="log", xlabel="rows of the table", ylabel="milliseconds a step")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title("100,000 unique ids a step, 64 floats a row, one CPU device", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
