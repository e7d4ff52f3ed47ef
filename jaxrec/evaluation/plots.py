"""Plots of the report, as inline SVG that follows the page's colours, light or dark.

Matplotlib draws with stand-in colours; they are replaced by the page's CSS variables, so that one drawing reads
well on both grounds. Text stays text (it can be searched, copied and read aloud), and the same numbers give the
same bytes.
"""

import io
import itertools
import re
import warnings
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import matplotlib as mpl
import matplotlib.ticker
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# Each stand-in is replaced by a variable of report_template.html.
INK, FAINT, GRID = "#010101", "#020202", "#030303"
SERIES = ("#040401", "#040402", "#040403", "#040404", "#040405", "#040406")
COLUMNS = 3  # of panels beside each other
_VARIABLES = {INK: "--ink", FAINT: "--faint", GRID: "--line"} | {
    color: f"--series-{i + 1}" for i, color in enumerate(SERIES)
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may hold dollar signs
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "axes.titlecolor": INK,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
}

# Lines need contrast with the ground; the grey of the second series suits bars only.
LINES = (SERIES[0], SERIES[2], SERIES[4], SERIES[5], SERIES[3], SERIES[1])

Interval = Sequence[float]


def bars_with_intervals(
    title: str, values: Mapping[str, float], intervals: Mapping[str, Interval], highlight: str
) -> str:
    """Horizontal bars, best first; the one called `highlight` stands out."""
    names = sorted(values, key=lambda name: (values[name], name))
    with mpl.rc_context(_STYLE | {"svg.hashsalt": title}):
        figure = Figure(figsize=(5.2, 0.7 + 0.36 * len(names)))
        axes = figure.add_subplot()
        colors = [SERIES[0] if name == highlight else SERIES[1] for name in names]
        axes.barh(names, [values[name] for name in names], color=colors, height=0.62)
        reach = max(values.values(), default=0.0)
        for row, name in enumerate(names):
            end = values[name]
            if name in intervals:
                low, high = intervals[name]
                axes.plot([low, high], [row, row], color=INK, linewidth=1.3, solid_capstyle="butt")
                end = high
            axes.annotate(
                f"{values[name]:.4f}",
                (end, row),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=10,
            )
            reach = max(reach, end)
        axes.set_xlim(0, (reach or 1.0) * 1.2)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_title(title)
        return _svg(
            figure, f"{title}: " + ", ".join(f"{name} {values[name]:.4f}" for name in reversed(names))
        )


def lines(
    title: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    *,
    from_zero: bool = False,
    whole_x: bool = True,
) -> str:
    """One line per series of (x, y); points alone where a series has few. `whole_x`: x is marked at integers alone."""
    with mpl.rc_context(_STYLE | {"svg.hashsalt": title}):
        figure = Figure(figsize=(5.2, 3.0))
        axes = figure.add_subplot()
        for index, (name, (x, y)) in enumerate(series.items()):
            marker = "o" if len(x) <= 40 else ""
            axes.plot(x, y, color=LINES[index % len(LINES)], label=name, marker=marker, markersize=3.5)
        if len(series) > 1:
            figure.legend(fontsize=9.5, loc="outside lower left", ncols=3)
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(nbins=6, integer=whole_x))
        axes.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axes.set_xlabel(x_label)
        axes.set_title(title)
        ends = ", ".join(
            f"{name} from {y[0]:.4g} to {y[-1]:.4g}" for name, (_, y) in series.items() if len(y)
        )
        return _svg(figure, f"{title}, by {x_label}: {ends}")


def labelled_points(
    title: str, points: Mapping[str, tuple[float, float]], x_label: str, *, highlight: str
) -> str:
    """A point (x, y) a name, x by its logarithm; the one called `highlight` stands out."""
    with mpl.rc_context(_STYLE | {"svg.hashsalt": title}):
        figure = Figure(figsize=(5.2, 3.6))
        axes = figure.add_subplot()
        ordered = sorted(points.items(), key=lambda one: one[1])
        for place, (name, (x, y)) in enumerate(ordered):
            axes.plot([x], [y], color=SERIES[0] if name == highlight else SERIES[2], marker="o", markersize=5)
            # Neighbours take turns above and below.
            below = place % 2
            axes.annotate(
                name,
                (x, y),
                xytext=(0, -6 if below else 6),
                textcoords="offset points",
                ha="center",
                va="top" if below else "bottom",
                fontsize=8.5,
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
        axes.margins(0.15)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:,.6g}"))
            axis.set_minor_formatter(mpl.ticker.NullFormatter())
        axes.set_xlabel(x_label)
        axes.set_title(title)
        text = ", ".join(f"{name} {y:.4f} at {x:,.4g}" for name, (x, y) in ordered)
        return _svg(figure, f"{title}, by {x_label}: {text}")


def grouped_bars(title: str, groups: Sequence[str], series: Mapping[str, Sequence[float]]) -> str:
    """Bars beside each other in each group; NaN leaves a gap."""
    with mpl.rc_context(_STYLE | {"svg.hashsalt": title}):
        figure = Figure(figsize=(5.2, 3.0))
        axes = figure.add_subplot()
        width = 0.8 / max(len(series), 1)
        for index, (name, values) in enumerate(series.items()):
            places = np.arange(len(groups)) + (index - (len(series) - 1) / 2) * width
            axes.bar(places, values, width * 0.92, color=SERIES[index % len(SERIES)], label=name)
        axes.set_xticks(range(len(groups)), [group.replace(" (", "\n(") for group in groups], fontsize=8.5)
        axes.grid(visible=False, axis="x")
        if len(series) > 1:
            figure.legend(fontsize=9.5, loc="outside lower left", ncols=3)
        axes.set_title(title)
        text = "; ".join(
            f"{group}: " + ", ".join(f"{name} {values[i]:.4f}" for name, values in series.items())
            for i, group in enumerate(groups)
        )
        return _svg(figure, f"{title}. {text}")


def calibration(title: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """Predicted probability against the observed share; the diagonal is perfect."""
    with mpl.rc_context(_STYLE | {"svg.hashsalt": title}):
        figure = Figure(figsize=(4.4, 4.2))
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1.0, linestyle=(0, (4, 3)), label="perfect")
        for index, (name, (predicted, observed)) in enumerate(series.items()):
            axes.plot(
                predicted, observed, color=SERIES[index % len(SERIES)], marker="o", markersize=4, label=name
            )
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_aspect("equal")
        axes.set_xlabel("predicted probability")
        axes.set_ylabel("observed share")
        axes.legend(fontsize=9.5, loc="upper left")
        axes.set_title(title)
        text = "; ".join(
            f"{name}: "
            + ", ".join(f"{p:.2f} predicted, {o:.2f} observed" for p, o in zip(*points, strict=True))
            for name, points in series.items()
        )
        return _svg(figure, f"{title}. {text}")


def differences(title: str, values: Mapping[str, float], intervals: Mapping[str, Interval]) -> str:
    """Paired differences with their intervals against the zero line; above zero the model is better."""
    names = list(values)[::-1]
    with mpl.rc_context(_STYLE | {"svg.hashsalt": title}):
        figure = Figure(figsize=(5.2, 0.8 + 0.36 * len(names)))
        axes = figure.add_subplot()
        axes.axvline(0.0, color=FAINT, linewidth=1.0)
        for row, name in enumerate(names):
            low, high = intervals[name]
            color = SERIES[0] if low > 0 else SERIES[3] if high < 0 else SERIES[1]
            axes.plot([low, high], [row, row], color=color, linewidth=2.4, solid_capstyle="round")
            axes.plot([values[name]], [row], color=color, marker="o", markersize=6)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_title(title)
        return _svg(figure, f"{title}: " + ", ".join(f"{name} {values[name]:+.4f}" for name in values))


def heat_maps(title: str, names: Sequence[str], panels: Mapping[str, Float[np.ndarray, "n n"]]) -> str:
    """A matrix of values from -1 to 1 in each panel; NaN leaves a gap, and so does the diagonal."""
    rows, size = -(-len(panels) // COLUMNS), 0.62 * len(names) + 1.2
    with mpl.rc_context(_STYLE | {"svg.hashsalt": title}):
        figure = Figure(figsize=(size * min(COLUMNS, len(panels)), size * rows + 0.4))
        grid = figure.subplots(rows, min(COLUMNS, len(panels)), squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for axes, (panel, values) in zip(grid.flat, panels.items(), strict=False):
            for (row, column), value in np.ndenumerate(values):
                if row == column or np.isnan(value):
                    continue
                color = SERIES[0] if value >= 0 else SERIES[3]
                axes.add_patch(
                    Rectangle((column - 0.5, row - 0.5), 1, 1, color=color, alpha=0.7 * abs(value), lw=0)
                )
                axes.text(column, row, f"{value:+.2f}", ha="center", va="center", fontsize=9.5)
            axes.set_xlim(-0.5, len(names) - 0.5)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
            axes.set_yticks(range(len(names)), names)
            axes.set_aspect("equal")
            axes.grid(visible=False)
            axes.set_title(panel)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        text = "; ".join(
            f"{panel}: "
            + ", ".join(
                f"{names[i]} and {names[j]} {values[i, j]:+.2f}"
                for i, j in itertools.combinations(range(len(names)), 2)
                if not np.isnan(values[i, j])
            )
            for panel, values in panels.items()
        )
        return _svg(figure, f"{title}. {text}")


def as_file(svg: str) -> str:
    """A drawing that stands alone: it brings the page's colours along."""
    page = resources.files("jaxrec.evaluation").joinpath("report_template.html").read_text(encoding="utf-8")
    colors = page[page.index(":root {") : page.index("* {")]
    own = "svg { background: var(--ground); font-family: system-ui, sans-serif; }"
    return svg.replace(">", f"><style>{colors}{own}</style>", 1)


def _svg(figure: Figure, description: str) -> str:
    """The figure as an SVG element for a page, with a description for those who cannot see it."""
    for axes in figure.axes:
        _drop_offset_text(axes)
    stream = io.StringIO()
    with warnings.catch_warnings():
        # The browser's fonts draw the text; that ours lack a script matters not.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    # The page's own font and size: one SVG fits a telephone and a wide screen.
    text = re.sub(r" font-family: [^;\"]*;", "", text)
    text = re.sub(r'(<svg [^>]*?)width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would style the whole page
    # An id may stand once in a page; those that nothing refers to are dropped.
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([\w.-]+)"', lambda found: found[0] if found[1] in used else "", text)
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    # Text in a drawing stays near the size of the page's.
    width = round(115 * figure.get_size_inches()[0])
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" style="max-width: {width}px" ', 1)


def _drop_offset_text(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        formatter = axis.get_major_formatter()
        if hasattr(formatter, "set_useOffset"):
            formatter.set_useOffset(False)
