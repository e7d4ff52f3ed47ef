"""Packing loses nothing, doubles nothing, and fills the rows."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.data.packing import new_windows, pack, training_windows

ROW_LENGTH = 12
lengths_of_windows = st.lists(st.integers(0, ROW_LENGTH), max_size=60).map(lambda x: np.array(x, np.int64))


def occupied(plan, lengths):
    """How many windows cover each cell of the plan."""
    cover = np.zeros((plan.num_rows, plan.row_length), int)
    for row, segment, column in zip(plan.row_index, plan.segments, plan.columns, strict=True):
        assert column + lengths[segment] <= plan.row_length
        cover[row, column : column + lengths[segment]] += 1
    return cover


@given(lengths=lengths_of_windows, seed=st.integers(-5, 2**70), max_segments=st.none() | st.integers(1, 5))
def test_every_window_lies_once_in_one_row(lengths, seed, max_segments):
    plan = pack(lengths, ROW_LENGTH, seed, max_segments=max_segments)

    assert sorted(plan.segments) == [index for index, length in enumerate(lengths) if length]
    cover = occupied(plan, lengths)
    assert cover.max(initial=0) <= 1
    assert cover.sum() == sum(lengths) == plan.num_events
    assert (np.diff(cover, axis=1) <= 0).all(), "no gap between the windows of a row"
    assert (np.diff(plan.row_offsets) > 0).all(), "no empty row"
    assert plan.max_segments <= (max_segments or ROW_LENGTH)
    assert plan.fill_fraction == pytest.approx(cover.mean() if cover.size else 0.0)


@given(lengths=lengths_of_windows, seed=st.integers(0, 3))
def test_the_plan_is_a_function_of_lengths_and_seed(lengths, seed):
    first, again = pack(lengths, ROW_LENGTH, seed), pack(lengths, ROW_LENGTH, seed)
    np.testing.assert_array_equal(first.segments, again.segments)
    np.testing.assert_array_equal(first.row_offsets, again.row_offsets)
    np.testing.assert_array_equal(first.columns, again.columns)


@given(lengths=lengths_of_windows)
def test_no_two_open_rows_could_be_one(lengths):
    plan = pack(lengths, ROW_LENGTH)
    used = np.bincount(plan.row_index, lengths[plan.segments]) if plan.num_rows else np.zeros(0)
    assert (used * 2 <= ROW_LENGTH).sum() <= 1, "two rows at most half full would have been joined"


def test_the_seed_changes_who_shares_a_row():
    lengths = np.full(40, 5)
    assert pack(lengths, 10, seed=0).segments.tolist() != pack(lengths, 10, seed=1).segments.tolist()


def test_skewed_lengths_fill_the_rows_fast():
    lengths = np.minimum(np.random.default_rng(0).geometric(0.01, 200_000), 200)
    start = time.perf_counter()
    plan = pack(lengths, 200)
    assert time.perf_counter() - start < 10, "a second at most on a free machine"
    assert plan.fill_fraction > 0.99


@pytest.mark.parametrize(
    ("lengths", "row_length", "max_segments", "message"),
    [
        ([3, 9], 8, None, "window 1 has 9 events"),
        ([3, -1, 9], 8, None, "window 1 has -1 events"),
        ([1], 0, None, "row_length=0"),
        ([1], 8, 0, "max_segments=0"),
    ],
)
def test_impossible_sizes_are_named(lengths, row_length, max_segments, message):
    with pytest.raises(ValueError, match=message):
        pack(np.array(lengths), row_length, max_segments=max_segments)


@given(ends=st.lists(st.integers(0, 40), max_size=20), history_length=st.integers(1, 15))
def test_last_windows_are_the_latest_training_events(ends, history_length):
    windows = training_windows(np.array(ends, int), history_length, "last")
    assert windows.users.tolist() == [user for user, end in enumerate(ends) if end]
    for user, start, length in zip(windows.users, windows.starts, windows.lengths, strict=True):
        assert length == min(ends[user], history_length)
        assert start + length == ends[user]


@given(ends=st.lists(st.integers(0, 40), max_size=20), history_length=st.integers(1, 15))
def test_all_windows_cover_every_training_event_once(ends, history_length):
    windows = training_windows(np.array(ends, int), history_length, "all")
    covered = [
        (user, event)
        for user, start, length in zip(windows.users, windows.starts, windows.lengths, strict=True)
        for event in range(start, start + length)
    ]
    assert sorted(covered) == [(user, event) for user, end in enumerate(ends) for event in range(end)]
    assert (windows.lengths >= 1).all()
    newest = windows.starts + windows.lengths == np.asarray(ends, int)[windows.users]
    full = np.minimum(np.asarray(ends, int)[windows.users], history_length)
    assert (windows.lengths[newest] == full[newest]).all(), "the remainder is the oldest chunk"


@given(
    sizes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=20),
    history_length=st.integers(1, 15),
)
def test_new_windows_cover_every_new_event_once(sizes, history_length):
    before, ends = (np.array([f(size) for size in sizes], int) for f in (min, max))
    windows = new_windows(ends, before, history_length)
    covered = [
        (user, event)
        for user, start, length in zip(windows.users, windows.starts, windows.lengths, strict=True)
        for event in range(start, start + length)
    ]
    assert len(covered) == len(set(covered))
    new = {(user, event) for user, end in enumerate(ends) for event in range(before[user], end)}
    assert new <= set(covered)
    assert (windows.starts + windows.lengths > before[windows.users]).all(), "none without a new event"


def test_settings_of_windows_are_checked():
    with pytest.raises(ValueError, match="windows='some'"):
        training_windows(np.array([3]), 5, "some")
    with pytest.raises(ValueError, match="history_length=0"):
        training_windows(np.array([3]), 0)
