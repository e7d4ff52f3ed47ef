"""Every user of a split is asked for once, with all and only the events before the target."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.core.batch import UNKNOWN_SECONDS, Batch
from jaxrec.data.dataset import Histories, PreparedDataset
from jaxrec.data.evaluation_batches import EvaluationBatch, EvaluationRows, evaluation_batches

LENGTH = 8


def make_dataset(histories, cuts=None, **arguments):
    """Users with histories of (length); item ids are unique over the dataset, so events can be told apart."""
    lengths = np.asarray(histories, np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    num_events = int(offsets[-1])
    if cuts is not None:
        arguments |= dict(train_end=np.array(cuts)[:, 0], validation_end=np.array(cuts)[:, 1])
    return PreparedDataset.from_histories(
        Histories(
            offsets,
            np.arange(1, num_events + 1, dtype=np.int32),
            np.arange(num_events) * 7,
            (np.arange(2 * num_events).reshape(-1, 2) % 3 - 1).astype(np.int8),
        ),
        **arguments,
    )


@st.composite
def splits(draw):
    """Lengths and cut points; the dataset is made in the test, outside of Hypothesis' own drawing."""
    lengths = draw(st.lists(st.integers(0, 20), min_size=1, max_size=25))
    cuts = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in lengths]
    return lengths, cuts


def answers(dataset, batches):
    """For each user: its history as the batch shows it, its target, the target's labels, its seen items."""
    found = {}
    for batch in batches:
        item_ids = batch.batch.item_ids
        for place in np.flatnonzero(batch.user_mask):
            row, column = batch.rows[place], batch.columns[place]
            assert batch.last_positions[row, batch.slots[place]] == column
            segment = batch.batch.segment_ids[row] == batch.batch.segment_ids[row, column]
            assert np.flatnonzero(segment)[-1] == column
            user = int(batch.user_indices[place])
            assert user not in found
            found[user] = (
                item_ids[row][segment].tolist(),
                int(batch.targets[place]),
                batch.target_labels[place].tolist(),
                batch.seen_items[(batch.seen_users == place) & (batch.seen_items > 0)].tolist(),
            )
        padding = ~batch.user_mask
        assert (batch.targets[padding] == 0).all()
        assert (batch.target_labels[padding] == -1).all()
    return found


def expected_answers(dataset, split, users=None):
    found = {}
    for user in range(len(dataset.lengths)) if users is None else users:
        events = dataset.histories(np.array([user]))
        if split == "all":
            end, target = len(events.item_ids), None
        else:
            end = int((dataset.train_end if split == "validation" else dataset.validation_end)[user])
            stop = int((dataset.validation_end if split == "validation" else dataset.lengths)[user])
            if stop == end:
                continue
            target = end
        if end:
            found[user] = (
                events.item_ids[max(end - LENGTH, 0) : end].tolist(),
                0 if target is None else int(events.item_ids[target]),
                [-1, -1] if target is None else events.labels[target].tolist(),
                events.item_ids[:end].tolist(),
            )
    return found


@given(
    parts=splits(),
    split=st.sampled_from(["validation", "test", "all"]),
    rows_per_batch=st.sampled_from([1, 4, 16]),
)
def test_each_user_is_asked_once_with_what_came_before(parts, split, rows_per_batch):
    dataset = make_dataset(*parts)
    batches = list(evaluation_batches(dataset, split, rows_per_batch=rows_per_batch, history_length=LENGTH))
    assert answers(dataset, batches) == expected_answers(dataset, split)
    shapes = {tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch)) for batch in batches}
    assert len(shapes) <= 1, "one shape: one compilation"


@given(parts=splits(), split=st.sampled_from(["validation", "test"]))
def test_the_union_over_processes_is_the_whole_batch(parts, split):
    dataset = make_dataset(*parts)
    rows = EvaluationRows.make(dataset, split, rows_per_batch=4, history_length=LENGTH)
    for index in range(rows.num_batches):
        whole = rows.build(index)
        for count in (2, 4):
            parts = [rows.build(index, process, count) for process in range(count)]
            union = joined(parts)
            np.testing.assert_array_equal(union.batch.item_ids, whole.batch.item_ids)
            np.testing.assert_array_equal(union.last_positions, whole.last_positions)
            assert answers(dataset, [union]) == answers(dataset, [whole])


def joined(parts):
    """The global batch, as processes put it together."""

    def concatenated(cls, values):
        return cls(
            **{
                field.name: concatenated(Batch, [getattr(value, field.name) for value in values])
                if field.name == "batch"
                else np.concatenate([getattr(value, field.name) for value in values])
                for field in dataclasses.fields(cls)
                if getattr(values[0], field.name) is not None
            }
        )

    return concatenated(EvaluationBatch, parts)


@given(splits(), st.sampled_from(["validation", "test"]))
def test_every_event_of_a_part_can_be_a_target(parts, split):
    lengths, cuts = parts
    dataset = make_dataset(lengths, cuts)
    rows = EvaluationRows.make(
        dataset, split, rows_per_batch=4, history_length=LENGTH, with_seen=False, every_event=True
    )
    found = {}
    for batch in (rows.build(index) for index in range(rows.num_batches)):
        for place in np.flatnonzero(batch.user_mask):
            row, column = batch.rows[place], batch.columns[place]
            segment = batch.batch.segment_ids[row] == batch.batch.segment_ids[row, column]
            target = int(batch.targets[place])
            assert target not in found
            found[target] = (int(batch.user_indices[place]), batch.batch.item_ids[row][segment].tolist())
            labels = dataset.histories(np.array([found[target][0]])).labels
            first = int(dataset.histories(np.array([found[target][0]])).item_ids[0])
            np.testing.assert_array_equal(batch.target_labels[place], labels[target - first])
    expected, start = {}, 0
    for user, (length, (train_end, validation_end)) in enumerate(zip(lengths, cuts, strict=True)):
        begin, end = (train_end, validation_end) if split == "validation" else (validation_end, length)
        for at in range(max(begin, 1), end):
            # Items are numbered by events: the target at `at` comes after those before it.
            expected[start + at + 1] = (user, list(range(start + max(0, at - LENGTH) + 1, start + at + 1)))
        start += length
    assert found == expected


@given(parts=splits(), split=st.sampled_from(["test", "all"]))
def test_an_empty_slot_ends_each_history(parts, split):
    dataset = make_dataset(*parts)
    arguments = dict(rows_per_batch=4, history_length=LENGTH)
    slotted = answers(dataset, evaluation_batches(dataset, split, **arguments, append_slot=True))
    plain = expected_answers(dataset, split)
    assert slotted.keys() == plain.keys()
    for user, (history, *others) in plain.items():
        assert slotted[user] == ([*history[-(LENGTH - 1) :], 0], *others)
    for batch in evaluation_batches(dataset, split, **arguments, append_slot=True):
        rows, columns = batch.rows[batch.user_mask], batch.columns[batch.user_mask]
        histories = batch.batch
        assert (histories.item_ids[rows, columns] == 0).all()
        assert (histories.time_gaps[rows, columns] == 0).all()
        assert (histories.times[rows, columns] == UNKNOWN_SECONDS).all(), "the target's time is not used"
        assert (histories.labels[rows, columns] == -1).all()
        np.testing.assert_array_equal(
            histories.positions[rows, columns], histories.positions[rows, columns - 1] + 1
        )


def test_a_chosen_few_users_are_asked_in_any_order():
    dataset = make_dataset([5, 9, 3, 20, 1])
    chosen = np.array([3, 0, 4])
    batches = evaluation_batches(
        dataset, "test", rows_per_batch=2, history_length=LENGTH, user_indices=chosen
    )
    assert answers(dataset, batches) == expected_answers(dataset, "test", [3, 0])


def test_seen_items_are_listed_only_where_they_are_filtered():
    dataset = make_dataset([5, 9, 3], filter_seen=False)
    (without,) = evaluation_batches(dataset, "test", rows_per_batch=2, history_length=LENGTH)
    assert without.seen_items.size == 0
    (with_seen,) = evaluation_batches(
        dataset, "test", rows_per_batch=2, history_length=LENGTH, with_seen=True
    )
    assert answers(dataset, [with_seen]) == expected_answers(dataset, "test")


def test_users_that_cannot_be_asked_are_counted():
    dataset = make_dataset([4, 4, 4, 0], cuts=[(0, 0), (4, 4), (2, 3), (0, 0)])
    rows = EvaluationRows.make(dataset, "test", rows_per_batch=2, history_length=LENGTH)
    assert (rows.num_users, rows.num_without_history, rows.num_without_target) == (1, 1, 2)
    everything = EvaluationRows.make(dataset, "all", rows_per_batch=2, history_length=LENGTH)
    assert (everything.num_users, everything.num_without_history, everything.num_without_target) == (3, 1, 0)


def test_a_split_without_users_has_no_batches():
    dataset = make_dataset([2, 1])
    assert list(evaluation_batches(dataset, "test", rows_per_batch=2, history_length=LENGTH)) == []


def test_batches_hold_about_as_many_users_each():
    lengths = np.random.default_rng(0).geometric(0.05, 2000)
    rows = EvaluationRows.make(make_dataset(lengths), "test", rows_per_batch=16, history_length=50)
    counts = [int(rows.build(index).user_mask.sum()) for index in range(rows.num_batches)]
    assert sum(counts) == rows.num_users
    assert max(counts) - min(counts) <= 16
    assert rows.plan.fill_fraction > 0.95


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "tests"}, "split='tests'"),
        ({"rows_per_batch": 0}, "rows_per_batch=0"),
        ({"history_length": 0}, "history_length=0"),
        ({"history_length": 1, "append_slot": True}, "history_length=1 .* at least 2"),
        ({"user_indices": np.array([0, 7])}, "user index 7"),
        ({"process_count": 3}, r"rows_per_batch=4 .* 3 processes; make it 6"),
    ],
)
def test_settings_are_checked(arguments, message):
    arguments = {"split": "test", "rows_per_batch": 4, "history_length": LENGTH} | arguments
    with pytest.raises(ValueError, match=message):
        list(evaluation_batches(make_dataset([5, 5]), **arguments))
