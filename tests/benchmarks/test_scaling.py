"""The program that asks how quality follows size: its fit, its means, and its loss against a loss by hand."""

import numpy as np
import pytest


def test_a_power_law_is_found_again(module):
    x = [1e4, 3e4, 1e5, 1e6]
    fit = module("scaling").power_law(x, [6.0 + 1.5 * (one / 1e4) ** -0.3 for one in x])
    assert (fit["a"], fit["b"], fit["c"]) == pytest.approx((6.0, 1.5, 0.3), rel=1e-2)
    assert fit["explained"] == pytest.approx(1.0, abs=1e-6)


def test_series_take_the_mean_over_the_seeds(module, tmp_path):
    scaling = module("scaling")
    seed = lambda loss, ndcg: scaling.Seed(  # noqa: E731
        {scaling.LOSS: loss, "metrics": {scaling.METRIC: ndcg}}, np.zeros(0, np.int64)
    )
    points = {10.0 * 2**i: [seed(7 - 0.2 * i, 0.1 * i), seed(7.2 - 0.2 * i, 0.3 * i)] for i in range(4)}
    found = scaling.series(points)
    assert found[scaling.LOSS] == pytest.approx([7.1, 6.9, 6.7, 6.5])
    assert found[scaling.METRIC] == pytest.approx([0.0, 0.2, 0.4, 0.6])
    scaling.draw("users", "users", found, tmp_path)
    assert "fitted" in (tmp_path / "quality_scaling_users.svg").read_text()
