"""The parts of the report about kinds of items and about groups: tables of systems with intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrec.evaluation import report_elements as elements

__all__ = ["groups_section", "kinds_section"]

KIND_METRICS = ("hr@10", "recall@10", "recall@20", "ndcg@10", "ndcg@50")


def kinds_section(evaluation: Mapping[str, Any]) -> str:
    """A table a kind; "" where items are of one kind."""
    kinds = evaluation.get("kinds") or {}
    tables = [
        _systems(
            part["systems"],
            [name for name in KIND_METRICS if name in next(iter(part["systems"].values()))["metrics"]],
            f"{kind}: {part['num_users']:,} users, {part['num_targets']:,} held out, "
            f"among {part['num_candidates']:,}",
        )
        for kind, part in kinds.items()
    ]
    if not tables:
        return ""
    note = (
        "All held-out items of a user, in one list a user and kind, from the history before them. Recall is of at most "
        "k targets. Means over users."
    )
    return f'<p class="note">{note}</p>{"".join(tables)}'


def groups_section(evaluation: Mapping[str, Any]) -> str:
    """One table; "" where no groups were asked for."""
    groups = evaluation.get("groups") or {}
    if not groups:
        return ""
    systems = groups["systems"]
    note = (
        f"Groups of {groups['group_size']}, formed by {groups['formed_by']}, and lists of {groups['list_length']}. "
        "Hit: a held-out item of the member is listed that none of the group had; of any member, of how many in the "
        "mean, of all. Recall: of the members in the mean, and of the one served worst."
    )
    names = list(next(iter(systems.values()))["metrics"])
    table = _systems(systems, names, f"{groups['num_groups']:,} groups")
    return f'<p class="note">{note}</p>{table}'


def _systems(systems: Mapping[str, Any], names: Sequence[str], caption: str) -> str:
    rows = [
        elements.metric_row(name.replace("_", " "), found["metrics"], names, found["intervals"])
        for name, found in systems.items()
    ]
    head = ["", *(name.replace("_", " ") for name in names)]
    return f'<div class="panel scroll">{elements.table(head, rows, elements.text(caption))}</div>'
