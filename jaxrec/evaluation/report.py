"""The report: one HTML page that needs nothing else, for a person who asks "is it any good?".

It is drawn from what `evaluation.json` holds, the run's metrics, and a few users; it computes nothing of its own.
Every text that comes from data is escaped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrec.core.files import write_whole
from jaxrec.evaluation import plots
from jaxrec.evaluation import report_elements as elements
from jaxrec.evaluation.report_elements import MODEL
from jaxrec.evaluation.report_kinds import groups_section, kinds_section

BASELINE_NAMES = {
    "popularity": "popularity",
    "recent_popularity": "recent popularity",
    "transition": "transition counts",
    "item_knn": "item-kNN",
    "ease": "EASE",
    "ials": "iALS",
    "tf_idf": "TF-IDF",
    "bm25": "BM25",
    "tf_idf_with_queries": "TF-IDF with training queries",
    "bm25_with_queries": "BM25 with training queries",
}
_SHOWN_METRICS = ("hr@1", "hr@5", "hr@10", "hr@50", "ndcg@5", "ndcg@10", "mrr")
_HISTORY_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class ExampleUser:
    """A user with what they did and what the model would show.

    Attributes:
      user_id: the user's own id.
      history: titles, oldest first; the latest are shown.
      recommendations: titles, best first.
      target: title of the event that was held out; "" = none.
      rank: of the target in the whole catalogue, from 0.
    """

    user_id: str
    history: Sequence[str]
    recommendations: Sequence[str]
    target: str = ""
    rank: int = -1


def write_report(
    path: Path,
    evaluation: Mapping[str, Any],
    *,
    history: Sequence[Mapping[str, float]] = (),
    examples: Sequence[ExampleUser] = (),
    config: Mapping[str, Any] | None = None,
) -> None:
    """Writes the page at once, so that a reader never meets half of it."""
    write_whole(path, render_report(evaluation, history, examples, config or {}))


def render_report(
    evaluation: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    examples: Sequence[ExampleUser],
    config: Mapping[str, Any],
) -> str:
    """The page.

    Args:
      evaluation: what `evaluation.json` holds (docs/evaluation.md lists its parts; those absent are left out).
      history: the lines of `metrics.jsonl`.
      config: the run's config as nested values.
    """
    sections = {
        "Metrics beside the baselines": _comparison(evaluation),
        "Training": _training(history),
        "Who it works for": _slices(evaluation),
        "What the lists look like": _beyond_accuracy(evaluation),
        "Behaviours": _behaviours(evaluation),
        "Values": _values(evaluation),
        "Search": _search(evaluation),
        "Slates": _slates(evaluation),
        "Kinds of items": kinds_section(evaluation),
        "Groups": groups_section(evaluation),
        "Example users": _examples(examples),
        "How this was measured": _protocol(evaluation, config),
    }
    name = evaluation.get("model", {}).get("name") or "model"
    seen = "seen items filtered" if evaluation["filter_seen"] else "seen items kept"
    return elements.page(
        heading=f"{name} on {evaluation['dataset']}",
        summary=(
            f"{evaluation['split']} split, {evaluation['protocol']}, {seen}. "
            f"{evaluation['num_users']:,} users, {evaluation['num_items']:,} items."
        ),
        cards=_cards(evaluation),
        sections=sections,
        footer=f"Written by jaxrec. {evaluation.get('command', '')}",
    )


def display_name(name: str) -> str:
    """A baseline's name for people."""
    return BASELINE_NAMES.get(name, name.replace("_", " "))


def best_baseline(evaluation: Mapping[str, Any], metric: str) -> str | None:
    """The baseline that a model has to beat."""
    baselines = evaluation.get("baselines") or {}
    return max(baselines, key=lambda name: baselines[name][metric], default=None)


def _headline(evaluation: Mapping[str, Any]) -> str:
    return str(evaluation.get("headline_metric", "ndcg@10"))


def _cards(evaluation: Mapping[str, Any]) -> str:
    metrics, headline = evaluation["metrics"], _headline(evaluation)
    cards = []
    for name in dict.fromkeys([headline, "hr@10", "mrr"]):
        if name not in metrics:
            continue
        low, high = evaluation["intervals"].get(name, (None, None))
        detail = "" if low is None else f"{low:.4f} to {high:.4f}"
        cards.append(elements.card(name.upper(), f"{metrics[name]:.4f}", detail))
    rival = best_baseline(evaluation, headline)
    paired = evaluation.get("paired", {}).get(rival, {}).get(headline) if rival else None
    if rival and paired:
        low, high = paired["interval"]
        kind = "good" if low > 0 else "bad" if high < 0 else ""
        value = f'<span class="{kind}">{paired["difference"]:+.4f}</span>'
        detail = (
            f"{headline.upper()} against {display_name(rival)}, the best baseline; {low:+.4f} to {high:+.4f}"
        )
        cards.append(elements.card("Gain", value, detail, raw=True))
    timing = evaluation.get("timing", {})
    if "users_per_second" in timing:
        detail = f"ranked over {evaluation['num_items']:,} items each"
        cards.append(elements.card("Users per second", f"{timing['users_per_second']:,.0f}", detail))
    return f'<div class="cards">{"".join(cards)}</div>\n'


def _comparison(evaluation: Mapping[str, Any]) -> str:
    metrics, intervals, headline = evaluation["metrics"], evaluation["intervals"], _headline(evaluation)
    baselines = evaluation.get("baselines") or {}
    names = [name for name in _SHOWN_METRICS if name in metrics] or list(metrics)
    order = sorted(baselines, key=lambda name: -baselines[name].get(headline, 0.0))
    rows = [elements.metric_row(MODEL, metrics, names, intervals)]
    rows += [elements.metric_row(display_name(name), baselines[name], names, {}) for name in order]
    confidence = evaluation.get("confidence", 0.95)
    table = elements.table(
        ["", *(name.upper() for name in names)],
        rows,
        f"Mean over {evaluation['num_users']:,} users; below the model's values, their {confidence:.0%} intervals.",
    )
    panels = []
    for metric in dict.fromkeys([headline, "hr@10"]):
        if metric not in metrics:
            continue
        values = {MODEL: metrics[metric]} | {
            display_name(name): baselines[name][metric] for name in baselines
        }
        shown = {MODEL: intervals[metric]} if metric in intervals else {}
        panels.append(plots.bars_with_intervals(metric.upper(), values, shown, MODEL))
    paired = {
        name: parts[headline] for name, parts in evaluation.get("paired", {}).items() if headline in parts
    }
    if paired:
        panels.append(
            plots.differences(
                f"{headline.upper()} of the model minus the baseline's",
                {display_name(name): paired[name]["difference"] for name in order if name in paired},
                {display_name(name): paired[name]["interval"] for name in order if name in paired},
            )
        )
    notes = "".join(
        f'<p class="note">{elements.text(display_name(name))} is missing: {elements.text(reason)}</p>'
        for name, reason in evaluation.get("baselines_refused", {}).items()
    )
    return f'<div class="panel scroll">{table}</div>{notes}<div class="gap"></div>{elements.panels(panels)}'


def _training(history: Sequence[Mapping[str, float]]) -> str:
    """Loss of each task, validation, throughput; what was not logged is left out."""
    curves = _curves(history)
    losses = {name.removeprefix("loss/"): curve for name, curve in curves.items() if name.startswith("loss/")}
    if not losses and "loss" in curves:
        losses = {"loss": curves["loss"]}
    validation = {name: curve for name, curve in curves.items() if name.startswith("validation/")}
    panels = []
    if losses:
        panels.append(plots.lines("Loss by task (nats)", losses, "step"))
    for family in ("ndcg", "hr"):
        names = sorted(
            (name for name in validation if f"/{family}@" in name), key=lambda name: int(name.split("@")[1])
        )
        chosen = {name.removeprefix("validation/"): validation[name] for name in names}
        if chosen:
            title = f"Validation {family.upper()}"
            panels.append(plots.lines(title, dict(list(chosen.items())[:6]), "step", from_zero=True))
    if "events_per_second" in curves:
        speed = {"events": curves["events_per_second"]}
        panels.append(plots.lines("Throughput (events per second)", speed, "step", from_zero=True))
    norms = {name: curves[name] for name in curves if name.startswith("gradient_norm/")}
    norms = {name.split("/", 1)[1]: curve for name, curve in norms.items()}
    if norms or "gradient_norm" in curves:
        panels.append(
            plots.lines("Gradient norm", norms or {"all": curves["gradient_norm"]}, "step", from_zero=True)
        )
    return elements.panels(panels) if panels else ""


def _curves(history: Sequence[Mapping[str, float]]) -> dict[str, tuple[list[float], list[float]]]:
    """Each metric's (steps, values), the lines that lack it left out."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for line in history:
        for name, value in line.items():
            if name != "step" and abs(float(value)) < float("inf"):  # NaN compares false, too
                steps, values = curves.setdefault(name, ([], []))
                steps.append(float(line["step"]))
                values.append(float(value))
    return curves


def _slices(evaluation: Mapping[str, Any]) -> str:
    headline = _headline(evaluation)
    panels, tables = [], []
    for dimension, parts in (evaluation.get("slices") or {}).items():
        if not parts:
            continue
        systems = [name for name in parts[0]["metrics"] if all(name in part["metrics"] for part in parts)]
        groups = [str(part["name"]) for part in parts]
        series = {
            display_name(s): [p["metrics"][s].get(headline, float("nan")) for p in parts] for s in systems
        }
        title = f"{headline.upper()} by {dimension.replace('_', ' ')}"
        panels.append(plots.grouped_bars(title, groups, series))
        rows = [
            f'<tr><th scope="row">{elements.text(part["name"])}</th><td>{part["num_users"]:,}</td>'
            + "".join(f"<td>{part['metrics'][s].get(headline, float('nan')):.4f}</td>" for s in systems)
            + "</tr>"
            for part in parts
        ]
        tables.append(
            f'<div class="panel scroll">{elements.table(["", "users", *map(display_name, systems)], rows, title)}</div>'
        )
    return (
        elements.panels(panels) + f'<div class="gap"></div><div class="panels">{"".join(tables)}</div>'
        if panels
        else ""
    )


def _beyond_accuracy(evaluation: Mapping[str, Any]) -> str:
    systems = evaluation.get("beyond_accuracy") or {}
    if not systems:
        return ""
    names = list(systems.get(MODEL) or next(iter(systems.values())))
    rows = [
        elements.metric_row(display_name(system), values, names, {}) for system, values in systems.items()
    ]
    table = elements.table(["", *(name.replace("_", " ") for name in names)], rows, "")
    note = (
        "Coverage: share of the catalogue that anybody is shown. Gini: how unequally items are shown (0 = alike). "
        "Novelty: how rare the shown items are, in bits. Popularity: their mean training events. Diversity: how "
        "unlike each other the items of one list are, by category and by the model's vectors. Popularity lift: how "
        "much more popular the lists are than their users' own histories (0 = alike, 1 = twice)."
    )
    return f'<p class="note">{note}</p><div class="panel scroll">{table}</div>'


def _behaviours(evaluation: Mapping[str, Any]) -> str:
    behaviours = evaluation.get("behaviours") or {}
    if not behaviours:
        return ""
    fullest = max(behaviours.values(), key=len)  # one without known labels lacks some
    names = [name for name, value in fullest.items() if not isinstance(value, Mapping)]
    rows = []
    for behaviour, values in behaviours.items():
        cells = "".join(f"<td>{elements.number(values.get(name))}</td>" for name in names)
        rows.append(f'<tr><th scope="row">{elements.text(behaviour)}</th>{cells}</tr>')
    table = elements.table(["", *(name.replace("_", " ") for name in names)], rows, "")
    points = {
        behaviour: (values["calibration"]["predicted"], values["calibration"]["observed"])
        for behaviour, values in behaviours.items()
        if values.get("calibration", {}).get("predicted")
    }
    plot = elements.panels([plots.calibration("Calibration", points)]) if points else ""
    beside = "".join(
        _behaviours_beside(behaviour, systems)
        for behaviour, systems in (evaluation.get("behaviour_comparison") or {}).items()
    )
    note = "Probabilities and the threshold alpha were set on the validation targets, and are judged here."
    for second, counts in evaluation.get("funnels", {}).items():
        note += (
            f" {elements.text(second)} without {elements.text(counts['first'])}: {counts['labels']:,} of "
            f"{counts['num_events']:,} labels, {counts['predicted']:,} predictions."
        )
    return f'<p class="note">{note}</p><div class="panel scroll">{table}</div>{beside}<div class="gap"></div>{plot}'


def _behaviours_beside(behaviour: str, systems: Mapping[str, Mapping[str, Any]]) -> str:
    """The model beside the simple models of a behaviour."""
    names = ("auc", "log_loss", "expected_calibration_error")
    rows = []
    for system, values in systems.items():
        intervals = {name: values[f"{name}_interval"] for name in names[:2] if values.get(f"{name}_interval")}
        rows.append(
            elements.metric_row(MODEL if system == MODEL else display_name(system), values, names, intervals)
        )
    table = elements.table(
        ["", *(name.replace("_", " ") for name in names)], rows, f"{behaviour}, beside simple models"
    )
    return f'<div class="panel scroll">{table}</div>'


def _search(evaluation: Mapping[str, Any]) -> str:
    search = evaluation.get("search") or {}
    tables = []
    for kind, part in search.items():
        systems = part["systems"]
        names = [name for name in _SHOWN_METRICS if name in systems[MODEL]["metrics"]]
        rows = [
            elements.metric_row(
                MODEL if name == MODEL else display_name(name),
                of_system["metrics"],
                names,
                of_system["intervals"],
            )
            for name, of_system in systems.items()
        ]
        caption = f"{kind.replace('_', ' ')}: {part['num_queries']:,} queries, {part['num_pairs']:,} pairs"
        tables.append(f'<div class="panel scroll">{elements.table(["", *names], rows, caption)}</div>')
    if not tables:
        return ""
    note = (
        "Text queries, each held-out item ranked in the whole catalogue with the query's other answers left out; means "
        "over queries. Known: the query was trained with other items. New: in known words. New words: with a word that "
        "no training query has."
    )
    return f'<p class="note">{note}</p>{"".join(tables)}'


def _slates(evaluation: Mapping[str, Any]) -> str:
    slates = evaluation.get("slates") or {}
    if not slates:
        return ""
    names = [name for name in next(iter(slates.values())) if name != "interval"]
    rows = [
        elements.metric_row(slate, values, names, {"hit_rate": values["interval"]})
        for slate, values in slates.items()
    ]
    table = elements.table(["", *(name.replace("_", " ") for name in names)], rows, "")
    ordered = sorted(slates.values(), key=lambda values: values["vector_diversity"] or 0.0)
    diversity = [values["vector_diversity"] or 0.0 for values in ordered]
    curves = {
        name.replace("_", " "): (diversity, [values[name] for values in ordered])
        for name in ("hit_rate", "expected_relevance")
    }
    plot = elements.panels(
        [plots.lines("What diversity costs", curves, "vector diversity", from_zero=True, whole_x=False)]
    )
    note = (
        "Sets that are chosen together, beside the plain lists (best). Expected relevance: the model's chance that the "
        "next item is in the set, among the items that it is chosen from. Diversity: how unlike each other the items "
        "of a set are."
    )
    return f'<p class="note">{note}</p><div class="panel scroll">{table}</div><div class="gap"></div>{plot}'


def _values(evaluation: Mapping[str, Any]) -> str:
    parts = []
    for name, found in (evaluation.get("values") or {}).items():
        rows = [
            f'<tr><th scope="row">{elements.text(system.replace("_", " "))}</th>'
            f"<td>{elements.number(rmse)}</td><td>{elements.number(found['mae'][system])}</td></tr>"
            for system, rmse in sorted(found["rmse"].items(), key=lambda one: one[1])
        ]
        low, high = found["difference"]["interval"]
        note = (
            f"{elements.text(name)} of {found['num_values']:,} events. Squared error of the model less that of the "
            f"user's and the item's means: {found['difference']['mean']:+.4f} ({low:+.4f} to {high:+.4f})."
        )
        table = elements.table(["", "RMSE", "MAE"], rows, "")
        parts.append(f'<p class="note">{note}</p><div class="panel scroll">{table}</div>')
    return "".join(parts)


def _examples(examples: Sequence[ExampleUser]) -> str:
    if not examples:
        return ""
    users = []
    for user in examples:
        start = max(len(user.history) - _HISTORY_SHOWN, 0)
        past = "".join(f"<li>{elements.text(title)}</li>" for title in user.history[start:])
        shown = "".join(
            f"<li><mark>{elements.text(title)}</mark></li>"
            if place == user.rank
            else f"<li>{elements.text(title)}</li>"
            for place, title in enumerate(user.recommendations)
        )
        target = ""
        if user.target:
            target = (
                f'<p class="note">Chose next: <mark>{elements.text(user.target)}</mark>, '
                f"which stands at rank {user.rank + 1:,}.</p>"
            )
        users.append(
            f'<article class="user"><h3>User {elements.text(user.user_id)}</h3>{target}<div class="columns">'
            f"<div><h4>History, latest last ({len(user.history):,} events)</h4>"
            f'<ol start="{start + 1}">{past}</ol></div>'
            f"<div><h4>Recommended</h4><ol>{shown}</ol></div></div></article>"
        )
    return f'<div class="users">{"".join(users)}</div>'


def _protocol(evaluation: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    confidence = evaluation.get("confidence", 0.95)
    facts = {
        "protocol": evaluation["protocol"],
        "split": evaluation["split"],
        "seen items": "filtered by exact id" if evaluation["filter_seen"] else "kept",
        "ties": "the lower item id comes first",
        "intervals": f"{confidence:.0%}, bootstrap over users; paired over the same users against each baseline",
    }
    facts |= {
        f"users {name.replace('_', ' ')}": f"{n:,}"
        for name, n in evaluation.get("users_left_out", {}).items()
    }
    facts |= {name.replace("_", " "): value for name, value in evaluation.get("model", {}).items()}
    facts |= {
        name.replace("_", " "): elements.number(value) for name, value in evaluation.get("timing", {}).items()
    }
    listed = "".join(
        f"<dt>{elements.text(name)}</dt><dd>{elements.text(value)}</dd>" for name, value in facts.items()
    )
    settings = "".join(
        f"<dt>{elements.text(name)}</dt><dd>{elements.text(value)}</dd>" for name, value in _flat(config)
    )
    details = f"<details><summary>The whole config</summary><dl>{settings}</dl></details>" if settings else ""
    return f"<dl>{listed}</dl><pre>{elements.text(evaluation.get('command', ''))}</pre>{details}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in values.items():
        pairs += (
            _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + str(name), value)]
        )
    return pairs
