"""The card of a bundle: what it was trained on, how good it was found, what it cannot do, and whose the data are.

Source: Mitchell et al., FAT* 2019 (model cards).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrec.export.check import Check

EMBEDDED_LICENCE = (
    "MovieLens latest-small (F. M. Harper and J. A. Konstan, ACM TiiS 2015): research and non-commercial use only, by "
    "the terms that lie beside the data in the package."
)
UNKNOWN_LICENCE = (
    "Not stated. Whoever uses the model must know it: export again with --data-licence=TEXT to say it here."
)
METRICS = ("hr@10", "ndcg@10", "mrr@10")


def model_card(
    facts: Mapping[str, Any], evaluation: Mapping[str, Any], checks: Sequence[Check], licence: str
) -> str:
    """The card in Markdown.

    Args:
      facts: of the manifest.
      evaluation: what `evaluation.json` of the run holds; {} = it was not evaluated.
    """
    data, run = facts["data"], facts["run"]
    sections = {
        "What it is": (
            f"A two-tower recommender, run `{run['name']}` at step {run['step']}, tasks: {', '.join(run['tasks'])}. It "
            f"reads the latest {facts['max_events']} events of a user and ranks {facts['num_items']:,} items. "
            f"Weights are stored in {facts['dtype']} and computed with in float32."
        ),
        "Data": (
            f"`{data['name']}`: {data['num_users']:,} users, {data['num_items']:,} items, {data['num_events']:,} "
            f"events; split: {data['split']}; fingerprint `{data['fingerprint'] or 'none'}`."
        ),
        "Licence of the data": licence,
        "Quality": _quality(evaluation, run["step"]),
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


def data_licence(given: str, data_path: str) -> str:
    """What the card says of the data's licence; empty = what is known of them."""
    return given or (UNKNOWN_LICENCE if data_path else EMBEDDED_LICENCE)


def _quality(evaluation: Mapping[str, Any], step: int) -> str:
    if not evaluation:
        return "Not evaluated. Run `python -m jaxrec.evaluate --workdir=DIR` and export again."
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
        "Each artifact was loaded in a process of its own, without the code of the model, and compared with JAX.",
        "",
        "| artifact | program | largest difference |",
        "|---|---|---|",
    ]
    lines += [f"| {check.artifact} | {check.program} | {check.difference:.1e} |" for check in checks]
    return "\n".join(lines)
