"""How do quality and loss follow the parameters and the data? ML-1M, widths and shares of the users.

    python benchmarks/quality/scaling.py

`configs/ml1m_sasrec.py` with histories of 100 events and 1,000 steps, at four widths on all users, and at one width on
four shares of the users. All users are evaluated. The loss is the cross-entropy of the test target over the catalogue,
in nats; to both series a power law `a + b x^-c` is fitted. Two plots lie beside the figures.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy.optimize
import suite
from suite import METRIC, Seed, Variant, plots, record

from jaxrec.evaluation.user_ranking import evaluation_rows
from jaxrec.runs import load_run

WIDTHS = (16, 32, 64, 128)
SHARES = (0.125, 0.25, 0.5, 1.0)
WIDTH_OF_SHARES = 64
LOSS, PARAMETERS = "test_loss", "num_parameters"


def variant(width: int, share: float) -> Variant:
    """The run of one point."""
    return Variant(
        name=f"scaling-width-{width}-users-{share:g}",
        config="configs/ml1m_sasrec.py",
        overrides=(
            f"model.encoder.embed_dim={width}",
            f"model.encoder.mlp_dim={2 * width}",
            "model.encoder.max_positions=100",
            f"model.item_dim={width}",
            f"data.train_users={share}",
            "data.history_length=100",
            "num_train_steps=1000",
            "evaluation.every_steps=250",
            "checkpoint_every_steps=250",
        ),
        data="ml-1m-sasrec",
    )


def measure(workdir: Path) -> dict[str, Any]:
    """Cross-entropy of the test targets over the whole catalogue, and the model's parameters, tables included."""
    run = load_run(workdir)
    with jax.set_mesh(run.mesh):
        vectors, bias = (np.asarray(array, np.float64) for array in run.catalogue())
        assert run.mesh.size == 1, "on one device physical rows are item ids"
        last = run.dataset.metadata.num_items + 1
        rows = evaluation_rows(run, "test", rows_per_batch=64)
        losses: list[np.ndarray] = []
        for index in range(rows.num_batches):
            batch = rows.build(index)
            queries = np.asarray(run.query_fn(batch)[0], np.float64)[batch.user_mask]
            logits = queries @ vectors[1:last].T + bias[1:last]
            targets = np.asarray(batch.targets)[batch.user_mask]
            losses.append(
                scipy.special.logsumexp(logits, axis=1) - logits[np.arange(len(targets)), targets - 1]
            )
    tables = sum(spec.num_rows * spec.dim for spec in run.setup.tables.values())
    dense = sum(leaf.size for leaf in jax.tree.leaves(run.setup.step.abstract))
    return {LOSS: float(np.concatenate(losses).mean()), PARAMETERS: int(tables + dense)}


def power_law(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Least-squares `a + b (x / x[0])^-c` with a, b, c >= 0, and the share of variance that it explains."""

    def curve(x: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
        return a + b * x**-c

    at, values = np.asarray(x) / x[0], np.asarray(y)
    start = (values.min(), max(float(np.ptp(values)), 1e-3), 0.5)
    (a, b, c), _ = scipy.optimize.curve_fit(curve, at, values, start, bounds=(0, np.inf), maxfev=20_000)
    rest = float(
        np.sum((values - curve(at, a, b, c)) ** 2) / max(np.sum((values - values.mean()) ** 2), 1e-12)
    )
    return {"a": float(a), "b": float(b), "c": float(c), "x0": float(x[0]), "explained": 1.0 - rest}


def series(points: Mapping[float, Sequence[Seed]]) -> dict[str, Any]:
    """Means over the seeds along x, and the fit of the losses."""
    xs = list(points)
    losses = [statistics.mean(seed.figures[LOSS] for seed in seeds) for seeds in points.values()]
    quality = [statistics.mean(seed.metrics[METRIC] for seed in seeds) for seeds in points.values()]
    return {"x": xs, LOSS: losses, METRIC: quality, "fit": power_law(xs, losses)}


def draw(name: str, label: str, found: Mapping[str, Any], results: Path) -> None:
    """The losses with their curve, as SVG beside the figures."""
    fit, xs = found["fit"], found["x"]
    line = np.geomspace(xs[0], xs[-1], 50)
    curve = fit["a"] + fit["b"] * (line / fit["x0"]) ** -fit["c"]
    plots.draw_fit(
        results / f"quality_scaling_{name}.svg",
        f"Test loss, {fit['a']:.3f} + {fit['b']:.3f} (x / {fit['x0']:,.0f})^-{fit['c']:.2f}",
        points=list(zip(xs, found[LOSS], strict=True)),
        curve=list(zip(line, curve, strict=True)),
        xscale="log",
        xlabel=label,
        ylabel="nats",
    )


def main() -> int:
    """Trains what is missing, fits, draws."""
    parser = suite.argument_parser(__doc__)
    suite.add_trial_arguments(parser)
    given = parser.parse_args()

    def run(width: int, share: float) -> list[Seed]:
        return suite.run_variant(variant(width, share), given, measure=measure)

    by_width = {width: run(width, 1.0) for width in WIDTHS}
    by_share = {share: run(WIDTH_OF_SHARES, share) for share in SHARES}
    figures = {
        "parameters": series({float(seeds[0].figures[PARAMETERS]): seeds for seeds in by_width.values()}),
        "users": series({share * len(seeds[0].ranks): seeds for share, seeds in by_share.items()}),
    }
    bars = []
    for name, label in (("parameters", "parameters, tables included"), ("users", "users trained on")):
        draw(name, label, figures[name], given.results)
        losses, quality = figures[name][LOSS], figures[name][METRIC]
        print(f"{name}: {METRIC} " + ", ".join(f"{value:.4f}" for value in quality))
        bars.append(record.Bar(name=f"{name}: points", value=len(losses), limit=4))
        bars.append(
            record.Bar(name=f"{name}: variance explained", value=figures[name]["fit"]["explained"], limit=0.9)
        )
    return record.finish("quality_scaling", figures, bars, results=given.results)


if __name__ == "__main__":
    sys.exit(main())
