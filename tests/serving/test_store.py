"""Both stores against a model in memory, across threads and through a kill."""

import collections
import signal
import subprocess
import sys
import threading
import time
import uuid

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxrec.serving import redis_store
from jaxrec.serving.redis_store import RedisStore
from jaxrec.serving.sqlite_store import SqliteStore
from jaxrec.serving.store import HOUR, AddedItem, Feedback, read_log

NOW = int(time.time())
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=5)
users, items = st.sampled_from(["ann", "bob", "ü 日"]), st.sampled_from(["1", "2", "3"])


@st.composite
def feedback(draw):
    return Feedback(
        event_id=draw(st.integers(0, 30).map(str)),
        user_id=draw(users),
        item_id=draw(items),
        behaviour=draw(st.sampled_from(["", "click"])),
        value=draw(st.none() | st.sampled_from([0.5, 4.0])),
        seconds=NOW - HOUR * draw(st.integers(0, 5)),
        version=draw(st.sampled_from(["", "1"])),
        propensity=draw(st.none() | st.just(0.25)),
    )


operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(feedback(), max_size=4)),
        st.tuples(st.just("erase"), users),
    ),
    max_size=12,
)


class Model:
    """What a store should say."""

    def __init__(self):
        self.events = []

    def append(self, events):
        new = 0
        for event in events:
            if event.event_id not in {e.event_id for e in self.events}:
                self.events.append(event)
                new += 1
        return new

    def erase(self, user):
        before = len(self.events)
        self.events = [e for e in self.events if e.user_id != user]
        return before - len(self.events)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=operations)
def test_a_store_says_what_a_list_would(open_store, steps):
    one, other, model = open_store(), open_store(), Model()
    for user in ("ann", "bob", "ü 日"):
        one.erase(user)  # of the example before
    for name, argument in steps:
        assert getattr(one, name)(argument) == getattr(model, name)(argument)
        for user in ("ann", "bob", "ü 日"):
            own = [e for e in model.events if e.user_id == user]
            assert other.history(user) == own
            assert other.history(user, 2) == own[-2:]
    assert [event for _, event in read_log(other, page=3)] == model.events
    numbers = [number for number, _ in read_log(other)]
    assert numbers == sorted(set(numbers))
    for since in (NOW - 2 * HOUR, 0):
        counts = collections.Counter(
            e.item_id for e in model.events if e.seconds // HOUR >= max(since, NOW - 99 * HOUR) // HOUR
        )
        wanted = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
        assert other.trending(max(since, NOW - 99 * HOUR), 2) == wanted[:2]


def test_items_come_in_are_changed_and_hidden_for_every_process(open_store):
    one, other = open_store(), open_store()
    first = AddedItem(item_id="x1", title="A film & more", categories=("drama", "new"), seconds=NOW)
    assert (other.items(), other.hidden()) == ({}, frozenset())
    start = other.revision()
    one.put_item(first)
    one.put_item(AddedItem(item_id="x0", title="Another"))
    assert list(other.items()) == ["x0", "x1"]
    assert other.items()["x1"] == first
    one.put_item(AddedItem(item_id="x1", title="Renamed"))
    one.hide("x1")
    one.hide("7")
    assert other.items()["x1"].title == "Renamed"
    assert other.hidden() == {"x1", "7"}
    one.hide("7", hidden=False)
    assert other.hidden() == {"x1"}
    assert other.revision() == start + 6


@given(user=names, item=names, event=names)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_an_id(open_store, user, item, event):
    store = open_store()
    found = Feedback(event_id=event, user_id=user, item_id=item, seconds=NOW)
    store.erase(user)
    store.append([found])
    assert store.history(user)[-1:] == [found]
    assert store.erase(user) == 1
    assert store.history(user) == []


def test_threads_share_a_store_and_lose_nothing(open_store):
    store, other = open_store(), open_store()
    failures = []

    def work(worker):
        try:
            for number in range(30):
                event = Feedback(
                    event_id=f"{worker}-{number}", user_id=f"u{worker}", item_id="1", seconds=NOW
                )
                assert store.append([event]) == 1
                assert other.history(f"u{worker}")[-1] == event, "read your writes"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(list(read_log(store))) == 180
    assert store.trending(NOW, 1) == [("1", 180)]


WRITER = """
import sys, time
from jaxrec.serving.sqlite_store import SqliteStore
from jaxrec.serving.redis_store import RedisStore
from jaxrec.serving.store import Feedback
kind, where, name = sys.argv[1:]
store = SqliteStore(where) if kind == "sqlite" else RedisStore(where, prefix=name)
for number in range(100_000):
    store.append([Feedback(event_id=str(number), user_id="u", item_id="1", seconds=1)])
    print(number, flush=True)
"""


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_what_was_acknowledged_is_there_after_a_kill(kind, tmp_path, redis_url):
    where = str(tmp_path / "state.db") if kind == "sqlite" else redis_url
    name = uuid.uuid4().hex
    command = [sys.executable, "-c", WRITER, kind, where, name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        acknowledged = [int(writer.stdout.readline()) for _ in range(200)]
        writer.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in writer.stdout.read().split("\n")[:-1]]
    store = SqliteStore(where) if kind == "sqlite" else RedisStore(where, prefix=name)
    kept = [int(event.event_id) for event in store.history("u")]
    assert kept[: len(acknowledged)] == acknowledged
    assert len(kept) <= len(acknowledged) + 1
    store.close()


def test_what_cannot_be_opened_says_so(tmp_path):
    path = tmp_path / "state.db"
    store = SqliteStore(path)
    store._connection.execute("PRAGMA user_version = 9")
    store.close()
    with pytest.raises(ValueError, match="is of format 9, and this program reads format 1"):
        SqliteStore(path)
    with pytest.raises(ConnectionError, match="no Redis server answers there"):
        RedisStore(f"unix://{tmp_path}/nobody.sock")


def test_a_redis_that_does_not_answer_is_waited_for_once(redis_url, monkeypatch):
    monkeypatch.setattr(redis_store, "AWAY_SECONDS", 0.6)
    store = RedisStore(redis_url, prefix="away:", timeout_seconds=0.2)
    other = redis.Redis.from_url(redis_url)
    other.client_pause(500)
    began = time.monotonic()
    with pytest.raises(redis.TimeoutError):
        store.revision()
    waited = time.monotonic()
    with pytest.raises(redis.ConnectionError, match="a moment ago"):
        store.history("u")
    assert waited - began >= 0.2 > 10 * (time.monotonic() - waited)
    time.sleep(0.7)
    assert store.revision() == 0
    store.close()
    other.close()
