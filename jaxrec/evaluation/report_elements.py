"""The parts that a report is made of: the page, escaped text, numbers, tables, cards, panels."""

import html
import importlib.resources
import string
from collections.abc import Collection, Mapping, Sequence
from typing import Any

MODEL = "model"


def page(*, heading: str, summary: str, cards: str, sections: Mapping[str, str], footer: str) -> str:
    """A page that needs nothing else. `cards` and the values of `sections`, by title, are HTML; none where empty."""
    present = {title: body for title, body in sections.items() if body}
    anchors = {title: title.lower().replace(" ", "-") for title in present}
    template = string.Template(
        importlib.resources.files("jaxrec.evaluation")
        .joinpath("report_template.html")
        .read_text(encoding="utf-8")
    )
    return template.substitute(
        title=text(heading),
        heading=text(heading),
        summary=text(summary),
        navigation="".join(f'<a href="#{anchor}">{text(title)}</a>' for title, anchor in anchors.items()),
        sections=cards
        + "".join(
            f'<section aria-labelledby="{anchors[title]}">'
            f'<h2 id="{anchors[title]}">{text(title)}</h2>{body}</section>\n'
            for title, body in present.items()
        ),
        footer=text(footer),
    )


def card(name: str, value: str, detail: str, *, raw: bool = False) -> str:
    """A number to be seen at once; `raw` = the value is HTML already."""
    shown = value if raw else text(value)
    return (
        f'<div class="card"><div class="name">{text(name)}</div><div class="value">{shown}</div>'
        f'<div class="detail">{text(detail)}</div></div>'
    )


def metric_row(
    label: str,
    values: Mapping[str, float | None],
    names: Sequence[str],
    intervals: Mapping[str, Sequence[float]],
) -> str:
    """A row of a table of metrics; the model's own row stands out."""
    cells = []
    for name in names:
        cell = metric(values.get(name))
        if name in intervals:
            low, high = intervals[name]
            cell += f'<span class="range">{low:.4f}–{high:.4f}</span>'
        cells.append(f"<td>{cell}</td>")
    kind = ' class="model"' if label == MODEL else ""
    return f'<tr{kind}><th scope="row">{text(label)}</th>{"".join(cells)}</tr>'


def table(head: Sequence[str], rows: Sequence[str], caption: str, *, words: Collection[str] = ()) -> str:
    """A table from finished rows; columns under `words` hold text, as their cells of class `words` do."""
    kind = dict.fromkeys(words, ' class="words"')
    cells = "".join(f'<th scope="col"{kind.get(name, "")}>{text(name)}</th>' for name in head)
    title = f"<caption>{text(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def panels(drawings: Sequence[str]) -> str:
    """Drawings beside each other, as many as the width allows."""
    return f'<div class="panels">{"".join(f"<figure class=panel>{drawing}</figure>" for drawing in drawings)}</div>'


def metric(value: float | None) -> str:
    """Four digits, fewer for large values; a dash where the metric is not defined."""
    if value is None or value != value:
        return "–"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4f}"


def number(value: Any) -> str:
    """Any value: numbers get separators and a sensible length."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4f}"


def text(value: Any) -> str:
    """Escaped: whatever it holds, it is shown and never run."""
    return html.escape(str(value))
