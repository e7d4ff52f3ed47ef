"""What stands between the network and the server: limits before anything is parsed, tokens, headers.

Bodies are bounded in size, in time and in depth; clients in requests a second. No request names a path or a URL that is
opened. Source of the list: OWASP API Security Top 10, 2023.
"""

import asyncio
import collections
import dataclasses
import hmac
import json
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import numpy as np

from jaxrec.serving.measures import Measures

__all__ = ["Guard", "Limits"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEALTH_PATHS = ("/v2/health/live", "/v2/health/ready")  # for whoever restarts the server
PAGE_PATHS = (
    "/",
    "/docs",
)  # and all below /page/: the same for everybody, without data; the page asks for the token
MOST_CLIENTS = 10_000  # whose rates are remembered
# What a byte of JSON does to the depth, as int8.
_STEPS = bytes({**dict.fromkeys(b"[{", 1), **dict.fromkeys(b"]}", 255)}.get(byte, 0) for byte in range(256))
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may ask of the server.

    Attributes:
      body_bytes: of a request.
      head_bytes, headers: of its head: size and number.
      depth: of lists and objects within each other.
      read_seconds: for the head to arrive, and for the body; as long is waited for a client that does not read.
      connections: at once.
      requests_per_second: of a client, on average; 0 = no limit.
      burst: requests at once above that.
      hosts: names that the `Host` of a request may have, in small letters; () = any. Without a token somebody else's
        page could reach a server on loopback through the user's browser, by a name of its own that leads there.
      token: a bearer token that every request but those for health and the page must have; "" = none.
    """

    body_bytes: int = 256 * 1024
    head_bytes: int = 32 * 1024
    headers: int = 100
    depth: int = 12
    read_seconds: float = 10.0
    connections: int = 1_000
    requests_per_second: float = 0.0
    burst: int = 50
    hosts: tuple[str, ...] = ()
    token: str = dataclasses.field(default="", repr=False)


class Guard:
    """ASGI middleware."""

    def __init__(self, app: App, limits: Limits, measures: Measures):
        self._app, self._limits, self._measures = app, limits, measures
        self._buckets: collections.OrderedDict[str, tuple[float, float]] = collections.OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers what is refused itself, and hands on what is left."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500
        request_id = uuid.uuid4().hex[:16].encode()

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_HEADERS, (b"x-request-id", request_id)]
            await send(message)

        try:
            refused = self._refusal(scope)
            if refused is not None:
                await _refuse(with_headers, *refused)
                return
            body = await self._body(scope, receive)
            if isinstance(body, tuple):
                await _refuse(with_headers, *body)
                return
            await self._app(scope, _again(body, receive), with_headers)
        finally:
            route = scope.get("route")
            # Never the raw path: a scanner would make a series of each one that it tries.
            name = getattr(route, "path_format", "other")
            self._measures.request(name, status, time.perf_counter() - started)

    def _refusal(self, scope: Scope) -> tuple[int, str, float] | None:
        if scope["path"] in HEALTH_PATHS:
            return None
        wait = self._wait(scope)  # first, so that tokens cannot be tried without limit
        if wait > 0:
            return 429, "too many requests from this client.", wait
        headers = dict(scope["headers"])
        if self._limits.hosts and _host(headers.get(b"host", b"")) not in self._limits.hosts:
            return 421, "this server answers under other names; --host-name=NAME adds one.", 0.0
        if self._limits.token and not _is_page(scope["path"]):
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._limits.token.encode()):
                return 401, "a bearer token is wanted: Authorization: Bearer TOKEN.", 0.0
        return None

    def _wait(self, scope: Scope) -> float:
        """Seconds until the client may ask again; 0 = now."""
        rate = self._limits.requests_per_second
        if not rate:
            return 0.0
        client = scope.get("client")
        name = client[0] if client else ""
        now = time.monotonic()
        left, then = self._buckets.pop(name, (float(self._limits.burst), now))
        left = min(self._limits.burst, left + (now - then) * rate)
        allowed = left >= 1.0
        self._buckets[name] = (left - 1.0 if allowed else left, now)
        if len(self._buckets) > MOST_CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1.0 - left) / rate

    async def _body(self, scope: Scope, receive: Receive) -> bytes | tuple[int, str, float]:
        """All of it, or why not."""
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        most = self._limits.body_bytes
        too_long = (413, f"a body of at most {most:,} bytes is read.", 0.0)
        if length.isdigit() and int(length) > most:
            return too_long
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._limits.read_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return 400, "the client went away.", 0.0
                    part = message.get("body", b"")
                    size += len(part)
                    if size > most:
                        return too_long
                    parts.append(part)
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            return 408, f"the body did not arrive within {self._limits.read_seconds:g} s.", 0.0
        body = b"".join(parts)
        if not _is_text(body):
            return 400, "a body is text in UTF-8.", 0.0
        depth = self._limits.depth
        if body.count(b"[") + body.count(b"{") > depth and depth_of(body) > depth:
            return 400, f"JSON of more than {depth} levels is not read.", 0.0
        return body


def _is_page(path: str) -> bool:
    return path in PAGE_PATHS or path.startswith("/page/")


def _host(header: bytes) -> str:
    """The name in a `Host` header, without the port."""
    name = header.decode("latin-1").lower()
    return name.rpartition("]")[0] + "]" if name.startswith("[") else name.partition(":")[0]


def depth_of(text: bytes) -> int:
    """The deepest level of lists and objects in JSON; of text that is none, that up to where a parser stops."""
    # First pairs of backslashes, so that a backslash that is left belongs to what follows it.
    plain = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    inside_string = np.cumsum(np.frombuffer(plain, np.uint8) == ord('"'), dtype=np.uint8) & 1
    steps = np.where(inside_string, np.int8(0), np.frombuffer(plain.translate(_STEPS), np.int8))
    return int(np.cumsum(steps, dtype=np.int32).max(initial=0))


def _is_text(body: bytes) -> bool:
    """Whether it is UTF-8 without NUL: parsers of JSON guess other encodings, in which depth is not seen."""
    try:
        body.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in body


def _again(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then what the client says next."""
    told = False

    async def next_message() -> MutableMapping[str, Any]:
        nonlocal told
        if not told:
            told = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return next_message


async def _refuse(send: Send, status: int, why: str, wait: float) -> None:
    body = json.dumps({"error": why}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if wait:
        headers.append((b"retry-after", str(max(1, round(wait))).encode()))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status in (408, 413):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
