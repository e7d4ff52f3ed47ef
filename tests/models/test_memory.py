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
    """The memory's rows at every event of these histories, each in a row of its own."""
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
    segments = jnp.asarray(events > 0, jnp.int32)
    arrays = jnp.asarray(successors)[events], jnp.asarray(values)[events]
    return events, MemoryRows.of_events(jnp.asarray(events), *arrays, segments, window)


def head_of(window, decay=DECAY):
    return MemoryHead(TransitionMemory(num_successors=NUM_ITEMS, window=window, decay=decay), 2)


def dense(logits):
    """`[B, L, V]`: what each item gets."""
    found = np.zeros((*logits.item_ids.shape[:2], NUM_ITEMS + 1))
    for at in np.ndindex(*logits.item_ids.shape[:2]):
        np.add.at(found[at], np.asarray(logits.item_ids[at]), np.asarray(logits.values[at]))
    return found


def test_logits_are_those_worked_by_hand():
    # 1 is followed by 2 (gap 1: 1) and 3 (gap 2: .5); 2 by 3. The second history adds 1 -> 3.
    _, rows = rows_of([[1, 2, 3], [1, 3]], window=2, decay=DECAY)
    logits = dense(head_of(2)(jnp.zeros((2, LENGTH, 2)), rows))
    evidence = lambda count, total: WEIGHT * np.log1p(LIFT * count / (total + SHRINKAGE))  # noqa: E731
    np.testing.assert_allclose(logits[0, 0, 2], evidence(1.0, 2.5), rtol=1e-5)
    np.testing.assert_allclose(logits[0, 0, 3], evidence(1.5, 2.5), rtol=1e-5)
    wanted = evidence(1.0, 1.0) + DECAY * evidence(1.5, 2.5)  # after 2, and after 1 one event before
    np.testing.assert_allclose(logits[0, 1, 3], wanted, rtol=1e-5)
    assert not logits[0, 0, [1, 4, 5]].any() and not logits[1, 2:, 1:].any()


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.integers(1, NUM_ITEMS), min_size=2, max_size=LENGTH), min_size=1, max_size=4),
    st.sampled_from([1, 3]),
    st.data(),
)
def test_a_predicted_event_is_counted_out(lists, window, data):
    """As if the counts had been made with another, unknown item at its place."""
    history = data.draw(st.integers(0, len(lists) - 1))
    place = data.draw(st.integers(1, len(lists[history]) - 1))
    events, rows = rows_of(lists, window, DECAY)
    targets = jnp.asarray(np.pad(events[:, 1:], ((0, 0), (0, 1))))
    head, states = head_of(window), jnp.zeros((*events.shape, 2))
    found = dense(head(states, rows, targets))[history, place - 1]

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
        row_ids = np.asarray(rest.item_ids[history, place - 1, age])
        row_counts = np.asarray(rest.counts[history, place - 1, age])
        row = np.zeros(NUM_ITEMS + 1)
        row[row_ids] += row_counts[:-1]
        row[0] = 0.0
        for (source, target), count in counts.items():
            row[target] += count if source == item else 0.0
        total = row.sum()
        expected += WEIGHT * DECAY**age * np.log1p(LIFT * row / (total + SHRINKAGE))
    np.testing.assert_allclose(found[1:], expected[1:], rtol=2e-4, atol=2e-4)


def test_segments_of_a_row_do_not_see_each_other():
    segments = jnp.array([[1, 1, 2, 2, 0]])
    ids = jnp.arange(1, 6)[None]
    rows = MemoryRows.of_events(ids, ids[..., None], jnp.ones((1, 5, 2)), segments, 3)
    np.testing.assert_array_equal(rows.event_ids[0], [[1, 0, 0], [2, 1, 0], [3, 0, 0], [4, 3, 0], [0, 0, 0]])
    np.testing.assert_array_equal(rows.item_ids[0, :, :, 0], rows.event_ids[0])
    np.testing.assert_array_equal(rows.counts[0, :, :, 0] > 0, rows.event_ids[0] > 0)


def test_every_weight_of_the_head_is_learned():
    _, rows = rows_of([[1, 2, 3, 1, 2], [2, 3]], window=2, decay=DECAY)
    head = head_of(2)

    def total(head):
        return jnp.sum(head(jnp.ones((2, LENGTH, 2)), rows).values)

    gradients = nnx.to_pure_dict(nnx.grad(total)(head))
    assert all(np.all(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("wrong", [{"num_successors": 0}, {"window": 0}, {"decay": 0.0}, {"decay": 1.5}])
def test_settings_that_cannot_be_are_told(wrong):
    with pytest.raises(ValueError, match=r"say num_successors >= 1"):
        TransitionMemory(**wrong)
