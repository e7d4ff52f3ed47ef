"""Clients of a server, in a process of their own: each sends its next request when it has the answer of the last.

    python benchmarks/serving_load.py --port=8000 --requests=bodies.jsonl --clients=16 --seconds=60

Prints one line of JSON: how many answers came and with which status, percentiles of their latency, and how much
processor time this process took for it.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np


class Client(asyncio.Protocol):
    """One keep-alive connection in a closed loop."""

    def __init__(self, requests: Iterator[bytes], until: float, done: asyncio.Future[None]):
        self._requests, self._until, self._done = requests, until, done
        self._received = b""
        self._sent = 0.0
        self.seconds: list[float] = []
        self.statuses: Counter[int] = Counter()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begins."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        """Counts an answer when it is whole, and sends the next request."""
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator or len(body) < _content_length(head):
            return
        self.seconds.append(time.perf_counter() - self._sent)
        self.statuses[int(head[9:12])] += 1
        self._received = b""
        if time.perf_counter() < self._until:
            self._send()
        else:
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        """Ends; a request that was cut off counts as status 0."""
        if self._received or error is not None or time.perf_counter() < self._until:
            self.statuses[0] += 1
        if not self._done.done():
            self._done.set_result(None)

    def _send(self) -> None:
        self._sent = time.perf_counter()
        self._transport.write(next(self._requests))


def _content_length(head: bytes) -> int:
    _, _, rest = head.lower().partition(b"\r\ncontent-length:")
    return int(rest.partition(b"\r\n")[0])


async def run(host: str, port: int, requests: Iterator[bytes], clients: int, seconds: float) -> list[Client]:
    """All clients, for the given time."""
    loop = asyncio.get_running_loop()
    until = time.perf_counter() + seconds
    made, ends = [], []
    for _ in range(clients):
        done: asyncio.Future[None] = loop.create_future()
        _, client = await loop.create_connection(functools.partial(Client, requests, until, done), host, port)
        made.append(client)
        ends.append(done)
    await asyncio.gather(*ends)
    return made


def in_turn(bodies: list[bytes], path: str, first: int) -> Iterator[bytes]:
    """The requests, again and again, from one of them on."""
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: "
    whole = [head.encode() + str(len(body)).encode() + b"\r\n\r\n" + body for body in bodies]
    at = first
    while True:
        yield whole[at % len(whole)]
        at += 1


def main() -> int:
    """Sends, and says what came back."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", default="/v1/recommend")
    parser.add_argument("--requests", type=Path, required=True, help="a body a line")
    parser.add_argument("--first", type=int, default=0, help="the line to begin with")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args()
    bodies = given.requests.read_bytes().splitlines()
    requests = in_turn(bodies, given.path, given.first)
    started, processor = time.perf_counter(), time.process_time()
    clients = asyncio.run(run(given.host, given.port, requests, given.clients, given.seconds))
    elapsed = time.perf_counter() - started
    seconds = np.concatenate([np.asarray(client.seconds) for client in clients])
    statuses = sum((client.statuses for client in clients), Counter[int]())
    percentiles = {f"p{q}_ms": float(np.percentile(seconds, q) * 1e3) for q in (50, 90, 99, 99.9)}
    answer = {
        "answers": len(seconds),
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "requests_per_second": len(seconds) / elapsed,
        **percentiles,
        "max_ms": float(seconds.max() * 1e3),
        "generator_processor_seconds": time.process_time() - processor,
        "seconds": elapsed,
    }
    print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
