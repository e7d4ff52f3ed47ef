"""The memory of transitions: its logits, and that an event which is predicted is counted out of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.data.histories import UNKNOWN_TIME, Histories
from jaxrec.data.transitions import count_transitions, top_successors
from jaxrec.models.memory import LIFT, SHRINKAGE, WEIGHT, MemoryHead, MemoryRows, TransitionMemory

NUM_ITEMS, LENGTH, DECAY = 5, 9, 0.5


def rows_of(lists, window, decay):
    """Events of these histories, each in a row of its own, and the memory's rows of them."""
    offsets = np.cumsum([0, *map(len, lists)]).astype(np.int64)
    item_ids = np.array([item for one in lists for item in one], np.int32)
    histories = Histories(
        offsets, item_ids, np.full(len(item_ids), UNKNOWN_TIME), np.zeros((len(item_ids), 0), np.int8)
    )
    counts = count_transitions(histories, NUM_ITEMS, window=window, decay=decay)
    successors, values = top_successors(counts, NUM_ITEMS)
    events = np.zeros((len(lists), LENGTH), np.int32)
    for row, items in enumerate(lists):
        events[row, : len(items)] = items
    return events, MemoryRows(
        jnp.asarray(events), jnp.asarray(successors)[events], jnp.asarray(values)[events]
    )


def head_of(window, decay=DECAY):
    return MemoryHead(TransitionMemory(num_successors=NUM_ITEMS, window=window, decay=decay), 2)


def in_training(head, events, rows, targets=None, segments=None):
    """`[B, L, V]`: what each item gets at every event."""
    targets = jnp.zeros(events.shape, jnp.int32) if targets is None else targets
    segments = jnp.asarray(events > 0, jnp.int32) if segments is None else segments
    mixed = head.of_histories(jnp.zeros((*events.shape, 2)), rows, segments, targets)
    named = jax.nn.one_hot(mixed.item_ids, NUM_ITEMS + 1) * (mixed.item_ids > 0)[..., None]
    lists = jnp.einsum("nemv,nem->nev", named, mixed.values)
    found = (mixed.mixing @ lists).reshape(len(events), -1, NUM_ITEMS + 1)[:, : events.shape[1]]
    at_target = mixed.at_target.reshape(len(events), -1)[:, : events.shape[1]]
    return np.asarray(found + at_target[..., None] * jax.nn.one_hot(targets, NUM_ITEMS + 1))


def test_logits_are_those_worked_by_hand():
    # 1 is followed by 2 (gap 1: 1) and 3 (gap 2: .5); 2 by 3. The second history adds 1 -> 3.
    events, rows = rows_of([[1, 2, 3], [1, 3]], window=2, decay=DECAY)
    logits = in_training(head_of(2), events, rows)
    evidence = lambda count, total: WEIGHT * np.log1p(LIFT * count / (total + SHRINKAGE))  # noqa: E731
    np.testing.assert_allclose(logits[0, 0, 2], evidence(1.0, 2.5), rtol=1e-5)
    np.testing.assert_allclose(logits[0, 0, 3], evidence(1.5, 2.5), rtol=1e-5)
    wanted = evidence(1.0, 1.0) + DECAY * evidence(1.5, 2.5)  # after 2, and after 1 one event before
    np.testing.assert_allclose(logits[0, 1, 3], wanted, rtol=1e-5)
    assert not logits[0, 0, [1, 4, 5]].any() and not logits[1, 2:, 1:].any()


@settings(max_examples=20)
@given(
    st.lists(st.lists(st.integers(1, NUM_ITEMS), min_size=1, max_size=LENGTH), min_size=1, max_size=3),
    st.sampled_from([1, 3]),
)
def test_answers_get_what_training_gets(lists, window):
    """One query's latest events, as serving asks, against whole histories; nothing is counted out."""
    events, rows = rows_of(lists, window, DECAY)
    head = head_of(window)
    found = in_training(head, events, rows)
    for history, items in enumerate(lists):
        last = len(items) - 1
        ages = [last - age for age in range(window) if age <= last]
        latest = jax.tree.map(lambda x: x[history, jnp.array(ages)], rows)  # noqa: B023
        latest = jax.tree.map(
            lambda x: jnp.pad(x, [(0, window - len(x))] + [(0, 0)] * (x.ndim - 1))[None], latest
        )
        told = head(jnp.zeros((1, 2)), latest)
        wanted = np.zeros(NUM_ITEMS + 1)
        np.add.at(wanted, np.asarray(told.item_ids[0]), np.asarray(told.values[0]))
        np.testing.assert_allclose(found[history, last, 1:], wanted[1:], rtol=1e-4, atol=1e-5)


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.integers(1, NUM_ITEMS), min_size=2, max_size=LENGTH), min_size=1, max_size=4),
    st.sampled_from([1, 3]),
    st.data(),
)
def test_a_predicted_event_is_counted_out(lists, window, data):
    """As if it had not been counted; of the other successors, only the sum of the row still holds it."""
    history = data.draw(st.integers(0, len(lists) - 1))
    place = data.draw(st.integers(1, len(lists[history]) - 1))
    events, rows = rows_of(lists, window, DECAY)
    targets = jnp.asarray(np.pad(events[:, 1:], ((0, 0), (0, 1))))
    found = in_training(head_of(window), events, rows, targets)[history, place - 1]
    target = lists[history][place]

    # The pairs that lead to the event are taken away; those that start from it remain.
    without = [list(items) for items in lists]
    tail = without[history][place:]
    without[history] = without[history][:place]
    _, rest = rows_of([*without, tail], window, DECAY)
    # Pairs across the cut, but to later events than the target, are still counted: add them.
    counts = {}
    for at in range(place):
        for later in range(place + 1, len(lists[history])):
            if later - at <= window:
                pair = (lists[history][at], lists[history][later])
                counts[pair] = counts.get(pair, 0.0) + DECAY ** (later - at - 1)
    expected = np.zeros(NUM_ITEMS + 1)
    for age in range(min(window, place)):
        item = lists[history][place - 1 - age]
        row_ids = np.asarray(rest.item_ids[history, place - 1 - age])
        row_counts = np.asarray(rest.counts[history, place - 1 - age])
        row = np.zeros(NUM_ITEMS + 1)
        row[row_ids] += row_counts[:-1]
        row[0] = 0.0
        for (source, later), count in counts.items():
            row[later] += count if source == item else 0.0
        total = np.full(NUM_ITEMS + 1, rows.counts[history, place - 1 - age, -1])
        total[target] = row.sum()
        expected += WEIGHT * DECAY**age * np.log1p(LIFT * row / (total + SHRINKAGE))
    np.testing.assert_allclose(found[1:], expected[1:], rtol=2e-4, atol=2e-4)


def test_segments_of_a_row_do_not_see_each_other():
    segments = jnp.array([[1, 1, 2, 2, 0]])
    events = jnp.array([[1, 2, 3, 4, 5]])
    # The only successor of an item is the item itself, so that who is named says whose rows were asked.
    rows = MemoryRows(events, events[..., None], jnp.ones((1, 5, 2)))
    found = in_training(head_of(3), events, rows, segments=segments)
    named = [set(np.flatnonzero(row)) for row in found[0]]
    assert named == [{1}, {1, 2}, {3}, {3, 4}, set()]


def test_every_weight_of_the_head_is_learned():
    events, rows = rows_of([[1, 2, 3, 1, 2], [2, 3]], window=2, decay=DECAY)
    segments = jnp.asarray(events > 0, jnp.int32)

    def total(head):
        mixed = head.of_histories(jnp.ones((2, LENGTH, 2)), rows, segments, jnp.zeros_like(segments))
        return jnp.sum(mixed.mixing @ mixed.values)

    gradients = nnx.to_pure_dict(nnx.grad(total)(head_of(2)))
    assert all(np.all(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("wrong", [{"num_successors": 0}, {"window": 0}, {"decay": 0.0}, {"decay": 1.5}])
def test_settings_that_cannot_be_are_told(wrong):
    with pytest.raises(ValueError, match=r"say num_successors >= 1"):
        TransitionMemory(**wrong)
