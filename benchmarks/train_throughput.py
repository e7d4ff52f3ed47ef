"""Training and evaluation speed against RecTools' SASRec, measured in turns on the same cores.

Both train the same model on ML-1M (protocol A): d=64, 2 blocks, 1 head, MLP of width 64, histories of 200,
batches of 128 histories, dropout .2 on embeddings, attention weights, the MLP's hidden layer and its output,
full softmax at every event that has a successor, Adam, float32. RecTools pads each history to a row; ours
packs them. A real token is an event whose successor is predicted: padding and last events do not count, on
either side. Docs: docs/benchmarks.md.

Each pair measures RecTools, then ours; the bars hold for the median of the pairs' ratios. Achieved GFLOP/s are
the model's (formula below, nothing recomputed counts) beside a 2048^3 float32 GEMM of the same minute.

    python benchmarks/train_throughput.py            # full epochs, 5 pairs, about 12 minutes on 2 cores
    python benchmarks/train_throughput.py --steps=8  # a quick look
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import record
from worker_process import Worker, start_ours, start_rectools

TRAIN_BAR, TRAIN_GOAL = 4.0, 5.0
EVALUATE_BAR, EVALUATE_GOAL = 2.2, 3.0
EPOCH_STEPS = 47  # RecTools' epoch has 48 steps of 128 histories; the first is its warm-up
TOP_K = 10


def measure_pair(rectools: Worker, ours: Worker, steps: int) -> dict[str, Any]:
    """One turn of each for training, then for evaluation, and the GEMM between them."""
    pair: dict[str, Any] = {"load_average": record.load_average()}
    pair["rectools_train"] = rectools.ask(do="train", steps=steps)
    pair["gemm"] = ours.ask(do="gemm")
    # Equal numbers of real tokens, to the step.
    pair["our_train"] = ours.ask(do="train", tokens=pair["rectools_train"]["tokens"])
    pair["rectools_recommend"] = rectools.ask(do="recommend", k=TOP_K)
    pair["our_evaluate"] = ours.ask(do="evaluate", k=TOP_K)
    for side, work, unit in (("rectools", "train", "tokens"), ("our", "train", "tokens"),
                             ("rectools", "recommend", "users"), ("our", "evaluate", "users")):  # fmt: skip
        answer = pair[f"{side}_{work}"]
        answer[f"{unit}_per_second"] = answer[unit] / answer["seconds"]
    pair["train_ratio"] = pair["our_train"]["tokens_per_second"] / pair["rectools_train"]["tokens_per_second"]
    pair["evaluate_ratio"] = (
        pair["our_evaluate"]["users_per_second"] / pair["rectools_recommend"]["users_per_second"]
    )
    return pair


def describe(index: int, pair: dict[str, Any]) -> str:
    """One line for the reader who watches."""
    return (
        f"pair {index}: train {pair['rectools_train']['tokens_per_second']:,.0f} -> "
        f"{pair['our_train']['tokens_per_second']:,.0f} tokens/s ({pair['train_ratio']:.2f}x, "
        f"{pair['our_train']['gflops']:.0f} of {pair['gemm']['jax']:.0f} GFLOP/s); evaluate "
        f"{pair['rectools_recommend']['users_per_second']:,.0f} -> "
        f"{pair['our_evaluate']['users_per_second']:,.0f} users/s ({pair['evaluate_ratio']:.2f}x); "
        f"load {pair['load_average'][0]}"
    )


def summarize(pairs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the pairs."""

    def median(*path: str) -> float:
        values = []
        for pair in pairs:
            value: Any = pair
            for name in path:
                value = value[name]
            values.append(float(value))
        return statistics.median(values)

    return {
        "rectools_train_tokens_per_second": median("rectools_train", "tokens_per_second"),
        "our_train_tokens_per_second": median("our_train", "tokens_per_second"),
        "train_ratio": median("train_ratio"),
        "rectools_recommend_users_per_second": median("rectools_recommend", "users_per_second"),
        "our_evaluate_users_per_second": median("our_evaluate", "users_per_second"),
        "evaluate_ratio": median("evaluate_ratio"),
        "our_train_gflops": median("our_train", "gflops"),
        "gemm_jax_gflops": median("gemm", "jax"),
        "gemm_numpy_gflops": median("gemm", "numpy"),
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_data = Path(os.environ.get("JAXREC_DATA") or record.SHARED_DATA) / "ml-1m-sasrec"
    parser.add_argument("--data", default=str(default_data), help="the ML-1M directory")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=EPOCH_STEPS, help="RecTools' measured steps a pair")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    """Starts both workers, measures the pairs, writes the result."""
    arguments = parse_arguments()
    shared = ["--data", arguments.data, "--seed", str(arguments.seed)]
    with start_rectools(shared) as rectools, start_ours(shared) as ours:
        rectools.ask(do="train", steps=1)  # RecTools' first fit builds the data set
        ours.ask(do="train", tokens=1)  # compiles
        ours.ask(do="evaluate", k=TOP_K)
        pairs = []
        for index in range(arguments.pairs):
            pairs.append(measure_pair(rectools, ours, arguments.steps))
            print(describe(index + 1, pairs[-1]), flush=True)
        settings = {"rectools": rectools.ready, "ours": ours.ready}
    summary = summarize(pairs)
    for name, value in summary.items():
        print(f"{name:38s} {value:12,.2f}")
    bars = [
        record.Bar(name="pairs", value=len(pairs), limit=5),
        record.Bar(
            name="training real tokens/s over RecTools'", value=summary["train_ratio"], limit=TRAIN_BAR
        ),
        record.Bar(
            name="evaluated users/s over RecTools' recommend",
            value=summary["evaluate_ratio"],
            limit=EVALUATE_BAR,
        ),
    ]
    goals = {"train_ratio": TRAIN_GOAL, "evaluate_ratio": EVALUATE_GOAL}
    figures = {"median": summary, "goals": goals, "settings": settings, "pairs": pairs}
    return record.finish("train_throughput", figures, bars)


if __name__ == "__main__":
    sys.exit(main())
