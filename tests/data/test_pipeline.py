"""Batch k is a pure function of (dataset, seed, k), whoever asks and from wherever the run resumes."""

import dataclasses
import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.core.batch import UNKNOWN_SECONDS, Batch
from jaxrec.data import pipeline
from jaxrec.data.dataset import UNKNOWN_TIME, Histories, PreparedDataset
from jaxrec.data.pipeline import TrainingRows, build_batch, stream_batches, train_batches
from jaxrec.data.rows import NUM_TIME_GAPS, seconds_in_segment, time_gap_buckets

FIELDS = [
    field.name for field in dataclasses.fields(Batch) if field.name not in ("context", "domain_ids")
]  # these sets have neither


def make_dataset(lengths, seed=0, num_behaviours=2):
    """Histories whose events can be told apart: event e of all events is item e + 1, at second e."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return PreparedDataset.from_histories(
        Histories(
            offsets,
            np.arange(1, offsets[-1] + 1, dtype=np.int32),
            np.arange(offsets[-1], dtype=np.int64),
            rng.integers(-1, 2, (offsets[-1], num_behaviours)).astype(np.int8),
            np.arange(offsets[-1], dtype=np.float32) / 2,
        )
    )


def assert_equal_batches(first, second):
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)


def joined(batches):
    return Batch(**{name: np.concatenate([getattr(batch, name) for batch in batches]) for name in FIELDS})


# Datasets are made in the tests: where shapes are checked, the checker draws random numbers of its own.
some_lengths = st.lists(st.integers(0, 25), min_size=1, max_size=30).filter(lambda lengths: sum(lengths) > 0)


@given(
    lengths=some_lengths,
    seed=st.integers(0, 2**32),
    step=st.integers(0, 50),
    rows_per_process=st.integers(1, 3),
    windows=st.sampled_from(["last", "all"]),
)
def test_the_union_over_processes_is_the_whole_batch(lengths, seed, step, rows_per_process, windows):
    rows = TrainingRows.make(make_dataset(lengths), history_length=8, windows=windows, seed=seed)
    size = 4 * rows_per_process
    whole = build_batch(rows, step, global_batch_size=size)
    for count in (2, 4):
        parts = [
            build_batch(rows, step, global_batch_size=size, process_index=index, process_count=count)
            for index in range(count)
        ]
        assert {len(part.item_ids) for part in parts} == {size // count}
        assert_equal_batches(joined(parts), whole)


@given(lengths=some_lengths, seed=st.integers(0, 5), start=st.integers(0, 6))
def test_resuming_at_any_step_continues_the_stream(lengths, seed, start):
    dataset = make_dataset(lengths)
    arguments = dict(global_batch_size=4, history_length=8, seed=seed, stop_step=7)
    whole = list(train_batches(dataset, **arguments))
    resumed = list(train_batches(dataset, **arguments, start_step=start))
    assert len(whole) == 7
    assert len(resumed) == 7 - start
    for first, second in zip(whole[start:], resumed, strict=True):
        assert_equal_batches(first, second)


@given(lengths=some_lengths, seed=st.integers(0, 5), windows=st.sampled_from(["last", "all"]))
def test_an_epoch_holds_every_training_event_once(lengths, seed, windows):
    dataset = make_dataset(lengths)
    rows = TrainingRows.make(dataset, history_length=8, windows=windows, seed=seed)
    epochs = [build_batch(rows, epoch, global_batch_size=rows.num_rows) for epoch in range(2)]
    for epoch in epochs:
        starts = (
            np.maximum(dataset.train_end - 8, 0) if windows == "last" else np.zeros_like(dataset.train_end)
        )
        firsts = dataset.histories(np.arange(len(dataset.lengths))).offsets[:-1] + 1
        expected = [
            item
            for first, start, end in zip(firsts, starts, dataset.train_end, strict=True)
            for item in range(first + start, first + end)
        ]
        assert sorted(epoch.item_ids[epoch.segment_ids > 0]) == expected
        check_segments(dataset, epoch)
    in_rows = [sorted(epoch.item_ids.tolist()) for epoch in epochs]
    assert in_rows[0] == in_rows[1], "epochs hold the same rows"


def check_segments(dataset, batch):
    """Segments are numbered from the left, without a gap, and each is a stretch of one history."""
    events = dataset.histories(np.arange(len(dataset.lengths)))
    users = np.repeat(np.arange(len(dataset.lengths)), dataset.lengths)
    for row in range(len(batch.item_ids)):
        used = np.count_nonzero(batch.segment_ids[row])
        numbers = batch.segment_ids[row][:used]
        assert (batch.segment_ids[row][used:] == 0).all()
        assert (batch.item_ids[row][used:] == 0).all()
        assert (batch.labels[row][used:] == -1).all()
        assert (batch.times[row][used:] == UNKNOWN_SECONDS).all()
        assert numbers[0] == 1
        assert set(np.diff(numbers)) <= {0, 1}
        for number in range(1, numbers[-1] + 1):
            cells = np.flatnonzero(batch.segment_ids[row] == number)
            item_ids = batch.item_ids[row][cells]
            assert set(np.diff(item_ids)) <= {1}, "in time order, nothing left out"
            assert len(set(users[item_ids - 1])) == 1, "of one user"
            assert batch.positions[row][cells].tolist() == list(range(len(cells)))
            assert batch.time_gaps[row][cells].tolist() == [0] + [2] * (len(cells) - 1)  # one second each
            assert batch.times[row][cells].tolist() == list(range(len(cells)))
            np.testing.assert_array_equal(batch.labels[row][cells], events.labels[item_ids - 1])


def test_epochs_differ_in_order_and_seeds_in_rows():
    dataset = make_dataset([9] * 40)
    rows = TrainingRows.make(dataset, history_length=8)
    orders = [rows.rows_at(np.arange(40) + epoch * 40).tolist() for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(40)) for order in orders)
    other = TrainingRows.make(dataset, history_length=8, seed=1)
    assert other.rows_at(np.arange(40)).tolist() != orders[0]


def test_a_batch_may_span_many_epochs_of_a_tiny_dataset():
    rows = TrainingRows.make(make_dataset([3, 4]), history_length=8)
    batch = build_batch(rows, 5, global_batch_size=16)
    assert batch.item_ids.shape == (16, 8)
    assert (batch.segment_ids.max(axis=1) == 2).all(), "one row holds both users"


@given(st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_users_of_a_smaller_share_are_among_those_of_a_larger_one(one, other):
    dataset = make_dataset([4] * 40)
    users = []
    for share in sorted((one, other)):
        if round(share * 40) == 0:
            with pytest.raises(ValueError, match="no training event in 0.0"):
                TrainingRows.make(dataset, history_length=8, user_share=share)
            return
        rows = TrainingRows.make(dataset, history_length=8, user_share=share, seed=len(users))
        users.append(set(rows.windows.users.tolist()))
        assert len(users[-1]) == round(share * 40)
    assert users[0] <= users[1]


@given(since=st.integers(0, 120), share=st.floats(0.1, 0.8), seed=st.integers(0, 100))
def test_news_are_mixed_with_histories_as_they_were(since, share, seed):
    dataset = make_dataset([9, 3, 30, 12, 1, 25, 25])
    plain = {"history_length": 8, "windows": "all", "seed": seed}
    if not (dataset.events_before(since) < dataset.train_end).any():
        with pytest.raises(
            ValueError, match=f"no training event from data.train_since={since} on in 7 users"
        ):
            TrainingRows.make(dataset, train_since=since, **plain)
        return
    news = TrainingRows.make(dataset, train_since=since, **plain)
    mixed = TrainingRows.make(dataset, train_since=since, replay_share=share, **plain)
    of_news = mixed.windows.take(np.arange(len(news.windows)))
    for name in ("users", "starts", "lengths"):
        np.testing.assert_array_equal(getattr(of_news, name), getattr(news.windows, name))
    replayed = mixed.windows.take(np.arange(len(news.windows), len(mixed.windows)))
    before = np.minimum(dataset.events_before(since), dataset.train_end)
    assert (replayed.starts + replayed.lengths <= before[replayed.users]).all()
    cycle = sum(mixed.mixing.turns)
    rows = mixed.rows_at(np.arange(cycle))
    assert sorted(rows[rows < news.num_rows]) == list(range(news.num_rows)), "each news once a cycle"
    if len(replayed):
        assert abs((rows >= news.num_rows).sum() - share * cycle) <= 1
    else:
        assert cycle == news.num_rows


def test_tf_data_yields_the_built_batches_with_their_types():
    rows = TrainingRows.make(make_dataset(range(1, 30)), history_length=8, seed=3)
    for step, batch in enumerate(stream_batches(rows, global_batch_size=4, stop_step=10), start=0):
        assert_equal_batches(batch, build_batch(rows, step, global_batch_size=4))
        assert batch.labels.shape == (4, 8, 2)
        assert {name: getattr(batch, name).dtype for name in FIELDS} == {
            "item_ids": np.int32, "user_ids": np.int32, "segment_ids": np.int32, "positions": np.int32,
            "time_gaps": np.int32, "times": np.int32, "labels": np.int8, "values": np.float32,
        }  # fmt: skip
    assert step == 9


@pytest.fixture
def running(monkeypatch):
    """The steps whose batches are being built right now, slowly."""
    steps = []

    def build_slowly(rows, step, **arguments):
        steps.append(step)
        time.sleep(0.1)
        steps.remove(step)
        return build_batch(rows, step, **arguments)

    monkeypatch.setattr(pipeline, "build_batch", build_slowly)
    return steps


def test_closing_ends_the_reading_ahead(running):
    stream = train_batches(make_dataset([9] * 9), global_batch_size=4, history_length=8, stop_step=10**6)
    next(stream)
    stream.close()
    assert running == [], "a thread that still runs Python when the interpreter ends hangs the process"
    time.sleep(0.3)
    assert running == [], "no thread starts another batch"
    assert list(stream) == []


def test_an_unfinished_stream_is_closed_when_python_exits(running):
    stream = train_batches(make_dataset([9] * 9), global_batch_size=4, history_length=8, stop_step=10**6)
    next(stream)
    assert stream.close.atexit
    stream.close()


def test_a_failed_batch_ends_the_stream_with_its_reason(monkeypatch):
    stream = train_batches(make_dataset([9] * 9), global_batch_size=4, history_length=8, stop_step=10**6)
    next(stream)

    def fail(rows, step, **arguments):
        raise ValueError("user 3 is damaged")

    monkeypatch.setattr(pipeline, "build_batch", fail)
    with pytest.raises(Exception, match="user 3 is damaged"):
        list(itertools.islice(stream, 100))
    assert list(stream) == []


def test_flipped_labels_change_no_other_field():
    dataset = make_dataset(range(1, 30))
    events = dataset.histories(np.arange(29))
    flipped = dataclasses.replace(
        events, labels=np.where(events.labels < 0, events.labels, 1 - events.labels)
    )
    other = PreparedDataset.from_histories(flipped)
    for first, second in zip(
        train_batches(dataset, global_batch_size=4, history_length=8, stop_step=6),
        train_batches(other, global_batch_size=4, history_length=8, stop_step=6),
        strict=True,
    ):
        assert (first.labels != second.labels).any()
        assert_equal_batches(dataclasses.replace(first, labels=second.labels), second)


def test_sizes_that_cannot_be_are_named_before_the_first_batch():
    dataset = make_dataset([5, 6])
    with pytest.raises(ValueError, match=r"global_batch_size=6 .* 4 processes; make it 8"):
        train_batches(dataset, global_batch_size=6, history_length=8, stop_step=1, process_count=4)
    with pytest.raises(ValueError, match="process_index=2"):
        train_batches(
            dataset, global_batch_size=4, history_length=8, stop_step=1, process_index=2, process_count=2
        )
    empty = make_dataset([0, 0])
    with pytest.raises(ValueError, match="no training event in 2 users"):
        train_batches(empty, global_batch_size=6, history_length=8, stop_step=1)


def test_time_gaps_are_bit_lengths():
    seconds = np.array([100, 100, 101, 103, 107, 90, UNKNOWN_TIME, 95, 95 + 2**40, 2**62], np.int64)
    first = np.arange(len(seconds)) == 0
    last = NUM_TIME_GAPS - 1
    assert time_gap_buckets(seconds, first).tolist() == [0, 1, 2, 3, 4, 1, 0, 0, last, last]
    assert time_gap_buckets(np.full(3, UNKNOWN_TIME), first[:3]).tolist() == [0, 0, 0]
    assert time_gap_buckets(seconds[:0], first[:0]).tolist() == []


@given(gap=st.integers(1, 2**45))
def test_a_time_gap_lies_in_the_bucket_of_its_power_of_two(gap):
    bucket = time_gap_buckets(np.array([0, gap], np.int64), np.array([True, False]))[1]
    assert bucket == min(gap.bit_length() + 1, NUM_TIME_GAPS - 1)


known_or_not = st.one_of(st.just(int(UNKNOWN_TIME)), st.integers(-(2**40), 2**40))


@given(segments=st.lists(st.lists(known_or_not, max_size=5), max_size=5))
def test_seconds_count_from_the_first_known_moment_of_a_segment(segments):
    offsets = np.cumsum([0, *map(len, segments)])
    found = seconds_in_segment(np.array([time for times in segments for time in times], np.int64), offsets)
    assert found.dtype == np.int32
    wanted = []
    for times in segments:
        known = [time for time in times if time != UNKNOWN_TIME]
        wanted += [-1 if time == UNKNOWN_TIME else min(time - min(known), 2**31 - 1) for time in times]
    assert found.tolist() == wanted
