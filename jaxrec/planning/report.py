"""The plan as one HTML page that needs nothing else. It is drawn from what `plan.json` holds and computes nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrec.core.files import write_whole
from jaxrec.evaluation import plots
from jaxrec.evaluation import report_elements as elements
from jaxrec.planning.console import (
    GIB,
    SCALING_HEAD,
    headline,
    largest_text,
    millions,
    overlap_text,
    scaling_row,
)

Plan = Mapping[str, Any]


def write_report(path: Path, values: Mapping[str, Any]) -> None:
    """Writes the page at once, so that a reader never meets half of it."""
    write_whole(path, render_report(values))


def render_report(values: Mapping[str, Any]) -> str:
    """The page of what `plan.json` holds."""
    plans, scaling = values["plans"], values["scaling"]
    first = (plans or scaling)[0]
    sections = {plan["topology"]: _plan(plan) for plan in plans}
    sections["Scaling"] = _scaling(scaling)
    sections["Peaks and where they are published"] = _chips(values["chips"])
    return elements.page(
        heading=f"{first['config']}: a plan",
        summary=(
            f"{first['num_items']:,} items, {first['num_users']:,} users, histories of {first['history_length']}. "
            "The train step was compiled for each machine; times are the least that published peaks allow."
        ),
        cards=_cards(first),
        sections=sections,
        footer=f"Written by jaxrec. {values['command']}",
    )


def _cards(plan: Plan) -> str:
    cards = [elements.card("Fits", "yes" if plan["fits"] else "no", plan["topology"])]
    if "memory" in plan:
        memory = plan["memory"]
        share = f"{memory['share']:.0%} of the chip" if memory["share"] else "of this machine"
        cards.append(elements.card("Memory a chip", f"{memory['total_bytes'] / GIB:,.1f} GiB", share))
    if plan.get("bound"):
        bound = plan["bound"]
        least = f"{bound['step_seconds'] * 1e3:,.1f} ms"
        cards.append(elements.card("Least time of a step", least, f"bound by {bound['resource']}"))
        cards.append(
            elements.card("Events a second", f"{millions(bound['events_per_second'])} M", "at the bound")
        )
        cards.append(elements.card("MFU", f"{bound['mfu']:.1%}", "at the bound"))
    return f'<div class="cards">{"".join(cards)}</div>\n'


def _plan(plan: Plan) -> str:
    parts = [f'<p class="note">{elements.text(headline(plan))}</p>']
    if not plan["fits"]:
        needed, capacity = plan["needed_bytes"] / GIB, plan["capacity_bytes"] / GIB
        parts.append(
            f'<p><span class="bad">Does not fit:</span> needs {needed:,.1f} of {capacity:,.1f} GiB a chip. '
            f"{elements.text(plan['remedy'])}</p>"
        )
    for name, found in plan.get("largest", {}).items():
        parts.append(f"<p>Largest {elements.text(name)}: {elements.text(largest_text(name, found))}.</p>")
    if "memory" in plan:
        parts.append(elements.panels(_drawings(plan)))
        parts.append(_temporaries(plan["memory"]["largest_temporaries"]))
        parts.append(_collectives(plan["work"]))
    if plan.get("overlap"):
        parts.append(f"<p>Hidden in the schedule: {elements.text(overlap_text(plan['overlap']))}.</p>")
    return "".join(parts)


def _drawings(plan: Plan) -> list[str]:
    kinds = {name: size / GIB for name, size in plan["memory"]["bytes_by_kind"].items()}
    largest = max(kinds, key=lambda name: kinds[name])
    drawings = [plots.bars_with_intervals("Memory of a chip (GiB)", kinds, {}, largest)]
    if plan.get("bound"):
        times = {name: value * 1e3 for name, value in plan["bound"]["seconds"].items()}
        drawings.append(
            plots.bars_with_intervals("Least time of a step (ms)", times, {}, plan["bound"]["resource"])
        )
    work = plan["work"]
    sent = {
        "exchange": work["exchange_bytes"] / 1e6,
        "exchange, rows alone": work["exchange_bytes_of_rows"] / 1e6,
        "dense": work["dense_bytes"] / 1e6,
    }
    drawings.append(plots.bars_with_intervals("Sent by a device in a step (MB)", sent, {}, "exchange"))
    opcodes = dict(list(work["hbm_bytes_by_opcode"].items())[:6])
    moved = {name: size / 1e9 for name, size in opcodes.items() if size > 0}
    if moved:
        drawings.append(plots.bars_with_intervals("HBM bytes of a device by kernel (GB)", moved, {}, ""))
    return drawings


def _temporaries(buffers: Sequence[Plan]) -> str:
    rows = [
        f'<tr><th scope="row">{elements.text(buffer["shape"][:60])}</th><td>{buffer["num_bytes"] / GIB:,.4f}</td>'
        f'<td class="words">{elements.text(_tail(buffer["source"], 72))}</td></tr>'
        for buffer in buffers
    ]
    head = ["array", "GiB a device", "made by"]
    table = elements.table(head, rows, "Largest temporaries at the peak", words=("made by",))
    return f'<div class="gap"></div><div class="panel scroll">{table}</div>' if rows else ""


def _tail(source: str, width: int) -> str:
    """The end of a path, which tells most, marked where it is cut."""
    return source if len(source) <= width else "…" + source[1 - width :]


def _collectives(work: Plan) -> str:
    rows = [
        f'<tr><th scope="row">{elements.text(one["part"])}</th><td class="words">{elements.text(one["kind"])}</td>'
        f'<td class="words">{elements.text(one["axis"])}</td><td>{one["count"]:,}</td>'
        f"<td>{one['bytes'] / 1e6:,.3f}</td></tr>"
        for one in work["collectives"]
    ]
    head = ["part", "collective", "mesh axes", "times", "MB sent by a device"]
    table = elements.table(head, rows, "Collectives of a step", words=("collective", "mesh axes"))
    return f'<div class="gap"></div><div class="panel scroll">{table}</div>'


def _scaling(plans: Sequence[Plan]) -> str:
    if not plans:
        return ""
    rows = [
        "<tr>"
        + "".join(
            f'<th scope="row">{elements.text(cell)}</th>' if i == 0 else f"<td>{elements.text(cell)}</td>"
            for i, cell in enumerate(scaling_row(plan))
        )
        + "</tr>"
        for plan in plans
    ]
    table = elements.table(SCALING_HEAD, rows, "Bytes are those that a device sends in a step")
    fitting = [plan for plan in plans if plan["fits"]]
    drawings = []
    if len(fitting) > 1:
        sent = {
            f"{part}, {chip}": (counts, [plan["work"][f"{part}_bytes"] / 1e6 for plan in group])
            for chip, group, counts in _by_chip(fitting)
            for part in ("exchange", "dense")
        }
        drawings.append(plots.lines("Sent by a device in a step (MB)", sent, "chips", from_zero=True))
        speed = {
            chip: (counts, [plan["bound"]["events_per_second"] / 1e6 for plan in group])
            for chip, group, counts in _by_chip([plan for plan in fitting if plan["bound"]])
        }
        if speed:
            drawings.append(
                plots.lines("Million events a second at the bound", speed, "chips", from_zero=True)
            )
    return f'<div class="panel scroll">{table}</div><div class="gap"></div>{elements.panels(drawings)}'


def _by_chip(plans: Sequence[Plan]) -> list[tuple[str, list[Plan], list[int]]]:
    """The plans of each kind of chip, by rising numbers of chips: a line of a plot each."""
    groups: dict[str, list[Plan]] = {}
    for plan in sorted(plans, key=lambda plan: plan["num_chips"]):
        groups.setdefault(plan["chip"], []).append(plan)
    return [(chip, group, [plan["num_chips"] for plan in group]) for chip, group in groups.items()]


def _chips(chips: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        f'<tr><th scope="row">{elements.text(name)}</th><td>{chip["flops"] / 1e12:,.0f}</td>'
        f"<td>{chip['hbm_bytes'] / GIB:,.0f}</td><td>{chip['hbm_rate'] / 1e9:,.0f}</td>"
        f"<td>{chip['link_rate'] / 1e9:,.0f}</td><td>{chip['network_rate'] / 1e9:,.1f}</td>"
        f'<td class="words"><a href="{elements.text(chip["source"])}">{elements.text(chip["source"])}</a></td></tr>'
        for name, chip in chips.items()
    ]
    head = ["chip", "TFLOP/s bfloat16", "GiB", "GB/s HBM", "GB/s links", "GB/s network", "source"]
    return (
        f'<div class="panel scroll">{elements.table(head, rows, "Of one chip", words=("source",))}</div>'
        if rows
        else ""
    )
