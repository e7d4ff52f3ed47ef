"""What the program for noise makes of its runs: validation chooses, and the loss is counted the strict way."""

import json
import math

import numpy as np
import pytest

from jaxrec.config import apply_overrides, load_config


def seed_of(suite, test, validation, hits):
    """Two hundred users, the first `hits` of whom find their target first."""
    figures = {
        "metrics": {"hr@10": test, "ndcg@10": test}, "validation": validation, "train_minutes": 1.0,
        "sittings": [{"processor_seconds": 9.0}], "baselines": {},
        "command": "", "commit": "",
    }  # fmt: skip
    return suite.Seed(figures, np.where(np.arange(200) < hits, 0, 50), np.arange(200))


# By setup: test and validation under noise, test without.
RUNS = {
    "plain": (0.10, 0.30, 0.20),
    "smoothing_0.1": (0.19, 0.31, 0.20),  # the best of the test, which must not choose
    "power_0.2": (0.16, 0.35, 0.20),
    "power_0.4": (0.12, 0.20, 0.20),
}


@pytest.mark.parametrize(("robust_clean", "status"), [(0.15, 0), (0.20, 0), (0.22, 1)])
def test_validation_chooses_and_the_better_clean_result_counts(
    module, monkeypatch, tmp_path, capsys, robust_clean, status
):
    suite, program = module("suite"), module("noise")
    asked = []

    def run(variant, given):
        asked.append(variant.name)
        kind, _, name = variant.name.removeprefix("noise_").partition("-")
        test, validation, clean = RUNS[name]
        clean = robust_clean if name == "power_0.2" else clean
        return [
            seed_of(suite, test if kind == "noisy" else clean, validation, int(1000 * test))
            for _ in range(given.seeds)
        ]

    monkeypatch.setattr(suite, "run_variant", run)
    monkeypatch.setattr("sys.argv", ["noise.py", f"--results={tmp_path}"])
    assert program.main() == status
    assert capsys.readouterr().out.splitlines()[-1] == f"quality_noise: {('PASS', 'FAIL')[status]}"
    figures = json.loads((tmp_path / "quality_noise.json").read_text())["figures"]
    assert figures["robust"] == "power_0.2"
    assert figures["lost_share"] == pytest.approx((max(0.20, robust_clean) - 0.16) / 0.10)
    assert set(figures["noisy"]) == set(RUNS)
    assert len(asked) == 6 and sum("clean" in name for name in asked) == 2


def test_noise_that_costs_nothing_shows_nothing(module):
    program = module("noise")
    assert math.isnan(program.lost_share({"plain": 0.1, "r": 0.1}, {"plain": 0.1, "r": 0.2}, "r"))


def test_the_setups_are_settings_of_the_config(module, monkeypatch, repository):
    monkeypatch.chdir(repository)
    program = module("noise")
    assert load_config("configs/noisy.py").data.noisy_events.share == 0.2
    for overrides in program.SETUPS.values():
        for name in ("configs/noisy.py", "configs/noisy.py:clean"):
            trust = apply_overrides(load_config(name), [f"--config.{text}" for text in overrides]).tasks[
                "next_item"
            ].candidates.trust  # fmt: skip
            assert (trust.power or trust.smoothing) == (
                float(overrides[0].split("=")[1]) if overrides else 0.0
            )
