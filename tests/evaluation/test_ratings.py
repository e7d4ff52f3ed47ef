"""Errors of predicted values: by hand, and beside means that know the user and the item."""

import numpy as np
import pytest

from jaxrec.data.dataset import Histories, PreparedDataset
from jaxrec.evaluation.ratings import mean_predictions, value_metrics
from jaxrec.evaluation.user_ranking import ValuePredictions

LENGTHS = np.array([5, 4, 6])


@pytest.fixture
def dataset():
    size = LENGTHS.sum()
    values = np.array([5, 4, 5, 5, 4, 1, 2, np.nan, 1, 3, 3, 4, 3, 2, 3], np.float32)
    items = np.array([1, 2, 3, 4, 5, 1, 2, 3, 4, 1, 2, 3, 4, 5, 6], np.int32)
    histories = Histories(
        np.concatenate([[0], np.cumsum(LENGTHS)]),
        items,
        np.arange(size),
        np.zeros((size, 0), np.int8),
        values,
    )
    return PreparedDataset.from_histories(histories)


def of_test(dataset, predicted):
    last = np.cumsum(LENGTHS) - 1
    histories = dataset.histories(np.arange(3))
    return ValuePredictions(
        user_indices=np.arange(3), targets=histories.item_ids[last], predicted=np.asarray(predicted, np.float32),
        values=histories.values[last],
    )  # fmt: skip


def test_errors_by_hand(dataset):
    found = value_metrics(dataset, of_test(dataset, [4, 2, 1]), "test")["value"]
    assert found["num_values"] == 3
    assert found["rmse"]["model"] == pytest.approx(np.sqrt((0 + 1 + 4) / 3))
    assert found["mae"]["model"] == pytest.approx(1.0)
    low, high = found["difference"]["interval"]
    assert low <= found["difference"]["mean"] <= high


def test_means_see_what_is_before_the_split_alone(dataset):
    predicted = of_test(dataset, [0, 0, 0])
    before = np.array([5, 4, 5, 5, 1, 2, 3, 3, 4, 3, 2])  # NaN is no value
    means = mean_predictions(dataset, predicted, "test")
    np.testing.assert_allclose(means["mean"], before.mean())
    assert means["user_item_means"][0] > means["user_item_means"][2] > means["user_item_means"][1]
    single = (2 - before.mean()) / (1 + 10.0)
    items = {1: [5, 1, 3], 2: [4, 2, 3], 3: [5, 4], 4: [5, 3], 5: [2]}
    deviation = {
        item: (np.array(values) - before.mean()).sum() / (len(values) + 10.0)
        for item, values in items.items()
    }
    own = sum(
        value - before.mean() - deviation[item]
        for item, value in zip([1, 2, 3, 4], [5, 4, 5, 5], strict=True)
    )
    assert means["user_item_means"][0] == pytest.approx(before.mean() + single + own / (4 + 5.0))


def test_without_known_values_there_is_nothing_to_say(dataset):
    predicted = of_test(dataset, [4, 2, 1])
    object.__setattr__(predicted, "values", np.full(3, np.nan, np.float32))
    assert value_metrics(dataset, predicted, "test") == {}
