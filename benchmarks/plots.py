"""The plots that benchmarks write beside their figures, as SVG that is the same for the same figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Points = Iterable[tuple[float, float]]


def draw_lines(
    path: Path,
    title: str,
    lines: Mapping[str, Points],
    *,
    level: tuple[str, float] | None = None,
    **labels: Any,
) -> None:
    """A line with markers a name; points that share an x are averaged.

    Args:
      level: the name and height of a dashed line across.
      **labels: for `Axes.set`: xlabel, ylabel, xscale and so on.
    """
    figure, axes = _new(title)
    for name, points in lines.items():
        heights: dict[float, list[float]] = {}
        for x, y in points:
            heights.setdefault(x, []).append(y)
        means = sorted((x, sum(ys) / len(ys)) for x, ys in heights.items())
        axes.plot(*zip(*means, strict=True), marker="o", label=name)
    if level:
        axes.axhline(level[1], color="0.4", linestyle="--", label=level[0])
    axes.set(**labels)  # last: limits that are set before anything is drawn do not grow with it
    axes.legend(frameon=False)
    _save(figure, path)


def draw_fit(path: Path, title: str, *, points: Points, curve: Points, **labels: Any) -> None:
    """Measured points and the curve that was fitted to them."""
    figure, axes = _new(title)
    axes.plot(*zip(*curve, strict=True), color="0.4", linestyle="--", label="fitted")
    axes.plot(*zip(*points, strict=True), marker="o", linestyle="", label="measured")
    axes.set(**labels)
    axes.legend(frameon=False)
    _save(figure, path)


def draw_bars(path: Path, title: str, bars: Mapping[str, float], **labels: Any) -> None:
    """A horizontal bar a name, the first on top, with its value."""
    figure, axes = _new(title)
    drawn = axes.barh(list(bars), list(bars.values()))
    axes.bar_label(drawn, fmt="%.3g", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(**labels)
    _save(figure, path)


def _new(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    figure.suptitle(title, fontsize=10)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
