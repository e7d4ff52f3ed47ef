"""Advertising on the Open Bandit data: what a history and a context are, and one short run from end to end."""

import json

import pyarrow.parquet as pq
import pytest

from jaxrec import evaluate, train
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.open_bandit import OpenBandit

pytestmark = pytest.mark.shared_data


@pytest.fixture(scope="module")
def workdir(shared_data, repository, tmp_path_factory):
    """Two steps, evaluated."""
    path = tmp_path_factory.mktemp("advertising")
    status = train.main(
        [
            f"--config={repository}/configs/advertising.py",
            f"--workdir={path}",
            f"--config.data.source.directory={shared_data}/open-bandit",
            "--config.num_train_steps=2",
            "--config.evaluation.bootstrap_samples=100",
        ]
    )
    assert status == 0
    assert evaluate.main([f"--workdir={path}"]) == 0
    return path


def test_events_are_impressions_and_the_click_is_no_input(shared_data, workdir):
    table = next(OpenBandit(directory=f"{shared_data}/open-bandit").event_batches())
    assert "click" in table.schema.names
    dataset = PreparedDataset.open(workdir / "data")
    assert dataset.metadata.behaviours == ("click",)
    assert len(dataset.metadata.context) == 9
    assert "click" not in dataset.metadata.context
    assert dataset.metadata.num_items == 80
    statistics = json.loads((workdir / "data" / "statistics.json").read_text())
    assert statistics["behaviours"]["click"]["positive"] == 207
    assert statistics["metadata"]["num_events"] == 40_000
    cut = statistics["split"]["cut_times"]
    shown = pq.read_table(shared_data / "open-bandit" / "impressions.parquet", columns=["timestamp"])
    assert min(shown["timestamp"].to_pylist()) < cut[0] < cut[1] < max(shown["timestamp"].to_pylist())


def test_the_click_is_judged_beside_simple_models(workdir):
    values = json.loads((workdir / "evaluation.json").read_text())
    systems = values["behaviour_comparison"]["click"]
    assert set(systems) == {"model", "item_rate", "logistic_regression"}
    for found in systems.values():
        assert found["auc_interval"][0] < found["auc"] < found["auc_interval"][1]
        # Half a percent of the impressions are clicked: a calibrated model's loss is about that of the rate.
        assert found["log_loss"] == pytest.approx(0.035, abs=0.02)
        assert found["expected_calibration_error"] < 0.01
    assert values["behaviours"]["click"]["num_labels"] > 7000
    assert "beside simple models" in (workdir / "report.html").read_text()
