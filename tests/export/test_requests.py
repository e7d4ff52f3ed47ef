import numpy as np
import pytest

from jaxrec.export.requests import sized_request, with_beginnings


def tower_request(*counts, width=12):
    """Histories of so many events: the item ids of row r are 100 r + 1, 100 r + 2, ..."""
    places = np.arange(width)[None, :]
    there = places < np.array(counts)[:, None]
    item_ids = np.where(there, 100 * np.arange(len(counts))[:, None] + places + 1, 0).astype(np.int32)
    seconds = np.where(there, places, -1).astype(np.int32)
    return {"item_ids": item_ids, "seconds": seconds, "user_ids": np.arange(len(counts), dtype=np.int32)}


def test_every_length_gets_a_history_that_fills_it():
    found = with_beginnings(tower_request(2, 12, 0), (4, 8, 12))
    assert found["user_ids"].tolist() == [0, 1, 2, 1, 1], "twelve events fill the last length as they are"
    assert np.count_nonzero(found["item_ids"], axis=1).tolist() == [2, 12, 0, 4, 8]
    np.testing.assert_array_equal(found["item_ids"][3, :4], [101, 102, 103, 104])
    assert found["seconds"][3].tolist() == [0, 1, 2, 3] + [-1] * 8
    for length in (4, 8, 12):
        sized, _ = sized_request(found, {}, (1, length))
        assert sized["item_ids"].all(), "a single row is the one that fills it"


@pytest.mark.parametrize("num_rows", [1, 4, 16])
@pytest.mark.parametrize("length", [4, 16])
def test_rows_go_from_the_longest_that_fits_to_the_empty_one(num_rows, length):
    inputs = tower_request(1, 3, 12, 4, 0)
    sized, wanted = sized_request(inputs, {"row": np.arange(5)}, (num_rows, length))
    rows = wanted["row"]
    assert sized["item_ids"].shape == sized["seconds"].shape == (num_rows, length)
    counts = np.count_nonzero(sized["item_ids"], axis=1)
    assert counts[0] == (4 if length == 4 else 12) and (np.diff(counts) <= 0).all()
    assert num_rows == 1 or counts[-1] == 0
    np.testing.assert_array_equal(sized["user_ids"], rows)
    kept = min(length, 12)
    np.testing.assert_array_equal(sized["item_ids"][:, :kept], inputs["item_ids"][rows, :kept])
    assert not sized["item_ids"][:, kept:].any() and (sized["seconds"][:, kept:] == -1).all()


def test_candidates_come_again_until_there_are_enough():
    inputs = {**tower_request(1, 3), "candidate_ids": np.arange(6, dtype=np.int32).reshape(2, 3)}
    sized, wanted = sized_request(inputs, {"scores": inputs["candidate_ids"] + 0.5}, (2, 4, 5))
    assert sized["candidate_ids"].tolist() == [[3, 4, 5, 3, 4], [0, 1, 2, 0, 1]], "the longer history first"
    np.testing.assert_array_equal(wanted["scores"], sized["candidate_ids"] + 0.5)
