"""The spool: buckets hold whole users in the order of the source, and histories are put in order."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.data.spool import UNKNOWN, Spool, history_order, record_type


def test_a_bucket_holds_its_users_in_the_order_of_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxrec.data.spool.ROWS_PER_BUCKET", 10)
    dtype = record_type(2, has_time=True, has_order=False, has_names=True, has_value=True)
    assert dtype.names == ("user", "item", "hash", "time", "behaviour", "value", "labels", "context")
    spool = Spool(tmp_path / "spool", dtype, 45)
    assert spool.num_buckets == 5
    records = np.zeros(45, dtype)
    records["user"], records["item"] = np.arange(45) * 7 % 11, np.arange(45)
    for start in range(0, 45, 9):
        spool.append(records[start : start + 9])
    for bucket in range(5):
        expected = records[records["user"] % 5 == bucket]
        np.testing.assert_array_equal(spool.bucket(bucket), expected)
    other = np.zeros(6, np.dtype([("item", "<i4")]))
    other["item"] = np.arange(6)
    spool.replace(3, other)
    reader = spool.reader(3, other.dtype)
    assert reader.take(4)["item"].tolist() == [0, 1, 2, 3]
    assert reader.take(4)["item"].tolist() == [4, 5]
    assert [len(chunk) for chunk in spool.chunks(3, other.dtype, 4)] == [4, 2]
    spool.remove()
    assert list(tmp_path.iterdir()) == []


EVENT = st.tuples(st.integers(0, 2), st.none() | st.integers(0, 4), st.none() | st.integers(0, 4))


def order_of_one_user(events):
    """Plain words: ordered events by order; the others behind the last ordered event not known to be later."""
    placed = sorted((event for event in events if event[1] is not None), key=lambda event: event[1])
    latest, keyed = UNKNOWN, []
    for rank, (place, _, time) in enumerate(placed):
        latest = max(latest, UNKNOWN if time is None else time)
        keyed.append((latest, 0, rank, place))
    keyed += [(time, 1, place, place) for place, order, time in events if order is None]
    return [place for *_, place in sorted(keyed)]


@given(st.lists(EVENT, max_size=15))
def test_history_order_is_what_plain_words_say(events):
    events = [(user, order, time) for user, order, time in events if order is not None or time is not None]
    users = np.array([user for user, _, _ in events], np.int64)
    order = np.array([UNKNOWN if one is None else one for _, one, _ in events], np.int64)
    time = np.array([UNKNOWN if one is None else one for *_, one in events], np.int64)
    expected = []
    for user in sorted(set(users.tolist())):
        expected += order_of_one_user(
            [(at, one[1], one[2]) for at, one in enumerate(events) if one[0] == user]
        )
    assert history_order(users, time, order).tolist() == expected


def test_history_order_with_one_key_or_none():
    users = np.array([1, 0, 1, 0])
    assert history_order(users, None, None).tolist() == [1, 3, 0, 2]
    assert history_order(users, np.array([5, 9, 4, 9]), None).tolist() == [1, 3, 2, 0]
    assert history_order(users, None, np.array([5, 9, 4, 8])).tolist() == [3, 1, 2, 0]
