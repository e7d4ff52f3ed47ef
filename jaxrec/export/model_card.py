"""The card of a bundle: what it was trained on, how good it was found, what it cannot do, and whose the data are.

Source: Mitchell et al., FAT* 2019 (model cards).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrec.export.check import Check

UNKNOWN_LICENCE = (
    "Not stated. Whoever uses the model must know it: export again with --data-licence=TEXT to say it here."
)
METRICS = ("hr@10", "ndcg@10", "mrr@10")


def model_card(facts: Mapping[str, Any], metrics: Mapping[str, Any], checks: Sequence[Check]) -> str:
    """The card in Markdown.

    Args:
      facts: of the manifest.
      metrics: what `metrics.json` holds; {} = nothing was measured.
    """
    data, run = facts["data"], facts["run"]
    sections = {
        "What it is": (
            f"A two-tower recommender, run `{run['name']}` at step {run['step']}, tasks: {', '.join(run['tasks'])}. It "
            f"reads the latest {facts['max_events']} events of a user and ranks {facts['num_items']:,} items. "
            f"Weights are stored {_storage(facts)} and computed with in float32."
        ),
        "Data": (
            f"`{data['name']}`: {data['num_users']:,} users, {data['num_items']:,} items, {data['num_events']:,} "
            f"events; split: {data['split']}; fingerprint `{data['fingerprint'] or 'none'}`."
        ),
        "Licence of the data": data["licence"] or UNKNOWN_LICENCE,
        "Quality": _quality(metrics, run["step"]),
        "Limits": _limits(facts),
        "Checked": _checked(checks),
        "Files": (
            "`stablehlo/` for JAX, `saved_model/1/` for TensorFlow and TensorFlow Serving, `onnx/` where it was asked "
            "for; `item_vectors.safetensors`, `weights.safetensors`; `items.parquet` (own ids, titles; row i has id i "
            "+ 1); `config.json`, `metrics.json`; `manifest.json` with the size and SHA-256 of each."
        ),
    }
    parts = [f"# {run['name']} ({facts['created']})"]
    parts += [f"## {title}\n\n{text}" for title, text in sections.items()]
    return "\n\n".join(parts) + "\n"


def _quality(metrics: Mapping[str, Any], step: int) -> str:
    parts = []
    if "metrics" in metrics:
        parts.append(_evaluated(metrics, step))
    if "compression" in metrics:
        parts.append(_compressed(metrics["compression"]))
    if "update" in metrics:
        parts.append(_updated(metrics["update"]))
    return "\n\n".join(parts) or (
        "Not evaluated. Run `python -m jaxrec.evaluate --workdir=DIR` and export again."
    )


def _storage(facts: Mapping[str, Any]) -> str:
    if not facts["compression"]:
        return f"in {facts['dtype']}"
    return f"as the codes of `{facts['compression']}` (`python -m jaxrec.compress`)"


def _compressed(compression: Mapping[str, Any]) -> str:
    """What the codes cost, as `jaxrec.compress` has measured it."""
    method = compression["method"]
    lines = [
        f"Compressed by `{method}`, to {100 * compression['share_of_bytes']:.1f} % of the bytes in float32. Split "
        f"{compression['split']}: {compression['num_targets']:,} targets; full ranking of the catalogue, "
        f"{100 * compression['confidence']:.0f} % paired bootstrap intervals over users.",
        "",
        f"| | float32 | {method} | difference | interval |",
        "|---|---|---|---|---|",
    ]
    for name in (name for name in METRICS if name in compression["metrics"]):
        paired = compression["against_original"][name]
        low, high = paired["interval"]
        lines.append(
            f"| {name} | {compression['original'][name]:.4f} | {compression['metrics'][name]:.4f} | "
            f"{paired['difference']:+.4f} | {low:+.4f} to {high:+.4f} |"
        )
    return "\n".join(lines)


def _updated(update: Mapping[str, Any]) -> str:
    """The paired test that the version was promoted by."""
    low, high = update["interval"]
    return (
        f"Tested against the version that answered before it, on {update['num_targets']:,} events of "
        f"{update['num_users']:,} users that neither was trained on; full ranking of the catalogue, "
        f"{100 * update['confidence']:.0f} % paired bootstrap interval over users.\n\n"
        "| | before | this version | difference | interval |\n"
        "|---|---|---|---|---|\n"
        f"| {update['metric']} | {update['old']:.4f} | {update['new']:.4f} | {update['difference']:+.4f} | "
        f"{low:+.4f} to {high:+.4f} |\n\n"
        f"The decision: {update['decision']}."
    )


def _evaluated(evaluation: Mapping[str, Any], step: int) -> str:
    confidence = f"{100 * evaluation['confidence']:.0f} %"
    lines = [
        f"Split {evaluation['split']}: {evaluation['protocol']}; {evaluation['num_users']:,} users, "
        f"{confidence} bootstrap intervals over users.",
        "",
        "| | model | interval | " + " | ".join(evaluation["baselines"]) + " |",
        "|---|---|---|" + "---|" * len(evaluation["baselines"]),
    ]
    for name in (name for name in METRICS if name in evaluation["metrics"]):
        low, high = evaluation["intervals"][name]
        others = "".join(f" {of_baseline[name]:.4f} |" for of_baseline in evaluation["baselines"].values())
        lines.append(f"| {name} | {evaluation['metrics'][name]:.4f} | {low:.4f} to {high:.4f} |{others}")
    for name, found in evaluation.get("behaviours", {}).items():
        if isinstance(found, Mapping) and found.get("auc") is not None:
            lines += ["", f"Behaviour `{name}`: AUC {found['auc']:.4f}, log-loss {found['log_loss']:.4f}."]
    if evaluation.get("model", {}).get("step") not in (None, step):
        lines += ["", f"Measured at step {evaluation['model']['step']}, not at the exported step {step}."]
    return "\n".join(lines)


def _limits(facts: Mapping[str, Any]) -> str:
    limits = [
        "It knows the items of its catalogue; what else stands in a history is passed over.",
        "It was measured offline, on what people did under another recommender: what it would change is not known.",
        "Popular items are favoured as far as the data favour them; see the report of the run for the bias.",
        f"Lists hold at most {facts['k']} items.",
        "Later versions of JAX promise to read this StableHLO for six months: export again after that.",
    ]
    if facts["reads"]["text_tokens"]:
        limits.append("New items have a vector by their text (`item_tower`), and are no events of histories.")
    if facts["reads"]["user_ids"]:
        limits.append("`users.parquet` holds the users' own ids, which are personal data.")
    return "\n".join(f"- {limit}" for limit in limits)


def _checked(checks: Sequence[Check]) -> str:
    lines = [
        "Each artifact was loaded in a process of its own, without the code of the model, and compared with JAX, on "
        "histories of users of the data, from the shortest to the longest, and an empty one. A `user_tower.BxL` is the "
        "user tower for just B users and L events: every one was asked with the longest histories that it holds.",
        "",
        "| artifact | program | largest difference |",
        "|---|---|---|",
    ]
    lines += [f"| {check.artifact} | {check.program} | {check.difference:.1e} |" for check in checks]
    return "\n".join(lines)
