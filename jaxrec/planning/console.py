"""A plan in the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

GIB = 2**30
Plan = Mapping[str, Any]


def print_plan(console: Console, plan: Plan) -> None:
    """Memory, work, bound, and the largest that fits."""
    table = Table(title=escape(headline(plan)), title_justify="left", show_header=False)
    if not plan["fits"]:
        table.add_row(
            "[bold red]does not fit",
            f"needs {plan['needed_bytes'] / GIB:,.1f} of {plan['capacity_bytes'] / GIB:,.1f} GiB a chip",
        )
        table.add_row("remedy", escape(plan["remedy"]))
    if "memory" in plan:
        _add_memory(table, plan["memory"])
        _add_work(table, plan["work"])
    if plan.get("overlap"):
        table.add_row("hidden in the schedule", overlap_text(plan["overlap"]))
    if plan.get("bound"):
        _add_bound(table, plan["bound"])
    for name, found in plan.get("largest", {}).items():
        table.add_row(f"largest {name}", largest_text(name, found))
    console.print(table)


def headline(plan: Plan) -> str:
    """What was planned for what."""
    return (
        f"{plan['config']} on {plan['topology']}: {plan['num_chips']:,} chips, mesh {plan['mesh']['data']} x "
        f"{plan['mesh']['model']}, {plan['global_batch_size']:,} rows a step ({plan['rows_per_chip']:g} a chip)"
    )


def largest_text(name: str, found: Plan) -> str:
    """The largest batch or tables in words."""
    what = (
        f"{found['rows_per_chip']:g} rows a chip"
        if name == "batch"
        else f"{found['num_items']:,} items, {found['num_users']:,} users"
    )
    share = f" ({found['share']:.0%})" if found["share"] is not None else ""
    return f"{what}: {found['total_bytes'] / GIB:,.1f} GiB a chip{share}; limited by {found['limited_by']}"


def overlap_text(overlap: Plan) -> str:
    """What of each part's bytes is on its way while the cores work."""

    def part(name: str, found: Plan) -> str:
        if not found["sent"]:
            return f"{name}: nothing sent"
        kernels, products, split = (
            found[key] / found["sent"] for key in ("behind_kernels", "behind_products", "asynchronous")
        )
        return (
            f"{name}: {kernels:.0%} of its bytes go while kernels run, {products:.0%} while matrix products do "
            f"({split:.0%} asynchronous)"
        )

    return "; ".join(part(name, found) for name, found in overlap.items())


def _add_memory(table: Table, memory: Plan) -> None:
    share = f" of {memory['capacity_bytes'] / GIB:,.1f} ({memory['share']:.0%})" if memory["share"] else ""
    table.add_row("memory a chip", f"{memory['total_bytes'] / GIB:,.2f} GiB{share}")
    for name, size in memory["bytes_by_kind"].items():
        table.add_row(f"  {name}", f"{size / GIB:,.3f} GiB")
    for buffer in memory["largest_temporaries"][:4]:
        table.add_row(
            "  a temporary",
            escape(f"{buffer['num_bytes'] / GIB:,.3f} GiB  {buffer['shape'][:48]}  {buffer['source'][-56:]}"),
        )


def _add_work(table: Table, work: Plan) -> None:
    table.add_row(
        "operations a step",
        f"{work['compiled_flops'] / 1e12:,.1f} TFLOP compiled ({work['compiled_over_formula']:.3f} of the formula), "
        f"{work['model_flops'] / 1e12:,.1f} of the model",
    )
    table.add_row("HBM bytes a device", f"{work['hbm_bytes'] / 1e9:,.2f} GB")
    table.add_row(
        "sent by a device",
        f"exchange {work['exchange_bytes'] / 1e6:,.1f} MB (rows alone {work['exchange_bytes_of_rows'] / 1e6:,.1f}), "
        f"dense {work['dense_bytes'] / 1e6:,.1f} MB",
    )
    for axis, parts in work["collective_bytes_by_axis"].items():
        table.add_row(
            f"  along {axis}",
            f"exchange {parts['exchange'] / 1e6:,.1f} MB, dense {parts['dense'] / 1e6:,.1f} MB",
        )


def _add_bound(table: Table, bound: Plan) -> None:
    seconds = ", ".join(f"{name} {value * 1e3:,.2f}" for name, value in bound["seconds"].items())
    table.add_row(
        "bound", f"[bold]{bound['resource']}[/]: {bound['step_seconds'] * 1e3:,.2f} ms a step ({seconds})"
    )
    table.add_row(
        "at the bound", f"{millions(bound['events_per_second'])} million events/s, MFU {bound['mfu']:.1%}"
    )


def millions(count: float) -> str:
    """Three digits, or all before the point."""
    return f"{count / 1e6:,.0f}" if count >= 1e8 else f"{count / 1e6:.3g}"


SCALING_HEAD = (
    "topology", "chips", "GiB a chip", "exch. MB", "dense MB", "bound", "ms a step", "million events/s", "MFU",
)  # fmt: skip


def scaling_row(plan: Plan) -> list[str]:
    """A plan as a line of the scaling table."""
    if not plan["fits"]:
        return [plan["topology"], f"{plan['num_chips']:,}", "does not fit", *[""] * 6]
    work, bound = plan["work"], plan["bound"]
    timed = (
        [
            bound["resource"], f"{bound['step_seconds'] * 1e3:,.2f}", millions(bound["events_per_second"]),
            f"{bound['mfu']:.1%}",
        ]
        if bound
        else [""] * 4
    )  # fmt: skip
    return [
        plan["topology"],
        f"{plan['num_chips']:,}",
        f"{plan['memory']['total_bytes'] / GIB:,.2f}",
        f"{work['exchange_bytes'] / 1e6:,.1f}",
        f"{work['dense_bytes'] / 1e6:,.1f}",
        *timed,
    ]


def print_scaling(console: Console, plans: Sequence[Plan]) -> None:
    """One line a machine; nothing where there is none."""
    if not plans:
        return
    title = "Scaling; bytes are those that a device sends in a step"
    # Heads wrap at their spaces, values do not: nine columns fit a terminal of 80.
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)
    )
    rows = [scaling_row(plan) for plan in plans]
    for name, cells in zip(SCALING_HEAD, zip(*rows, strict=True), strict=True):
        justify: Any = "left" if name in ("topology", "bound") else "right"
        table.add_column(name, justify=justify, width=max(map(len, (*cells, *name.split()))))
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
