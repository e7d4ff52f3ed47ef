"""Tables for the terminal: metrics beside the baselines, comparisons of runs, recommendations of a user."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxrec.evaluation.report import ExampleUser, best_baseline, display_name
from jaxrec.evaluation.significance import Comparison

EVENTS_SHOWN = 5  # of a history
_SHOWN_METRICS = ("hr@1", "hr@10", "hr@50", "ndcg@10", "ndcg@50", "mrr")


def print_evaluation(console: Console, values: Mapping[str, Any]) -> None:
    """The model and the baselines, best first, with the headline's interval and the gain over the best baseline."""
    metrics, headline, baselines = values["metrics"], values["headline_metric"], values["baselines"]
    names = [name for name in dict.fromkeys([*_SHOWN_METRICS, headline]) if name in metrics]
    table = Table(
        title=escape(
            f"{values['dataset']}, {values['split']}: {values['num_users']:,} users, {values['num_items']:,} items, "
            f"seen items {'filtered' if values['filter_seen'] else 'kept'}"
        ),
        title_justify="left",
    )
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", style="bold" if name == headline else "")
    systems = {"model": metrics} | {
        display_name(name): of_baseline for name, of_baseline in baselines.items()
    }
    for name in sorted(systems, key=lambda name: -systems[name][headline]):
        style = "bold cyan" if name == "model" else ""
        table.add_row(name, *(f"{systems[name][metric]:.4f}" for metric in names), style=style)
    console.print(table)
    low, high = values["intervals"][headline]
    console.print(
        f"{headline} of the model: {metrics[headline]:.4f} "
        f"({values['confidence']:.0%} interval {low:.4f} to {high:.4f})",
        highlight=False,
    )
    rival = best_baseline(values, headline)
    if rival:
        paired = values["paired"][rival][headline]
        low, high = paired["interval"]
        verdict = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
        console.print(
            f"against {display_name(rival)}, the best baseline: {paired['difference']:+.4f} "
            f"({low:+.4f} to {high:+.4f}, paired over users): {verdict}",
            highlight=False,
        )
    for name, found in values.get("values", {}).items():
        errors = ", ".join(
            f"{system.replace('_', ' ')} {error:.4f}"
            for system, error in sorted(found["rmse"].items(), key=lambda one: one[1])
        )
        console.print(f"RMSE of {escape(name)}, best first: {errors}", highlight=False)
    for name, reason in values["baselines_refused"].items():
        console.print(f"{display_name(name)} did not run: {reason}", style="yellow", markup=False)


def print_search(console: Console, search: Mapping[str, Any], headline: str) -> None:
    """The model and the baselines on text queries, by kind of query."""
    table = Table(title=f"search by text, {headline} over queries", title_justify="left")
    table.add_column("")
    for kind, part in search.items():
        table.add_column(f"{kind.replace('_', ' ')} ({part['num_queries']:,})", justify="right")
    for name in next(iter(search.values()))["systems"]:
        cells = (f"{part['systems'][name]['metrics'][headline]:.4f}" for part in search.values())
        table.add_row(display_name(name), *cells, style="bold cyan" if name == "model" else "")
    console.print(table)


def print_kinds(console: Console, kinds: Mapping[str, Any], headline: str) -> None:
    """The model and the simple models on the held-out items of each kind, a column a kind."""
    known = list(next(iter(next(iter(kinds.values()))["systems"].values()))["metrics"])
    headline = headline if headline in known else known[-1]  # a reciprocal rank is of one target
    table = Table(title=f"held-out items by kind, {headline} over users", title_justify="left")
    table.add_column("")
    for kind, part in kinds.items():
        table.add_column(escape(f"{kind} ({part['num_users']:,} users)"), justify="right")
    for name in dict.fromkeys(name for part in kinds.values() for name in part["systems"]):
        found = (part["systems"].get(name) for part in kinds.values())
        cells = ("" if one is None else f"{one['metrics'][headline]:.4f}" for one in found)
        table.add_row(display_name(name), *cells, style="bold cyan" if name == "model" else "")
    console.print(table)


def print_groups(console: Console, groups: Mapping[str, Any]) -> None:
    """What a group's list holds of what its members took, by how it is made."""
    systems = groups["systems"]
    title = f"{groups['num_groups']:,} groups of {groups['group_size']}, lists of {groups['list_length']}"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    names = list(next(iter(systems.values()))["metrics"])
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for system, found in systems.items():
        table.add_row(escape(display_name(system)), *(f"{found['metrics'][name]:.4f}" for name in names))
    console.print(table)


def print_behaviours(console: Console, comparison: Mapping[str, Mapping[str, Any]]) -> None:
    """The model and the simple models of each behaviour."""
    for behaviour, systems in comparison.items():
        table = Table(title=escape(f"{behaviour}, of the events of the split"), title_justify="left")
        for name in (
            "",
            "AUC",
            "95% interval",
            "log-loss",
            "calibration error",
            "AUC of the model less this",
        ):
            table.add_column(name, justify="right" if name else "left")
        for system, values in systems.items():
            shown = [values["auc"], values["log_loss"], values["expected_calibration_error"]]
            numbers = ["-" if value is None else f"{value:.4f}" for value in shown]
            spans = [
                "" if not values.get(name) else "{:.4f} to {:.4f}".format(*values[name])
                for name in ("auc_interval", "auc_gain")
            ]
            table.add_row(display_name(system), numbers[0], spans[0], *numbers[1:], spans[1])
        console.print(table)


def print_slates(console: Console, slates: Mapping[str, Mapping[str, Any]]) -> None:
    """What each kind of set is like."""
    table = Table(title="slates, beside the plain lists", title_justify="left")
    names = [name for name in next(iter(slates.values())) if name != "interval"]
    for name in ("", *names):
        table.add_column(name.replace("_", " "), justify="right" if name else "left")
    for slate, values in slates.items():
        cells = ("-" if values[name] is None else f"{values[name]:.4f}" for name in names)
        table.add_row(escape(slate), *cells)
    console.print(table)


def print_example(console: Console, user: ExampleUser) -> None:
    """The recommendations of one user, with titles."""
    table = Table(
        title=escape(f"Recommended to user {user.user_id}"), title_justify="left", show_header=False
    )
    table.add_column(justify="right", style="dim")
    table.add_column()
    for place, title in enumerate(user.recommendations):
        chosen = "  [green](chosen next)[/green]" if place == user.rank else ""
        table.add_row(str(place + 1), escape(title) + chosen)
    console.print(
        f"latest events of user {user.user_id}: " + "; ".join(user.history[-EVENTS_SHOWN:]), markup=False
    )
    console.print(table)


def print_comparison(
    console: Console, name_a: str, name_b: str, comparisons: Mapping[str, Comparison], confidence: float
) -> None:
    """Run B against run A, metric by metric."""
    users = next(iter(comparisons.values())).num_users
    table = Table(
        title=escape(f"B = {name_b} against A = {name_a}, {users:,} users in pairs"),
        title_justify="left",
        caption=f"p: sign flips, Holm's correction over {len(comparisons)} metrics; * = below {1 - confidence:.2g}",
        caption_justify="left",
    )
    for name in ("metric", "A", "B", "B - A", f"{confidence:.0%} interval", "p", "users better / worse"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for metric, one in comparisons.items():
        significant = one.adjusted_p_value < 1 - confidence
        color = ("green" if one.difference > 0 else "red") if significant else ""
        table.add_row(
            metric,
            f"{one.mean_a:.4f}",
            f"{one.mean_b:.4f}",
            f"{one.difference:+.4f}",
            f"{one.low:+.4f} .. {one.high:+.4f}",
            f"{one.adjusted_p_value:.4f}{' *' if significant else '  '}",
            f"{one.better:,} / {one.worse:,}",
            style=color,
        )
    console.print(table)
