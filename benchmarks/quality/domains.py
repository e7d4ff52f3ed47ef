"""Three shops trained together against each of them alone: Amazon Beauty, Sports and Industrial.

    python benchmarks/quality/domains.py

The joint model (`configs/amazon_domains.py`) has one encoder, one table and an adapter for each shop; beside it stands
the same one without adapters. A shop alone has the model without adapters, and about as many steps as the mixing of the
joint run gives it. Every user is ranked against the items of the own shop in all of them, so that the ranks can be
compared in pairs, shop by shop, each user's metric averaged over the seeds. Which of them is better is the question and
no promise: the only bar is that every shop has been compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import suite
from suite import METRIC, Seed, Variant, record

from jaxrec.data.domain_keys import SEPARATOR
from jaxrec.metrics.ranking import per_user_metrics

CONFIG = "configs/amazon_domains.py"
SHOPS = ("beauty", "sports", "industrial")
JOINT, SHARED = "joint", "joint without adapters"


def users_of(seeds: Sequence[Seed], shop: str) -> list[Seed]:
    """The users of a shop by their keys there, ascending as texts; of a run of one shop all."""
    found = []
    for seed in seeds:
        keys = np.array([str(user) for user in seed.users])
        named = np.char.startswith(keys, f"{shop}{SEPARATOR}")
        if named.any():
            keys, ranks = np.char.partition(keys[named], SEPARATOR)[:, 2], seed.ranks[named]
        else:
            ranks = seed.ranks
        order = np.argsort(keys)
        found.append(dataclasses.replace(seed, users=keys[order], ranks=ranks[order]))
    return found


def shop_figures(seeds: Sequence[Seed]) -> dict[str, list[float]]:
    """The metrics of each seed over these users."""
    each = [per_user_metrics(seed.ranks, (10,)) for seed in seeds]
    return {name: [float(metrics[name].mean()) for metrics in each] for name in suite.SHOWN}


def report(joint: dict[str, Sequence[Seed]], alone: Sequence[Seed], shop: str) -> dict[str, Any]:
    """A shop by itself against each joint model.

    Raises:
      ValueError: the models were asked about other users.
    """
    by_itself = users_of(alone, shop)
    figures: dict[str, Any] = {"users": len(by_itself[0].users), "alone": shop_figures(by_itself)}
    for name, seeds in joint.items():
        own = users_of(seeds, shop)
        if not all(np.array_equal(seed.users, by_itself[0].users) for seed in (*own, *by_itself)):
            raise ValueError(f"{shop}: {name!r} and 'alone' ranked other users; run both on the same data.")
        comparison = suite.compare_variants(by_itself, own)
        print(
            f"{shop}: {name} against alone: {comparison.difference:+.4f} "
            f"[{comparison.low:+.4f}, {comparison.high:+.4f}], p = {comparison.p_value:.4f}"
        )
        figures[name] = shop_figures(own) | {"against_alone": dataclasses.asdict(comparison)}
    return figures


def run(name: str, variant: str, given: argparse.Namespace) -> list[Seed]:
    """Every seed of a variant of the config."""
    return suite.run_variant(Variant(name=f"domains-{name}", config=f"{CONFIG}:{variant}"), given)


def main() -> int:
    """Trains what is missing, compares."""
    parser = suite.argument_parser(__doc__)
    suite.add_trial_arguments(parser)
    given = parser.parse_args()
    os.environ["JAXREC_DATA"] = str(given.data.resolve())  # the config names three places in it
    joint: dict[str, Sequence[Seed]] = {
        JOINT: run("joint", "get_config", given),
        SHARED: run("without_adapters", "without_adapters", given),
    }
    figures: dict[str, Any] = {}
    for shop in SHOPS:
        alone = run(shop, shop, given)
        figures[shop] = report(joint, alone, shop)
    figures["summaries"] = {name: suite.summary(seeds) for name, seeds in joint.items()}
    bar = record.Bar(
        name=f"shops compared in {METRIC}", value=sum(shop in figures for shop in SHOPS), limit=len(SHOPS)
    )
    return record.finish("quality_domains", figures, [bar], results=given.results)


if __name__ == "__main__":
    sys.exit(main())
