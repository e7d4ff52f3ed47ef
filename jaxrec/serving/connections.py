"""HTTP connections with bounds: what uvicorn's own leave to a proxy in front of it.

A request's head must arrive within a time and a size, a client must read its answers, and nothing that comes after a
refusal is read. Bodies are bounded by `guard`, which sees them.
"""

import asyncio
import collections
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from jaxrec.serving.guard import Limits

__all__ = ["bounded_connections"]

_RAW_BYTES = 8  # of a message for each byte of its body, at most: a chunk of one byte has six


def bounded_connections(limits: Limits) -> type[HttpToolsProtocol]:
    """Uvicorn's protocol (its option `http`) within limits."""

    class Connection(_Connection):
        bounds = limits

    return Connection


class _Connection(HttpToolsProtocol):
    """One connection; see `asyncio.Protocol` and, for `on_...`, httptools' parser."""

    bounds: Limits

    _head_timer: asyncio.TimerHandle | None = None
    _answer_timer: asyncio.TimerHandle | None = None  # runs while the client does not read
    _in_head = _in_message = _turned = False  # in a message: its head, or its body
    _num_bytes = _head_bytes = 0

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._unanswered: collections.deque[RequestResponseCycle] = collections.deque()  # in their order

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for a head, or refuses the connection."""
        super().connection_made(transport)
        if len(self.connections) > self.bounds.connections:
            self._refuse("429 Too Many Requests", "too many connections.", "retry-after: 1\r\n")
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets it."""
        self._head_is_there()
        self._answer_is_read()
        self._drop_answers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Reads on, within the bounds."""
        self._turned = False
        super().data_received(data)
        if self.transport.is_closing():
            return
        # Of data in which a message began or ended nobody knows how much is of the next one.
        if not self._turned:
            self._num_bytes += len(data)
        in_body = self._in_message and not self._in_head
        most = self.bounds.head_bytes + (_RAW_BYTES * self.bounds.body_bytes if in_body else 0)
        if self._num_bytes > most:
            self.send_400_response("The request is too large.")
        # Whoever sends empty lines has begun no message, and is waited for as long as who has begun one.
        elif self._head_timer is None and (self._in_head or not (self._in_message or self._turned)):
            self._wait_for_head()

    def send_400_response(self, msg: str) -> None:
        """Says what is wrong as `app` does, and lets go."""
        self._refuse("400 Bad Request", msg)

    def on_message_begin(self) -> None:
        """A new request."""
        super().on_message_begin()
        self._turned = self._in_head = self._in_message = True
        self._num_bytes = self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        """A part of it."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One of the head, or of the trailer of a chunked body."""
        self._count(len(name) + len(value))
        if len(self.headers) >= self.bounds.headers:
            raise ValueError("too many headers")  # the parser's caller answers 400
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._head_is_there()
        self._in_head = False
        super().on_headers_complete()
        while self._unanswered and self._unanswered[0].response_complete:
            self._unanswered.popleft()
        self._unanswered.append(self.cycle)

    def on_message_complete(self) -> None:
        """The body is, too."""
        self._turned, self._in_message = True, False
        self._num_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer to a request of which more is to come is a refusal: the rest is not read."""
        unread = self._in_message and not self._in_head and not self.pipeline
        super().on_response_complete()
        if unread:
            self.transport.close()
        if self.transport.is_closing():
            self._wait_for_reader()

    def pause_writing(self) -> None:
        """The client does not read what it asked for."""
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        """It does again; of one that is to be closed the rest must be read in time, too."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._answer_is_read()

    def timeout_keep_alive_handler(self) -> None:
        """Idle for too long; who has not read the last answer yet will not."""
        if self.transport.get_write_buffer_size():
            self._abort()
        super().timeout_keep_alive_handler()

    def _refuse(self, status: str, why: str, also: str = "") -> None:
        body = json.dumps({"error": why})
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n{also}"
        self.transport.write(f"{head}connection: close\r\n\r\n{body}".encode())
        self.transport.close()
        self._drop_answers()
        self._wait_for_reader()

    def _abort(self) -> None:
        self.transport.abort()
        self._drop_answers()

    def _drop_answers(self) -> None:
        """What is being answered comes too late: to write to a connection that is closed is an error."""
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()

    def _count(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > self.bounds.head_bytes:
            raise ValueError("too large a head")

    def _wait_for_head(self) -> None:
        self._head_is_there()
        self._head_timer = self.loop.call_later(self.bounds.read_seconds, self._head_is_late)

    def _head_is_there(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        """The client was waited for long enough, unless it is waiting itself for the answer before."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._wait_for_head()
        else:
            self._abort()

    def _wait_for_reader(self) -> None:
        if self._answer_timer is None:
            self._answer_timer = self.loop.call_later(self.bounds.read_seconds, self._abort)

    def _answer_is_read(self) -> None:
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None
