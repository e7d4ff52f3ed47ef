"""What compression gave and cost: a table for the terminal, and a page with plots."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxrec.compression.study import ORIGINAL
from jaxrec.core.files import write_whole
from jaxrec.evaluation import report_elements as elements
from jaxrec.evaluation.plots import differences, labelled_points

KIB = 1024
COLUMNS = ("KiB", "bytes", "ms", "change", "interval", "less dense model")
NARROW = [0, 1, 2, 3, 4, 6]  # the cells that a terminal has room for: the page has the intervals


def print_study(console: Console, values: Mapping[str, Any]) -> None:
    """A row a system, largest first."""
    metric = values["headline_metric"]
    table = Table(
        title=escape(f"{values['dataset']}, {values['split']}: {metric}, bytes and latency"),
        title_justify="left",
    )
    table.add_column("")
    for place in NARROW:
        table.add_column((metric, *COLUMNS)[place], justify="right")
    for name, row in _by_bytes(values).items():
        cells = _cells(row, metric)
        table.add_row(
            escape(name), *(cells[place] for place in NARROW), style="bold" if name == ORIGINAL else ""
        )
    console.print(table)
    for name, reason in values["refused"].items():
        console.print(f"{name} cannot be applied: {reason}", style="yellow", markup=False)


def write_study_report(path: Path, values: Mapping[str, Any]) -> None:
    """The page, at once."""
    metric, systems = values["headline_metric"], _by_bytes(values)
    rows = [_table_row(name, _cells(row, metric)) for name, row in systems.items()]
    original = systems[ORIGINAL]
    against = {name: row["against_original"][metric] for name, row in systems.items() if name != ORIGINAL}
    notes = "".join(
        f'<p class="note">{elements.text(name)} cannot be applied: {elements.text(reason)}</p>'
        for name, reason in values["refused"].items()
    )
    sections = {
        "Table": elements.table(
            ["", metric, *COLUMNS],
            rows,
            "change: against the original, over the same users; the dense model: the largest run beside that weighs "
            "no more than the method",
        )
        + notes,
        "Plots": elements.panels(
            [
                _points(f"{metric} by KiB", systems, metric, lambda row: row["num_bytes"] / KIB, "KiB"),
                _points(
                    f"{metric} by latency",
                    systems,
                    metric,
                    lambda row: row["latency_ms"],
                    "milliseconds a user",
                ),
            ]
        ),
        "Differences": elements.panels(
            [
                differences(
                    f"{metric} against the original",
                    {name: one["difference"] for name, one in against.items()},
                    {name: one["interval"] for name, one in against.items()},
                )
            ]
        )
        if against
        else "",
        "Dense models of equal bytes": _commands(systems),
    }
    cards = "".join(
        [
            elements.card(metric, elements.metric(original["metrics"][metric]), "of the original"),
            elements.card("size", f"{original['num_bytes'] / KIB:,.0f} KiB", "of the original's arrays"),
            elements.card("latency", f"{original['latency_ms']:.2f} ms", "of the original, one user"),
        ]
    )
    page = elements.page(
        heading=f"Compression: {values['dataset']}",
        summary=f"{values['split']} targets ranked in the whole catalogue of {values['num_items']:,} items, "
        f"{values['confidence']:.0%} intervals, paired over users",
        cards=f'<div class="cards">{cards}</div>',
        sections=sections,
        footer=f"step {values['step']}; latency: the query of one user from its history and a score for every item, "
        "median, all systems in turns",
    )
    write_whole(path, page)


def _by_bytes(values: Mapping[str, Any]) -> dict[str, Any]:
    return dict(sorted(values["systems"].items(), key=lambda one: -one[1]["num_bytes"]))


def _cells(row: Mapping[str, Any], metric: str) -> list[str]:
    cells = [
        f"{row['metrics'][metric]:.4f}",
        f"{row['num_bytes'] / KIB:,.1f}",
        f"{row['share_of_bytes']:.1%}",
        f"{row['latency_ms']:.2f}",
    ]
    against = row.get("against_original", {}).get(metric)
    if against is None:
        return [*cells, "", "", ""]
    low, high = against["interval"]
    cells += [f"{against['relative']:+.1%}", f"{low:+.4f} .. {high:+.4f}"]
    rival = row.get("against_rival", {}).get(metric)
    if rival is None:
        return [*cells, ""]
    low, high = rival["interval"]
    verdict = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
    return [*cells, f"{rival['difference']:+.4f}, {verdict}"]


def _table_row(name: str, cells: Sequence[str]) -> str:
    kind = ' class="model"' if name == ORIGINAL else ""
    numbers = "".join(f"<td>{elements.text(cell)}</td>" for cell in cells)
    return f'<tr{kind}><th scope="row">{elements.text(name)}</th>{numbers}</tr>'


def _points(
    title: str, systems: Mapping[str, Any], metric: str, x: Callable[[Mapping[str, Any]], float], label: str
) -> str:
    points = {name: (x(row), row["metrics"][metric]) for name, row in systems.items()}
    return labelled_points(title, points, label, highlight=ORIGINAL)


def _commands(systems: Mapping[str, Any]) -> str:
    rows = [
        f'<tr><th scope="row">{elements.text(name)}</th>'
        f'<td class="words"><code>{elements.text(row["command"])}</code></td></tr>'
        for name, row in systems.items()
        if row.get("command")
    ]
    return elements.table(["method", "overrides"], rows, "", words=("overrides",)) if rows else ""
