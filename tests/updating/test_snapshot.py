"""Where the log is cut: every event is new once, whatever its time, and held out before it is trained on."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.serving.store import AddedItem, Feedback
from jaxrec.updating.snapshot import (
    EVENTS_FILE,
    ITEMS_FILE,
    Mark,
    clocked_seconds,
    holds,
    plan_update,
    read_plan,
    write_snapshot,
)

arrivals = st.lists(
    st.tuples(
        st.lists(st.integers(0, 60), max_size=12), st.booleans(), st.sets(st.integers(0, 40), max_size=3)
    ),
    min_size=1,
    max_size=8,
)


@given(arrivals=arrivals, holdout=st.floats(0.05, 0.9), start=st.integers(-5, 30))
def test_every_event_is_new_once(arrivals, holdout, start):
    """Events come in with any times, updates are promoted or not, users are erased in between."""
    log, mark, trained, number = {}, Mark(), [], 0
    for seconds, promoted, erased in arrivals:
        for second in seconds:
            number += 1
            log[number] = second
        log = {key: second for key, second in log.items() if key not in erased}
        numbers = np.array(sorted(log), np.int64)
        times = clocked_seconds(numbers, np.array([log[key] for key in numbers], np.int64), mark, start)
        assert (np.diff(times) >= 0).all() and (times >= start).all()
        plan = plan_update(numbers, times, mark, holdout=holdout, least_events=2)
        if plan is None:
            new = times[numbers > mark.number]
            assert len(new) < 2 or new[0] == new[-1]
            continue
        new = numbers[(numbers > mark.number) & (numbers <= plan.number)]
        held_out = numbers[numbers > plan.number]
        assert (plan.new, plan.held_out, plan.last) == (len(new), len(held_out), numbers[-1])
        assert plan.new > 0 and plan.held_out > 0
        # By time the parts are what they are by number.
        np.testing.assert_array_equal(numbers[times >= plan.cut], held_out)
        np.testing.assert_array_equal(numbers[(times >= plan.since) & (times < plan.cut)][-len(new) :], new)
        assert (times[numbers <= mark.number] < plan.since).all() or mark.number == 0
        if promoted:
            trained += new.tolist()
            mark = plan.mark
    assert len(trained) == len(set(trained))
    assert {key for key in log if key <= mark.number} <= set(trained)


def test_an_event_that_comes_late_counts_as_of_when_it_came():
    numbers = np.arange(1, 6)
    times = clocked_seconds(numbers, np.array([10, 3, 20, 5, 30]), Mark(), 0)
    assert times.tolist() == [10, 10, 20, 20, 30]
    assert clocked_seconds(numbers, np.zeros(5, np.int64), Mark(number=3, seconds=25), 4).tolist() == [
        4, 4, 4, 25, 25,
    ]  # fmt: skip


def test_too_little_is_waited_with():
    numbers, times = np.arange(1, 5), np.array([1, 2, 3, 4])
    options = {"holdout": 0.25, "least_events": 4}
    assert plan_update(numbers, times, Mark(), **options).new == 3
    assert plan_update(numbers, times, Mark(number=1), **options) is None
    assert plan_update(numbers, np.ones(4, np.int64), Mark(), **options) is None, "none can be held out"
    assert plan_update(numbers, np.array([1, 1, 1, 2]), Mark(), holdout=0.9, least_events=4).held_out == 1


@pytest.fixture
def written(tmp_path):
    log = [
        (n, Feedback(event_id=str(n), user_id=f"u{n % 2}", item_id="7", seconds=n, value=float(n)))
        for n in (2, 3, 5)
    ]
    plan = plan_update(np.array([2, 3, 5]), np.array([2, 3, 5]), Mark(), holdout=0.3, least_events=2)
    items = {"9": AddedItem(item_id="9", title="nine", categories=("a", "b"))}
    write_snapshot(tmp_path / "000001", plan, log, np.array([2, 3, 5]), items)
    return tmp_path / "000001", plan, log


def test_a_snapshot_is_read_as_it_was_written(written):
    directory, plan, log = written
    assert read_plan(directory) == plan
    assert read_plan(directory.parent) is None
    events = pq.read_table(directory / EVENTS_FILE).to_pylist()
    assert [(row["number"], row["user_id"], row["value"]) for row in events] == [
        (number, event.user_id, event.value) for number, event in log
    ]
    assert pq.read_table(directory / ITEMS_FILE)["categories"].to_pylist() == [["a", "b"]]


def test_an_erased_user_is_seen(written):
    directory, _, log = written
    later = (9, Feedback(event_id="9", user_id="u1", item_id="7"))
    assert holds(directory, [*log, later])
    assert not holds(directory, [row for row in log if row[1].user_id != "u1"])
