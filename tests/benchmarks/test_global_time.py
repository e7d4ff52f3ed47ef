"""What the program for splits by time makes of ranks: the worst seed decides, and validation chooses the window."""

import json

import numpy as np
import pytest

from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.histories import Histories
from jaxrec.evaluation.baselines import WindowPopularity


@pytest.fixture(scope="module")
def dataset():
    """Thirty users of ten events each, an hour apart; what is taken changes from day to day."""
    random, count = np.random.default_rng(0), 300
    times = np.sort(random.integers(0, 100 * 3600, (30, 10)), axis=1).ravel()
    items = 1 + (times // (24 * 3600)) * 5 + random.integers(0, 5, count)
    return PreparedDataset.from_histories(
        Histories(np.arange(0, count + 1, 10), items.astype(np.int32), times, np.zeros((count, 0), np.int8)),
        num_items=40,
        train_end=np.full(30, 4),
        validation_end=np.full(30, 7),
        filter_seen=False,
    )


def seed_of(suite, users, ranks, low):
    paired = {"difference": 0.1, "interval": [low, 0.2], "p_value": 0.01}
    names = ("recent_popularity", "item_knn", "transition")
    figures = {
        "metrics": {"hr@10": 0.1, "ndcg@10": 0.1}, "train_minutes": 1.0,
        "sittings": [{"processor_seconds": 9.0}], "command": "", "commit": "",
        "baselines": {name: {"ndcg@10": 0.01 * len(name)} for name in names},
        "paired": {name: {"ndcg@10": paired} for name in names},
    }  # fmt: skip
    return suite.Seed(figures, ranks, users)


@pytest.mark.parametrize(("low", "status"), [(0.05, 0), (-0.01, 1)])
def test_the_worst_seed_decides(module, dataset, monkeypatch, tmp_path, capsys, low, status):
    suite, program = module("suite"), module("global_time")
    ranks = WindowPopularity(seconds=3600).ranks(dataset, "test", every_event=True)
    users = dataset.user_keys[ranks.user_indices]
    seeds = [seed_of(suite, users, np.zeros(len(users), np.int64), edge) for edge in (0.08, low)]
    monkeypatch.setattr(suite, "run_variant", lambda variant, given: seeds[: given.seeds])
    monkeypatch.setattr(suite, "prepared", lambda *arguments: dataset)
    monkeypatch.setattr("sys.argv", ["global_time.py", "rsc15", f"--results={tmp_path}"])
    assert program.main() == status
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"quality_global_time_rsc15: {('PASS', 'FAIL')[status]}"
    document = json.loads((tmp_path / "quality_global_time_rsc15.json").read_text())
    assert [bar["met"] for bar in document["bars"]] == [not status, not status, True]
    figures = document["figures"]["rsc15"]
    assert (figures["targets"], figures["users"]) == (len(users), 30)
    assert figures["strongest_baseline"]["name"] == "recent_popularity"
    assert {line["interval"][0] for line in figures["against"]["item_knn"]} == {0.08, low}


def test_the_window_is_chosen_on_validation(module, dataset):
    found, chosen = module("global_time").window_popularity(dataset)
    best = max(chosen["validation"], key=chosen["validation"].get)
    assert best == f"{chosen['hours']:g} h"
    again = WindowPopularity(seconds=round(chosen["hours"] * 3600)).ranks(dataset, "test", every_event=True)
    np.testing.assert_array_equal(found.ranks, again.ranks)


def test_other_targets_are_not_compared(module, dataset):
    suite, program = module("suite"), module("global_time")
    ranks = WindowPopularity().ranks(dataset, "test", every_event=True)
    other = seed_of(suite, np.arange(3), np.zeros(3), 0.1)
    with pytest.raises(AssertionError, match="x: model and popularity ranked other targets"):
        program.report("x", [other], ranks, dataset)
