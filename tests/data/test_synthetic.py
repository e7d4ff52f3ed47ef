"""Synthetic events keep their promises: sizes, order, and the same at every call."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.data.synthetic import SyntheticEvents


def columns(source):
    table = pa.Table.from_batches(source.event_batches())
    return [table[name].to_numpy() for name in ("user_id", "item_id", "timestamp")]


@given(
    num_items=st.integers(1, 50),
    num_users=st.integers(1, 80),
    events=st.floats(3, 9),
    follow=st.floats(0, 1),
    zipf=st.sampled_from([0.7, 1.0, 1.3]),
)
@settings(max_examples=25)
def test_sizes_hold(num_items, num_users, events, follow, zipf):
    source = SyntheticEvents(
        num_items=num_items, num_users=num_users, events_per_user=events, follow_rate=follow, zipf=zipf
    )
    users, items, times = columns(source)
    np.testing.assert_array_equal(np.unique(users), np.arange(1, num_users + 1))
    assert items.min() >= 1 and items.max() <= num_items
    assert np.unique(users, return_counts=True)[1].min() >= 3
    if num_users >= num_items:
        assert len(np.unique(items)) == num_items
    same_user = users[1:] == users[:-1]
    assert (np.diff(users) >= 0).all() and (np.diff(times)[same_user] > 0).all()
    for one, other in zip((users, items, times), columns(source), strict=True):
        np.testing.assert_array_equal(one, other)


def test_half_of_the_events_follow_from_the_one_before():
    users, items, _ = columns(SyntheticEvents(num_items=5000, num_users=3000, events_per_user=8))
    after = (users[1:] == users[:-1]).nonzero()[0]
    successors = (items[after][:, None] * 48_271 + np.arange(4) * 7919) % 5000 + 1
    share = (items[after + 1][:, None] == successors).any(1).mean()
    assert 0.47 < share < 0.53


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_items": 0}, "num_items=0 must be at least 1"),
        ({"events_per_user": 2.0}, "events_per_user=2.0 must be at least min_events=3"),
        ({"follow_rate": 1.5}, r"follow_rate=1.5 must lie in \[0, 1\]"),
    ],
)
def test_bad_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SyntheticEvents(**changes)
