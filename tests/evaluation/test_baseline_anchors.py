"""The published floors of the SASRec-order ML-1M: whoever reproduces them ranks as the papers do."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxrec.data.dataset import UNKNOWN_TIME, Histories, PreparedDataset
from jaxrec.evaluation.baselines import EASE, Popularity, Transition, evaluate_baselines
from jaxrec.metrics.ranking import mean_metrics

pytestmark = pytest.mark.shared_data


@pytest.fixture(scope="module")
def ml1m(shared_data):
    events = pq.read_table(shared_data / "ml-1m-sasrec" / "events.parquet")
    events = events.sort_by([("user_id", "ascending"), ("order", "ascending")])
    users, items = events["user_id"].to_numpy(), events["item_id"].to_numpy()
    lengths = np.unique(users, return_counts=True)[1]
    keys, item_index = np.unique(items, return_inverse=True)
    age = np.repeat(np.cumsum(lengths), lengths) - 1 - np.arange(len(items))
    counts = np.bincount(item_index[age >= 2], minlength=len(keys))
    item_ids = np.empty(len(keys), np.int32)
    item_ids[np.lexsort((keys, -counts))] = np.arange(1, len(keys) + 1)  # by falling training count
    histories = Histories(
        np.concatenate([[0], np.cumsum(lengths)]),
        item_ids[item_index],
        np.full(len(items), UNKNOWN_TIME),
        np.zeros((len(items), 0), np.int8),
    )
    return PreparedDataset.from_histories(histories, num_items=len(keys), name="ml-1m-sasrec")


def test_counts_reproduce_their_floors_from_the_training_part(ml1m):
    chosen = {"popularity": Popularity(), "transition": Transition()}
    results = evaluate_baselines(ml1m, "test", chosen)
    floors = {"popularity": (0.0363, 0.0178), "transition": (0.2735, 0.1597)}
    for name, (hit_rate, ndcg) in floors.items():
        metrics = mean_metrics(results.ranks[name], (10,))
        assert metrics["hr@10"] == pytest.approx(hit_rate, abs=0.002), name
        assert metrics["ndcg@10"] == pytest.approx(ndcg, abs=0.002), name


def test_ease_reproduces_its_floor_to_the_last_digit_with_the_validation_events(ml1m):
    results = evaluate_baselines(ml1m, "test", {"ease": EASE(regularization=500.0)}, fit_with_validation=True)
    metrics = mean_metrics(results.ranks["ease"], (10,))
    assert metrics["hr@10"] == pytest.approx(0.1099, abs=0.0001)
    assert metrics["ndcg@10"] == pytest.approx(0.0544, abs=0.0001)
