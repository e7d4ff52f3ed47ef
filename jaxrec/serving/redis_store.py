"""The state at a Redis server, for replicas. What outlives a crash of Redis is for its own settings to say."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import redis

from jaxrec.serving.store import HOUR, MOST_HISTORY, AddedItem, Feedback

__all__ = ["RedisStore"]

KEPT_HOURS = 24 * 30  # of trends
AWAY_SECONDS = 3.0
KEPT_IDS = 7 * 24 * HOUR  # seconds for which an event that comes again is known

# One script an operation: nothing of another client comes between its commands.
_APPEND = """
local prefix, new = ARGV[1], 0
for at = 5, #ARGV, 5 do
    local id, user, item, hour, text = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
    if redis.call('SET', prefix .. 'id:' .. id, 1, 'NX', 'EX', ARGV[2]) then
        local number = redis.call('INCR', prefix .. 'number')
        redis.call('XADD', prefix .. 'log', number .. '-0', 'event', text)
        redis.call('RPUSH', prefix .. 'user:' .. user, number .. ' ' .. hour .. ' ' .. text)
        redis.call('ZINCRBY', prefix .. 'hour:' .. hour, 1, item)
        redis.call('EXPIRE', prefix .. 'hour:' .. hour, ARGV[3])
        new = new + 1
    end
end
return new
"""
_ERASE = """
local prefix, user = ARGV[1], ARGV[2]
local key = prefix .. 'user:' .. user
local events = redis.call('LRANGE', key, 0, -1)
for _, entry in ipairs(events) do
    local number, hour, text = entry:match('^(%d+) (%-?%d+) (.*)$')
    redis.call('XDEL', prefix .. 'log', number .. '-0')
    local event = cjson.decode(text)
    local hours = prefix .. 'hour:' .. hour
    if redis.call('EXISTS', hours) == 1 then
        redis.call('ZINCRBY', hours, -1, event.item_id)
        redis.call('ZREMRANGEBYSCORE', hours, '-inf', 0)
    end
    redis.call('DEL', prefix .. 'id:' .. event.event_id)
end
redis.call('DEL', key)
return #events
"""


P = ParamSpec("P")
R = TypeVar("R")


def _unless_away(
    method: Callable[Concatenate["RedisStore", P], R],
) -> Callable[Concatenate["RedisStore", P], R]:
    """A method that fails at once for some seconds after the server did not answer: a request waits for it on the loop
    that answers all others, and once is enough."""

    @functools.wraps(method)
    def checked(self: "RedisStore", *arguments: P.args, **keywords: P.kwargs) -> R:
        if time.monotonic() < self._away_until:
            raise redis.ConnectionError("the server did not answer a moment ago.")
        try:
            return method(self, *arguments, **keywords)
        except (redis.ConnectionError, redis.TimeoutError):
            self._away_until = time.monotonic() + AWAY_SECONDS
            raise

    return checked


class RedisStore:
    """See `store.Store`."""

    def __init__(self, url: str, *, prefix: str = "jaxrec:", timeout_seconds: float = 2.0):
        """Connects.

        Args:
          url: `redis://HOST:PORT/NUMBER`, `rediss://` with TLS, or `unix://PATH`; a password in it is never logged.
          prefix: of every key, so that several services can share a server.

        Raises:
          ConnectionError: nobody answers.
        """
        self._prefix, self._away_until = prefix, 0.0
        self._client = redis.Redis.from_url(
            url,
            socket_timeout=timeout_seconds,
            socket_connect_timeout=timeout_seconds,
            decode_responses=True,
        )
        try:
            self._client.ping()
        except redis.RedisError as error:
            raise ConnectionError(
                f"no Redis server answers there ({type(error).__name__}); start one, or use SQLite."
            ) from error
        self._append = self._client.register_script(_APPEND)
        self._erase = self._client.register_script(_ERASE)

    @_unless_away
    def append(self, events: Sequence[Feedback]) -> int:
        """See `Store`."""
        arguments: list[Any] = [self._prefix, KEPT_IDS, KEPT_HOURS * HOUR, ""]
        for event in events:
            hour = event.seconds // HOUR
            arguments += [event.event_id, event.user_id, event.item_id, hour, event.to_json()]
        return int(cast(int, self._append(args=arguments)))

    @_unless_away
    def history(self, user_id: str, limit: int = MOST_HISTORY) -> list[Feedback]:
        """See `Store`."""
        entries = self._client.lrange(self._key("user:" + user_id), -min(limit, MOST_HISTORY), -1)
        return [Feedback.from_json(entry.split(" ", 2)[2]) for entry in cast(list[str], entries)]

    @_unless_away
    def erase(self, user_id: str) -> int:
        """See `Store`."""
        return int(cast(int, self._erase(args=[self._prefix, user_id])))

    @_unless_away
    def trending(self, since: int, limit: int) -> list[tuple[str, int]]:
        """See `Store`; of the last thirty days at most."""
        first, last = since // HOUR, int(time.time()) // HOUR + 1
        hours = [self._key(f"hour:{hour}") for hour in range(max(first, last - KEPT_HOURS), last + 1)]
        if not hours:
            return []
        counts = cast(list[tuple[str, float]], self._client.zunion(hours, withscores=True))
        ordered = sorted(counts, key=lambda pair: (-pair[1], pair[0]))
        return [(item, int(count)) for item, count in ordered[:limit]]

    @_unless_away
    def log(self, after: int, limit: int) -> list[tuple[int, Feedback]]:
        """See `Store`."""
        rows = cast(
            list[tuple[str, dict[str, str]]],
            self._client.xrange(self._key("log"), min=f"{after + 1}-0", count=limit),
        )
        return [(int(number.split("-")[0]), Feedback.from_json(row["event"])) for number, row in rows]

    @_unless_away
    def put_item(self, item: AddedItem) -> None:
        """See `Store`."""
        with self._client.pipeline(transaction=True) as changes:
            changes.hset(self._key("items"), item.item_id, item.to_json())
            changes.incr(self._key("revision"))
            changes.execute()

    @_unless_away
    def items(self) -> Mapping[str, AddedItem]:
        """See `Store`."""
        rows = cast(dict[str, str], self._client.hgetall(self._key("items")))
        return {item: AddedItem.from_json(rows[item]) for item in sorted(rows)}

    @_unless_away
    def hide(self, item_id: str, hidden: bool = True) -> None:
        """See `Store`."""
        with self._client.pipeline(transaction=True) as changes:
            (changes.sadd if hidden else changes.srem)(self._key("hidden"), item_id)
            changes.incr(self._key("revision"))
            changes.execute()

    @_unless_away
    def hidden(self) -> frozenset[str]:
        """See `Store`."""
        return frozenset(cast(set[str], self._client.smembers(self._key("hidden"))))

    @_unless_away
    def revision(self) -> int:
        """See `Store`."""
        return int(cast(str | None, self._client.get(self._key("revision"))) or 0)

    def close(self) -> None:
        """See `Store`."""
        self._client.close()

    def _key(self, name: str) -> str:
        return self._prefix + name
