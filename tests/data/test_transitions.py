"""Transition counts against a loop over pairs; the successors that are kept are the most frequent."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.data.histories import UNKNOWN_TIME, Histories
from jaxrec.data.transitions import count_transitions, top_successors

NUM_ITEMS = 6
ITEMS = st.lists(st.lists(st.integers(1, NUM_ITEMS), max_size=12), min_size=1, max_size=6)


def histories_of(lists):
    offsets = np.cumsum([0, *map(len, lists)]).astype(np.int64)
    item_ids = np.array([item for one in lists for item in one], np.int32)
    return Histories(
        offsets, item_ids, np.full(len(item_ids), UNKNOWN_TIME), np.zeros((len(item_ids), 0), np.int8)
    )


def loop(lists, window, decay):
    counts = np.zeros((NUM_ITEMS + 1, NUM_ITEMS + 1))
    for items in lists:
        for at, item in enumerate(items):
            for gap, later in enumerate(items[at + 1 : at + 1 + window]):
                counts[item, later] += decay**gap
    return counts


@given(ITEMS, st.integers(1, 4), st.sampled_from([0.5, 0.75, 1.0]), st.integers(1, 8))
def test_counts_and_successors_equal_a_loop_over_pairs(lists, window, decay, kept):
    counts = count_transitions(histories_of(lists), NUM_ITEMS, window=window, decay=decay)
    expected = loop(lists, window, decay)
    np.testing.assert_allclose(counts.toarray(), expected)
    ids, values = top_successors(counts, kept)
    assert ids.shape == (NUM_ITEMS + 1, kept) and values.shape == (NUM_ITEMS + 1, kept + 1)
    np.testing.assert_allclose(values[:, -1], expected.sum(1))
    for row, (successors, found) in enumerate(zip(ids, values, strict=True)):
        order = np.lexsort((np.arange(NUM_ITEMS + 1), -expected[row]))[:kept]
        wanted = [item for item in order if expected[row, item] > 0]
        assert successors.tolist() == wanted + [0] * (kept - len(wanted))
        np.testing.assert_allclose(found[: len(wanted)], expected[row, wanted])
        assert not found[len(wanted) : -1].any()
