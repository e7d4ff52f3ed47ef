"""What another policy would have earned: each Open Bandit policy from the other's log, and a bandit of known truth.

    python benchmarks/quality/off_policy.py

Open Bandit, campaigns men and women, 10,000 impressions of a uniform and of a Thompson policy each: the clicks that one
would have had, from the log of the other, beside those that it had. There are 46 to 69 clicks a log, so every interval
is wide. How likely the Thompson policy is to show what where is counted in its log, clicks aside.

The synthetic bandit has 10 actions and 5 numbers of context; the logging policy prefers good actions, the other policy
bad ones. 200 logs of 2,000 choices. The model of the rewards is linear and cross-fitted, the truth is not linear.
Bars: the naive mean's interval misses the truth nearly always, and that of the doubly robust estimate covers it in at
least 90 % of the logs.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import suite
from suite import record

from jaxrec.evaluation.off_policy import Estimate, Log, cross_fitted, direct, doubly_robust, ips, naive, snips

POSITIONS = 3
PRIOR = 200.0  # impressions that the common rate counts for in an item's
ACTIONS, CONTEXT, CHOICES, REPEATS = 10, 5, 2_000, 200
COVERED, NAIVE_COVERS = 0.90, 0.10


@dataclasses.dataclass(frozen=True)
class Impressions:
    """One policy's log of one campaign, and where each thing was shown."""

    log: Log
    positions: np.ndarray


def impressions(directory: Path, campaign: str) -> tuple[dict[str, Impressions], int]:
    """Both policies' logs, and how many items there are."""
    columns = ["policy", "campaign", "item_id", "click", "propensity_score", "position"]
    shown = pq.read_table(directory / "impressions.parquet", columns=columns)
    shown = shown.filter(pc.equal(shown["campaign"].cast("string"), campaign))
    found = {}
    for policy in ("random", "bts"):
        rows = shown.filter(pc.equal(shown["policy"].cast("string"), policy))
        item_ids, clicks, propensities, positions = (rows[name].to_numpy() for name in columns[2:])
        found[policy] = Impressions(Log(item_ids, clicks, propensities), positions - 1)
    return found, int(shown["item_id"].to_numpy().max()) + 1


def probabilities(of: Impressions, num_items: int) -> np.ndarray:
    """How often each item is shown at each position."""
    counts = np.zeros((POSITIONS, num_items))
    np.add.at(counts, (of.positions, of.log.actions), 1.0)
    return counts / counts.sum(axis=1, keepdims=True)


def click_rates(log: Log, num_items: int) -> np.ndarray:
    """Of each item at each impression, from the other folds' impressions, drawn to the common rate."""

    def fit(rows: np.ndarray) -> Any:
        shown = np.bincount(log.actions[rows], minlength=num_items)
        clicks = np.bincount(log.actions[rows], log.rewards[rows], minlength=num_items)
        rates = (clicks + PRIOR * log.rewards[rows].mean()) / (shown + PRIOR)
        return lambda asked: np.broadcast_to(rates, (len(asked), num_items))

    return cross_fitted(fit, len(log.actions))


def estimates(log: Log, policy: np.ndarray, rewards: np.ndarray) -> dict[str, Estimate]:
    """By every estimator."""
    return {
        "log's own mean": naive(log),
        "IPS": ips(log, policy),
        "SNIPS": snips(log, policy),
        "direct": direct(policy, rewards),
        "doubly robust": doubly_robust(log, policy, rewards),
    }


def open_bandit(directory: Path) -> dict[str, Any]:
    """Each policy from the other's log."""
    figures: dict[str, Any] = {}
    for campaign in ("men", "women"):
        logs, num_items = impressions(directory, campaign)
        for asked, logged in (("bts", "random"), ("random", "bts")):
            of_log = logs[logged]
            by_position = (
                probabilities(logs["bts"], num_items)
                if asked == "bts"
                else np.full((POSITIONS, num_items), 1 / num_items)
            )
            policy = by_position[of_log.positions]
            found = estimates(of_log.log, policy, click_rates(of_log.log, num_items))
            observed = naive(logs[asked].log)
            name = f"{campaign}: {asked} from the log of {logged}"
            figures[name] = {
                "observed": dataclasses.asdict(observed),
                "clicks": {each: int(logs[each].log.rewards.sum()) for each in (asked, logged)},
            } | {estimator: dataclasses.asdict(estimate) for estimator, estimate in found.items()}
            print(f"{name}: observed {shown(observed)}")
            for estimator, estimate in found.items():
                print(f"  {estimator}: {shown(estimate)}")
    return figures


def shown(estimate: Estimate) -> str:
    """In clicks of a thousand."""
    low, high = 1000 * estimate.low, 1000 * estimate.high
    return f"{1000 * estimate.value:.2f} [{low:.2f}, {high:.2f}] of 1,000"


def softmax(x: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def linear_rewards(context: np.ndarray, log: Log) -> np.ndarray:
    """A ridge regression on the context for each action."""
    features = np.column_stack([np.ones(len(context)), context])

    def fit(rows: np.ndarray) -> Any:
        kernel = np.zeros((features.shape[1], ACTIONS))
        for action in range(ACTIONS):
            own = rows[log.actions[rows] == action]
            gram = features[own].T @ features[own] + np.eye(features.shape[1])
            kernel[:, action] = np.linalg.solve(gram, features[own].T @ log.rewards[own])
        return lambda asked: features[asked] @ kernel

    return cross_fitted(fit, len(context))


def synthetic() -> dict[str, Any]:
    """How often each estimator's interval covers the truth."""
    rng = np.random.default_rng(0)
    taste = rng.normal(size=(CONTEXT, ACTIONS))

    def chances(context: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(context @ taste) - np.sin(3 * context[:, :1])))

    def logging(context: np.ndarray) -> np.ndarray:
        return 0.9 * softmax(context @ taste) + 0.1 / ACTIONS

    def asked(context: np.ndarray) -> np.ndarray:
        return softmax(-0.5 * (context @ taste))

    many = rng.normal(size=(1_000_000, CONTEXT))
    truth = float(np.mean(np.sum(asked(many) * chances(many), axis=1)))
    covers: dict[str, list[bool]] = {}
    values: dict[str, list[float]] = {}
    for _ in range(REPEATS):
        context = rng.normal(size=(CHOICES, CONTEXT))
        propensities = logging(context)
        drawn = rng.random((CHOICES, 1)) < np.cumsum(propensities, axis=1)
        actions = np.argmax(drawn, axis=1)
        at = np.arange(CHOICES), actions
        log = Log(actions, rng.binomial(1, chances(context)[at]), propensities[at])
        for name, estimate in estimates(log, asked(context), linear_rewards(context, log)).items():
            covers.setdefault(name, []).append(estimate.low <= truth <= estimate.high)
            values.setdefault(name, []).append(estimate.value)
    figures: dict[str, Any] = {"truth": truth, "logs": REPEATS, "choices": CHOICES}
    print(f"synthetic: the truth is {truth:.4f}")
    for name, found in values.items():
        figures[name] = {
            "mean": float(np.mean(found)),
            "root_mean_square_error": float(np.sqrt(np.mean((np.array(found) - truth) ** 2))),
            "covered": float(np.mean(covers[name])),
        }
        print(
            f"  {name}: mean {figures[name]['mean']:.4f}, root mean square error "
            f"{figures[name]['root_mean_square_error']:.4f}, interval covers in {figures[name]['covered']:.1%}"
        )
    return figures


def main() -> int:
    """Estimates, compares, checks."""
    given = suite.argument_parser(__doc__).parse_args()
    figures = {"open bandit": open_bandit(given.data / "open-bandit"), "synthetic": synthetic()}
    found = figures["synthetic"]
    bars = [
        record.Bar(
            name="doubly robust: share covered", value=found["doubly robust"]["covered"], limit=COVERED
        ),
        record.Bar(
            name="the log's own mean: share covered",
            value=found["log's own mean"]["covered"],
            limit=NAIVE_COVERS,
            at_most=True,
        ),
    ]
    return record.finish("quality_off_policy", figures, bars)


if __name__ == "__main__":
    sys.exit(main())
