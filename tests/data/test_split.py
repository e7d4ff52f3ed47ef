"""Splits: the cut points of both kinds, and exact quantiles of a stream."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrec.data.config import GlobalTime, LeaveOneOut
from jaxrec.data.split import global_time_cuts, leave_one_out_cuts, streaming_quantiles

INT64 = st.integers(-(2**63), 2**63 - 1)


def test_leave_one_out_takes_the_last_two_events_of_those_who_have_three():
    train_end, validation_end = leave_one_out_cuts(np.array([0, 1, 2, 3, 10]))
    assert train_end.tolist() == [0, 1, 2, 1, 8]
    assert validation_end.tolist() == [0, 1, 2, 2, 9]
    train_end, _ = leave_one_out_cuts(np.array([4, 5]), min_events=5)
    assert train_end.tolist() == [4, 3]
    train_end, validation_end = leave_one_out_cuts(np.array([2, 3, 10]), validation=False)
    assert train_end.tolist() == validation_end.tolist() == [2, 2, 9]


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=5),
    st.integers(0, 9),
    st.integers(0, 9),
)
def test_global_time_keeps_the_future_out_of_the_past(histories, first, second):
    offsets = np.append(0, np.cumsum([len(one) for one in histories]))
    seconds = np.array([time for one in histories for time in one], np.int64)
    low, high = sorted((first, second))
    train_end, validation_end = global_time_cuts(offsets, seconds, low, high)
    for times, train, validation in zip(histories, train_end, validation_end, strict=True):
        assert 0 <= train <= validation <= len(times)
        assert all(time < low for time in times[:train])
        assert all(time < high for time in times[:validation])
        assert train == len(times) or times[train] >= low
        assert validation == len(times) or times[validation] >= high


@given(
    st.lists(
        hnp.arrays(np.int64, st.integers(0, 20), elements=INT64 | st.integers(0, 3)), min_size=1, max_size=4
    ),
    st.floats(0.001, 0.999),
)
def test_streaming_quantiles_equal_those_of_the_sorted_values(chunks, quantile):
    values = np.sort(np.concatenate(chunks))
    if not len(values):
        with pytest.raises(ValueError, match="no timestamps"):
            streaming_quantiles(lambda: chunks, (quantile,))
        return
    found = streaming_quantiles(lambda: chunks, (quantile, 0.5))
    assert found == (int(values[int(quantile * len(values))]), int(values[int(0.5 * len(values))]))


def test_split_settings_are_checked():
    with pytest.raises(ValueError, match="min_events=2"):
        LeaveOneOut(min_events=2)
    with pytest.raises(ValueError, match="0 < validation_quantile < test_quantile < 1"):
        GlobalTime(validation_quantile=0.9, test_quantile=0.8)
