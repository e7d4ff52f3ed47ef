import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxrec.evaluation import slices


@hypothesis.given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 6))
def test_activity_slices_part_the_users_in_order(lengths, num_slices):
    lengths = np.array(lengths)
    parts = slices.activity_slices(lengths, num_slices)
    assert 1 <= len(parts) <= num_slices
    np.testing.assert_array_equal(np.sum([part.users for part in parts], axis=0), 1)
    for shorter, longer in itertools.pairwise(parts):
        assert lengths[shorter.users].max() < lengths[longer.users].min()


def test_activity_slices_are_quantiles():
    parts = slices.activity_slices(np.arange(1, 101), 4)
    assert [part.name for part in parts] == [
        "1 .. 25 events",
        "26 .. 50 events",
        "51 .. 75 events",
        "76 .. 100 events",
    ]
    assert [part.name for part in slices.activity_slices(np.array([3, 3, 3]))] == ["3 events"]
    assert slices.activity_slices(np.zeros(0, int)) == []
    with pytest.raises(ValueError, match="num_slices=0"):
        slices.activity_slices(np.array([1]), 0)


@hypothesis.given(st.lists(st.integers(0, 20), min_size=1, max_size=30), st.data())
def test_popularity_slices_part_the_users_and_cold_stands_apart(counts, data):
    item_counts = np.array([0, *counts])
    targets = np.array(data.draw(st.lists(st.integers(1, len(counts)), min_size=1, max_size=30)))
    parts = slices.popularity_slices(targets, item_counts)
    np.testing.assert_array_equal(np.sum([part.users for part in parts], axis=0), 1)
    cold = [part.users for part in parts if part.name.startswith("cold")]
    np.testing.assert_array_equal(cold[0] if cold else np.zeros(len(targets)), item_counts[targets] == 0)


def test_popularity_slices_hold_a_third_of_the_events_each():
    item_counts = np.array([0, 30, 10, 10, 10, 10, 5, 5, 5, 5, 0])
    parts = slices.popularity_slices(np.arange(1, 11), item_counts)
    assert [part.name for part in parts] == [
        "head (>= 30 events)", "middle (10 .. 29 events)", "tail (1 .. 9 events)", "cold (never in training)"
    ]  # fmt: skip
    assert [int(part.users.sum()) for part in parts] == [1, 4, 4, 1]


def test_means_of_slices():
    users = np.array([True, True, False])
    records = slices.slice_means({"hr@1": np.array([1.0, 0.0, 0.5])}, [slices.Slice("f", "n", users)])
    assert records == [{"family": "f", "name": "n", "num_users": 2, "hr@1": 0.5}]
