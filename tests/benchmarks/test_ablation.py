"""The ablation: every variant is a config that differs from the base where its name says."""

import numpy as np
import pytest

from jaxrec.config import apply_overrides, load_config, to_json


def test_variants_are_configs_that_differ(module, repository):
    ablation = module("ablation")
    base = load_config(str(repository / "configs" / "ml1m_sasrec.py"))
    found = {
        name: to_json(apply_overrides(base, [f"--config.{text}" for text in (*ablation.BASE, *changes)]))
        for name, changes in ablation.VARIANTS.items()
    }
    assert len(set(found.values())) == len(found)


def test_a_row_says_what_a_variant_gives_more(module):
    ablation, random = module("ablation"), np.random.default_rng(0)

    def seed(ranks, validation):
        metrics = {"hr@10": 0.3, "ndcg@10": 0.2}
        figures = {"metrics": metrics, "validation": validation, "baselines": {}, "command": "", "commit": ""}
        figures |= {"train_minutes": 1.0, "sittings": [{"processor_seconds": 60.0}]}
        return ablation.Seed(figures, ranks)

    ranks = random.integers(5, 30, 400)
    found = ablation.row([seed(np.maximum(ranks - 5, 0), 0.25)], [seed(ranks, 0.2)])
    assert found["validation_gain"] == pytest.approx(0.05)
    low, high = found["interval"]
    assert 0 < low < found["difference"] < high
