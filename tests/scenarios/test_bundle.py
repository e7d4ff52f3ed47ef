"""Slates on the embedded MovieLens: one short run from end to end, with sets that keep their limits."""

import json
from collections import Counter

import pyarrow.parquet as pq
import pytest

from jaxrec import evaluate, recommend, train
from jaxrec.data.dataset import PreparedDataset


@pytest.fixture(scope="module")
def workdir(repository, tmp_path_factory):
    """Two steps of a model as small as can be, evaluated."""
    path = tmp_path_factory.mktemp("bundle")
    sizes = {"embed_dim": 8, "num_layers": 1, "num_heads": 1, "mlp_dim": 8, "max_positions": 16}
    status = train.main(
        [
            f"--config={repository}/configs/bundle.py",
            f"--workdir={path}",
            "--config.num_train_steps=2",
            "--config.data.history_length=16",
            "--config.model.item_dim=8",
            "--config.model.memory=none",
            "--config.evaluation.baselines=popularity",
            "--config.evaluation.bootstrap_samples=100",
            *(f"--config.model.encoder.{name}={value}" for name, value in sizes.items()),
        ]
    )
    assert status == 0
    assert evaluate.main([f"--workdir={path}"]) == 0
    return path


def test_the_evaluation_shows_what_diversity_costs(workdir):
    slates = json.loads((workdir / "evaluation.json").read_text())["slates"]
    assert set(slates) == {"best", "two_a_genre"} | {
        f"{name}_{weight}" for name in ("volume", "genres") for weight in ("0.03", "0.1", "0.3", "1")
    }
    best = slates["best"]
    for name, values in slates.items():
        assert values["expected_relevance"] <= best["expected_relevance"] + 1e-9, name
    assert slates["volume_1"]["vector_diversity"] > best["vector_diversity"]
    assert slates["genres_1"]["num_categories"] > best["num_categories"]
    assert "What diversity costs" in (workdir / "report.html").read_text()


def test_recommended_sets_keep_their_limit(workdir):
    out = workdir / "slates.parquet"
    assert recommend.main([f"--workdir={workdir}", "--slate=two_a_genre", f"--out={out}"]) == 0
    dataset = PreparedDataset.open(workdir / "data")
    genres = dict(zip(dataset.item_keys.tolist(), dataset.item_categories, strict=True))
    rows = pq.read_table(out).to_pylist()
    counts = Counter((row["user_id"], genre) for row in rows for genre in genres[row["item_id"]])
    assert max(counts.values()) == 2
    assert max(row["rank"] for row in rows) > 5
