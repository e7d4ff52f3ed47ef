"""Popularity of the moment, against its definition: one count for every target."""

import dataclasses

import numpy as np
import pytest

from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.histories import UNKNOWN_TIME
from jaxrec.evaluation.baselines import WindowPopularity


@pytest.fixture
def by_time(make_small_dataset):
    """Users whose events are shuffled in time among each other, some at the same moment."""

    def make(filter_seen=True):
        small = make_small_dataset()
        histories = small.histories(np.arange(small.metadata.num_users))
        random = np.random.default_rng(3)
        times = np.concatenate([np.sort(random.integers(0, 400, n)) for n in small.lengths])
        return PreparedDataset.from_histories(
            dataclasses.replace(histories, timestamps=times),
            num_items=small.metadata.num_items,
            train_end=small.lengths // 2,
            validation_end=small.lengths * 2 // 3,
            filter_seen=filter_seen,
        )

    return make


@pytest.mark.parametrize("filter_seen", [True, False])
@pytest.mark.parametrize("every_event", [True, False])
def test_ranks_count_the_window_before_each_target(by_time, filter_seen, every_event):
    dataset = by_time(filter_seen)
    log = dataset.histories(np.arange(dataset.metadata.num_users))
    found = WindowPopularity(seconds=50).ranks(dataset, "test", every_event=every_event)
    expected = []
    for user in range(dataset.metadata.num_users):
        one = dataset.histories(np.array([user]))
        ends = range(int(dataset.validation_end[user]), int(dataset.lengths[user]))
        for end in ends if every_event else ends[:1]:
            if end == 0:
                continue
            moment, target = one.timestamps[end], one.item_ids[end]
            inside = (log.timestamps >= moment - 50) & (log.timestamps < moment)
            counts = np.bincount(log.item_ids[inside], minlength=dataset.metadata.num_items + 1)
            items = np.arange(len(counts))
            ahead = (counts > counts[target]) | ((counts == counts[target]) & (items < target))
            allowed = items > 0
            if filter_seen:
                allowed &= ~np.isin(items, one.item_ids[:end]) | (items == target)
            expected.append((user, target, np.sum(ahead & allowed)))
    assert len(expected) > 30
    np.testing.assert_array_equal(np.stack([found.user_indices, found.targets, found.ranks], 1), expected)


def test_the_window_needs_times_and_a_length(by_time):
    dataset = by_time()
    histories = dataset.histories(np.arange(dataset.metadata.num_users))
    histories.timestamps[5] = UNKNOWN_TIME
    unknown = PreparedDataset.from_histories(histories)
    with pytest.raises(ValueError, match="has events without a time"):
        WindowPopularity().ranks(unknown, "test")
    with pytest.raises(ValueError, match="seconds=0 must be at least 1"):
        WindowPopularity(seconds=0)
