"""Two live table workers that take turns: medians of either, and of the pairs' ratios."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import record
from worker_process import Worker

Kind = TypeVar("Kind")


def run(
    comparisons: Mapping[str, tuple[Kind, Kind]], start: Callable[[Kind], Worker], pairs: int, steps: int
) -> dict[str, dict[str, Any]]:
    """Makes every comparison and prints a line for each; `ratio` is the second's milliseconds over the first's."""
    found = {}
    for name, (first, second) in comparisons.items():
        with start(first) as one, start(second) as other:
            result = found[name] = compare(one, other, pairs, steps)
        print(
            f"{name}: {result['first']['milliseconds']:.3g} and {result['second']['milliseconds']:.3g} ms, "
            f"ratio {result['ratio']:.2f}, load {result['load_average'][0]}",
            flush=True,
        )
    return found


def compare(first: Worker, second: Worker, pairs: int, steps: int) -> dict[str, Any]:
    """One comparison of `pairs` turns of `steps` steps each."""
    for worker in (first, second):
        worker.ask(count=2)  # the first step touches memory for the first time
    answers = [(first.ask(count=steps), second.ask(count=steps)) for _ in range(pairs)]
    medians = [[statistics.median(side["milliseconds"]) for side in pair] for pair in answers]
    sides = zip((first, second), answers[-1], zip(*medians, strict=True), strict=True)
    one, other = (
        worker.ready | {"milliseconds": statistics.median(times), "peak_bytes": last["peak_bytes"]}
        for worker, last, times in sides
    )
    return {
        "first": one,
        "second": other,
        "pairs": medians,
        "ratio": statistics.median(m[1] / m[0] for m in medians),
        "load_average": record.load_average(),
    }


def sides(found: Mapping[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every side of every comparison."""
    for result in found.values():
        yield from (result["first"], result["second"])
