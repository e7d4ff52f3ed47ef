"""Does pre-training earn its keep? Within ML-1M from few labels, and from Amazon Beauty to Industrial by text alone.

    python benchmarks/quality/pretraining.py

(1) `configs/ml1m_pretrain.py`: pre-trained without the next items of nine tenths of the users and fine-tuned on the
others, against the same fine-tuning from scratch, and against as many steps from scratch as both stages have.
(2) `configs/text_transfer.py`: the model of Beauty on Industrial as it is, against random parameters and content-kNN
(its decay chosen on validation targets); beside it what learns on Industrial itself, by text alone too.
All comparisons are paired over users, each user's metric averaged over the seeds.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import suite
from suite import METRIC, Seed, Variant, record

from jaxrec.config import load_config
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.prepare import prepare
from jaxrec.evaluation.baselines import evaluate_baselines
from jaxrec.evaluation.baselines.content_knn import ContentKNN
from jaxrec.metrics.ranking import per_user_metrics

GAIN = 0.1
DECAYS = (0.5, 0.7, 0.8, 0.9, 1.0)
TARGET = "amazon18-industrial"
WITHIN = "configs/ml1m_pretrain.py"
TRANSFER = "configs/text_transfer.py"


def within(given: Namespace, figures: dict[str, Any]) -> list[record.Bar]:
    """Pre-trained against from scratch."""

    def run(kind: str) -> list[Seed]:
        name = "ml1m_pretrain" if kind == "get_config" else f"ml1m_{kind}"
        seeds = suite.run_variant(Variant(name=name, config=f"{WITHIN}:{kind}", data="ml-1m-sasrec"), given)
        figures[name] = suite.summary(seeds)
        return seeds

    pretrained, bars = run("get_config"), []
    for kind in ("scratch", "scratch_long"):
        comparison = suite.compare_variants(run(kind), pretrained)
        figures[f"pre-trained against {kind}"] = dataclasses.asdict(comparison)
        name = f"pre-trained against {kind}"
        bars.append(suite.paired_bar(name, comparison))
        gain = comparison.difference / comparison.mean_a
        bars.append(record.Bar(name=f"{name}: relative gain of {METRIC}", value=gain, limit=GAIN))
    return bars


def transfer(given: Namespace, figures: dict[str, Any]) -> list[record.Bar]:
    """The model of one shop on another."""

    def run(kind: str) -> list[Seed]:
        name = "text_transfer" if kind == "get_config" else f"text_{kind}"
        found = suite.run_variant(Variant(name=name, config=f"{TRANSFER}:{kind}"), given)
        figures[name] = suite.summary(found)
        return found

    moved, random, trained = (run(kind) for kind in ("get_config", "scratch", "trained"))
    content = [content_knn(given.data / TARGET)]
    figures["content_knn"] = {METRIC: float(suite.of_users(content).mean())} | content[0].figures
    bars = []
    for name, system in (("random", random), ("content-kNN", content)):
        comparison = suite.compare_variants(system, moved)
        figures[f"transfer against {name}"] = dataclasses.asdict(comparison)
        bars.append(suite.paired_bar(f"transfer against {name}", comparison))
    figures["transfer against trained"] = dataclasses.asdict(suite.compare_variants(trained, moved))
    return bars


def content_knn(path: Path) -> Seed:
    """The ranks of the test targets, by the decay that is best on the validation targets."""
    config = dataclasses.replace(load_config(f"{TRANSFER}:scratch").data, path=str(path))
    with tempfile.TemporaryDirectory() as directory:
        prepare(config, Path(directory) / "data")
        dataset = PreparedDataset.open(Path(directory) / "data")
        systems = {f"{decay}": ContentKNN(item_tokens=dataset.item_tokens, decay=decay) for decay in DECAYS}
        validation = evaluate_baselines(dataset, "validation", systems).ranks
        best = max(systems, key=lambda name: per_user_metrics(validation[name], (10,))[METRIC].mean())
        print(f"content-kNN: decay {best}")
        found = evaluate_baselines(dataset, "test", {best: systems[best]})
        return Seed({"decay": best}, found.ranks[best], dataset.user_keys[found.user_indices])


def main() -> int:
    """Trains what is missing, compares, checks."""
    parser = suite.argument_parser(__doc__)
    suite.add_trial_arguments(parser)
    given = parser.parse_args()
    os.environ["JAXREC_DATA"] = str(given.data.resolve())  # the stages name their own places in it
    figures: dict[str, Any] = {}
    bars = [*within(given, figures), *transfer(given, figures)]
    return record.finish("quality_pretraining", figures, bars, results=given.results)


if __name__ == "__main__":
    sys.exit(main())
