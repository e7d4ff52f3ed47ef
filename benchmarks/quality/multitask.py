"""Does learning behaviours together pay? Heads, single tasks and a funnel on KuaiRand, three seeds, paired over users.

Every variant of `configs/kuairand.py` is trained and evaluated by the entries, on a split by time; every event of the
test part is judged. Each (variant, seed) has a workdir of its own under `runs/quality_multitask/`; one whose
`evaluation.json` is there is read, not run again, so that the program may be stopped and started at will; where the
config has changed since, the program says so and ends.

A comparison takes, of each user, the parts of the AUC that are the user's (`metrics.binary.auc_by_user`), in the mean
over the seeds; Holm's correction is over all comparisons. The bars ask that the funnel never breaks its order, and
that the joint model's AUCs are above those of counting: a user's rate and an item's rate, from the training events.
What is above what else is in the figures and printed, whichever way it went.

    python benchmarks/quality/multitask.py            # some 40 minutes on 2 quiet cores
    python benchmarks/quality/multitask.py --seeds=1
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import scipy.special
import suite
from suite import Variant, record

from jaxrec.data.dataset import PreparedDataset
from jaxrec.evaluation.behaviours import PREDICTIONS_FILE
from jaxrec.evaluation.significance import holm, paired_comparison
from jaxrec.losses.binary import product_logits
from jaxrec.metrics.binary import auc, auc_by_user, user_auc

BEHAVIOURS = ("click", "long_view", "profile_enter", "comment")
FIRST, SECOND = "click", "long_view"
JOINT = ("joint", "mmoe", "ple", "esmm")
SINGLE = {name: f"single_{name}" for name in BEHAVIOURS}
VARIANTS = (*JOINT, *SINGLE.values(), "second_stage")
DATA = "kuairand-kcore15"
PRIOR_EVENTS = {"user": 10.0, "item": 5.0}  # that a rate is shrunk to the mean by

Columns = Mapping[str, np.ndarray]  # of one run's predictions
Runs = Mapping[str, Sequence[Columns]]  # variant -> seeds


def run_variant(variant: str, seed: int, arguments: argparse.Namespace) -> tuple[dict[str, Any], Columns]:
    """Trains and evaluates what is missing; returns its facts and the predictions on the test part.

    Raises:
        RuntimeError: an entry failed.
    """
    config = arguments.config if variant == "joint" else f"{arguments.config}:{variant}"
    tried = suite.tried(Variant(name=variant, config=config, data=DATA), arguments)
    run = tried.run(seed, arguments.data, arguments.base)
    done = (run.workdir / "evaluation.json").exists()
    # A run of another config is not read: training refuses its workdir, and says why.
    if not done or not suite.is_same(held_config(run.workdir), suite.config_of(run)):
        suite.train_and_evaluate(run, f"{variant}, seed {seed}")
    table = pq.read_table(run.workdir / PREDICTIONS_FILE)
    facts = {
        "variant": variant, "seed": seed, "minutes": suite.minutes(suite.sittings(run)),
        "command": suite.without_place(run.shown_command("train"), arguments.data),
    }  # fmt: skip
    return facts, {name: table[name].to_numpy() for name in table.column_names}


def held_config(workdir: Path) -> dict[str, Any]:
    """The config of the run that a workdir holds."""
    config: dict[str, Any] = json.loads((workdir / "config.json").read_text())["config"]
    return config


def counted_logits(dataset: PreparedDataset, predictions: Columns) -> dict[str, np.ndarray]:
    """Of each behaviour: the log-odds of the user's rate and of the item's rate in the training events, summed."""
    histories = dataset.histories(np.arange(dataset.metadata.num_users))
    lengths, starts = np.diff(histories.offsets), histories.offsets[:-1]
    users = np.repeat(np.arange(len(lengths)), lengths)
    trained = np.arange(len(users)) < np.repeat(starts + dataset.train_end, lengths)
    places = {"user": dataset.user_keys, "item": dataset.item_keys}
    ids = {"user": users[trained], "item": histories.item_ids[trained] - 1}
    labels = histories.labels[trained]
    found = {}
    for name in BEHAVIOURS:
        label = labels[:, dataset.metadata.behaviours.index(name)]
        total = np.zeros(len(predictions["user_id"]))
        for kind, keys in places.items():
            prior, size = PRIOR_EVENTS[kind], len(keys)
            hits = np.bincount(ids[kind], weights=label == 1, minlength=size)
            counts = np.bincount(ids[kind], weights=label >= 0, minlength=size)
            rates = (hits + prior * hits.sum() / counts.sum()) / (counts + prior)
            order = np.argsort(keys)
            asked = order[np.searchsorted(keys, predictions[f"{kind}_id"], sorter=order)]
            total += scipy.special.logit(rates[asked])
        found[name] = total
    return found


def systems(runs: Runs, counts: Columns) -> dict[tuple[str, str], tuple[list[np.ndarray], np.ndarray]]:
    """(system, what is asked) -> the logits of its seeds, and the labels; -1 = not asked."""
    one = runs["joint"][0]
    found = {(name, asked): ([c[f"{asked}_logit"] for c in runs[name]], one[asked]) for name in JOINT
             for asked in BEHAVIOURS}  # fmt: skip
    for asked in BEHAVIOURS:
        found["single", asked] = [c[f"{asked}_logit"] for c in runs[SINGLE[asked]]], one[asked]
        found["counts", asked] = [counts[asked]], one[asked]
    # The second stage: multiplied with the single model of the first over all events, alone where the first was.
    stage = [c[f"{SECOND}_logit"] for c in runs["second_stage"]]
    first = [c[f"{FIRST}_logit"] for c in runs[SINGLE[FIRST]]]
    products = [
        np.asarray(product_logits(jnp.asarray(a), jnp.asarray(b))) for a, b in zip(first, stage, strict=True)
    ]
    found["stages", SECOND] = products, one[SECOND]
    given = f"{SECOND} given {FIRST}"
    labels = np.where(one[FIRST] == 1, one[SECOND], -1)
    found["stages", given] = stage, labels
    ratios = [log_sigmoid(c[f"{SECOND}_logit"]) - log_sigmoid(c[f"{FIRST}_logit"]) for c in runs["esmm"]]
    found["esmm", given] = ratios, labels
    return found


def log_sigmoid(logits: np.ndarray) -> np.ndarray:
    """The logarithm of the probability."""
    return -np.logaddexp(0.0, -logits.astype(np.float64))


def comparisons(found: Mapping[tuple[str, str], Any], users: np.ndarray) -> list[dict[str, Any]]:
    """B against A for each behaviour, on the means over seeds, with Holm's correction over all of them."""
    pairs = [("single", "joint"), ("joint", "mmoe"), ("joint", "ple"), ("joint", "esmm"), ("single", "esmm"),
             ("stages", "esmm"), ("counts", "joint")]  # fmt: skip
    rows: list[dict[str, Any]] = []
    for a, b in pairs:
        for (system, asked), (_, labels) in found.items():
            if system != a or (b, asked) not in found:
                continue
            if "esmm" in (a, b) and not asked.startswith((FIRST, SECOND)):
                continue
            values = [
                np.mean([auc_by_user(logits, labels, users) for logits in found[name, asked][0]], axis=0)
                for name in (a, b)
            ]
            one = paired_comparison(*values)
            rows.append(
                {
                    "of": b, "against": a, "asked": asked, "auc": one.mean_b, "auc_against": one.mean_a,
                    "difference": one.difference, "interval": [one.low, one.high], "p_value": one.p_value,
                }
            )  # fmt: skip
    for row, adjusted in zip(rows, holm(np.array([row["p_value"] for row in rows])), strict=True):
        clear = adjusted < 0.05
        row["adjusted_p_value"] = float(adjusted)
        row["verdict"] = ("above" if row["difference"] > 0 else "below") if clear else "no clear difference"
    return rows


def violations(runs: Runs) -> dict[str, Any]:
    """Events whose second behaviour is without the first: in the labels, and by each system's probabilities."""
    one = runs["joint"][0]
    counts: dict[str, Any] = {
        "events": len(one[FIRST]), "labels": int(np.count_nonzero((one[FIRST] == 0) & (one[SECOND] == 1))),
    }  # fmt: skip
    pairs = {name: (runs[name], runs[name]) for name in JOINT}
    pairs["single"] = runs[SINGLE[FIRST]], runs[SINGLE[SECOND]]
    for name, (firsts, seconds) in pairs.items():
        counts[name] = [
            int(np.count_nonzero(second[f"{SECOND}_logit"] > first[f"{FIRST}_logit"]))
            for first, second in zip(firsts, seconds, strict=True)
        ]
    return counts


def summary(
    found: Mapping[tuple[str, str], tuple[list[np.ndarray], np.ndarray]], users: np.ndarray
) -> dict[str, dict[str, Any]]:
    """What is asked -> system -> AUC of each seed, its mean, and the mean over users of their own AUCs."""
    table: dict[str, dict[str, Any]] = {}
    for (system, asked), (seeds, labels) in found.items():
        aucs = [auc(logits, labels) for logits in seeds]
        own = [user_auc(logits, labels, users) for logits in seeds]
        table.setdefault(asked, {})[system] = {
            "auc": statistics.mean(aucs), "auc_of_seeds": aucs,
            "user_auc": statistics.mean(float(values.mean()) for values in own), "users": len(own[0]),
        }  # fmt: skip
    return table


def report(runs: Runs, counts: Columns) -> tuple[dict[str, Any], list[record.Bar]]:
    """The figures and the bars."""
    one = runs["joint"][0]
    for seeds in runs.values():
        for columns in seeds:
            for name in ("user_id", "item_id", *(set(BEHAVIOURS) & set(columns))):
                assert np.array_equal(columns[name], one[name]), f"{name}: the runs judged other events"
    users = np.unique(one["user_id"], return_inverse=True)[1]
    found = systems(runs, counts)
    figures: dict[str, Any] = {
        "auc": summary(found, users),
        "comparisons": comparisons(found, users),
        "violations": violations(runs),
    }
    broken = sum(figures["violations"]["esmm"])
    bars = [record.Bar(name="esmm: long_view above click", value=broken, limit=0, at_most=True)]
    for asked in BEHAVIOURS:
        lead = figures["auc"][asked]["joint"]["auc"] - figures["auc"][asked]["counts"]["auc"]
        bars.append(record.Bar(name=f"joint: AUC of {asked} above counts", value=lead, limit=0, strict=True))
    return figures, bars


def show(figures: Mapping[str, Any]) -> None:
    """The AUCs and the verdicts."""
    for asked, by_system in figures["auc"].items():
        for system, values in by_system.items():
            print(f"{asked}, {system}: AUC {values['auc']:.4f}, within users {values['user_auc']:.4f}")
    for row in figures["comparisons"]:
        low, high = row["interval"]
        print(
            f"{row['of']} against {row['against']}, {row['asked']}: {row['difference']:+.4f} "
            f"[{low:+.4f}, {high:+.4f}], p {row['adjusted_p_value']:.3f}: {row['verdict']}"
        )
    print(f"long_view above click: {figures['violations']}")


def main() -> int:
    """Runs what is missing, prints a line a run, then the comparisons."""
    parser = suite.argument_parser(__doc__)
    parser.set_defaults(base=record.ROOT / "runs" / "quality_multitask")
    suite.add_trial_arguments(parser)
    parser.add_argument("--config", default="configs/kuairand.py", help="a file with the same variants")
    arguments = parser.parse_args()
    runs: dict[str, list[Columns]] = {variant: [] for variant in VARIANTS}
    trained = []
    for seed in range(arguments.seeds):
        for variant in VARIANTS:
            facts, columns = run_variant(variant, seed, arguments)
            runs[variant].append(columns)
            trained.append(facts)
            print(f"{variant}, seed {seed}: {facts['minutes']:.1f} min of training", flush=True)
    dataset = PreparedDataset.open(Path(arguments.base) / "joint-seed-0" / "data")
    figures, bars = report(runs, counted_logits(dataset, runs["joint"][0]))
    show(figures)
    return record.finish("quality_multitask", figures | {"runs": trained}, bars, results=arguments.results)


if __name__ == "__main__":
    sys.exit(main())
