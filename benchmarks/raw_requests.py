"""Bytes that a server should never have to see: what `fuzzing.py` and tests send over a socket.

Each kind of trouble (`KINDS`) makes one connection's plan: pieces of bytes and pauses between them. `talk` carries it
out and says what came back. Everything is drawn from a `random.Random`, so that a seed says it all.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

VALID: dict[str, dict[str, Any]] = {
    "/v1/recommend": {"user_id": "fuzz", "k": 5, "exclude": [1], "filter": {"any_of": ["Drama"]},
                      "boosts": {"Drama": 1.0}},
    "/v1/rank": {"history": [1, 2], "items": [3, "4"]},
    "/v1/similar": {"item_id": 1, "k": 3},
    "/v1/search": {"query": "toy story", "k": 3},
    "/v1/bundle": {"history": [1, 2], "size": 3, "diversity": 0.5},
    "/v1/explain": {"history": [1, 2, 3], "item_id": 6},
    "/v1/feedback": {"events": [{"user_id": "fuzz", "item_id": 1, "event_id": "e", "value": 1.5}]},
    "/v1/items/hide": {"item_id": 9, "hidden": False},
    "/v2/models/jaxrec/infer": {
        "inputs": [{"name": "history", "shape": [1, 2], "datatype": "INT64", "data": [1, 2]}]
    },
}  # fmt: skip
NUMBERS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1e308",
    "1e308",
    "9" * 400,
    "9" * 5000,
    "1e-400",
    "-0",
    "0x10",
    "1.0",
)
STRINGS = (r'"\ud800"', r'"\udfff\ud800"', r'"\u0000"', '""', '"' + "x" * 5000 + '"', '"\\"',
           r'"\u202e"', '"../../etc/passwd"',
           '"; DROP TABLE events"')  # fmt: skip
ODD_PATHS = (
    "/../../etc/passwd", "/page/../app.py", "/page/%2e%2e/guard.py", "/page/..%2fguard.py", "//", "//v1//recommend",
    "/page/%00", "/v1/users/%ff%fe", "/v1/users/" + "a" * 5000, "/" + "a" * 70_000, "/%", "/%zz", "/v1/users/..",
    "/v1/users/%0d%0aset-cookie:a", "/page/page.js%00.html", "/?" + "a=b&" * 3000, "*", "/\x7f",
    "http://other/v1/about",
    "/v1/users/\\..\\..", "/page/....//guard.py", "/v1/users/%ed%a0%80", "/openapi.json/..;/metrics",
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What came back on a connection.

    Attributes:
      statuses: of the answers, in their order.
      seconds: until the connection was closed or the client left.
    """

    statuses: tuple[int, ...]
    seconds: float


Plan = Sequence[bytes | float]  # pieces of bytes to send, seconds to wait between them


def request(path: str, body: bytes | None, headers: Sequence[str] = (), method: str = "POST") -> bytes:
    """A request as it should be, but for what is given."""
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", *headers]
    if body is not None:
        lines += ["content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + (body or b"")


def talk(port: int, plan: Plan, *, patience_seconds: float = 3.0, half_close: bool = False) -> Answer:
    """Carries out a plan, and reads until the server closes or says no more."""
    started = time.monotonic()
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        # The server may close at any time: that is an answer.
        with contextlib.suppress(OSError):
            for part in plan:
                if isinstance(part, float):
                    time.sleep(part)
                else:
                    connection.sendall(part)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        connection.settimeout(patience_seconds)
        with contextlib.suppress(OSError):
            while piece := connection.recv(1 << 16):
                received += piece
                if _whole(received):
                    connection.settimeout(0.05)
    statuses = tuple(int(status) for status in re.findall(rb"^HTTP/1\.1 (\d{3}) ", received, flags=re.M))
    return Answer(statuses, time.monotonic() - started)


def _whole(received: bytes) -> bool:
    """Whether at least the first answer is there to its end."""
    head, separator, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    return bool(separator) and length is not None and len(body) >= int(length[1])


def _path(draw: random.Random) -> str:
    return draw.choice(list(VALID))


def _body(path: str) -> bytes:
    return json.dumps(VALID[path]).encode()


def deep(draw: random.Random) -> Plan:
    """Lists and objects within each other."""
    levels = draw.choice([13, 100, 1_000, 60_000])
    opening, closing = draw.choice([(b"[", b"]"), (b'{"a":', b"}"), (b'{"filter":[', b"]}")])
    body = opening * levels + draw.choice([b"", b"1" + closing * levels])
    encoding = draw.choice(["", "", "utf-16", "utf-32"])
    return [request(_path(draw), body.decode().encode(encoding)[:260_000] if encoding else body[:260_000])]


def huge_body(draw: random.Random) -> Plan:
    """More than is read, with and without its length said; it comes as long as it is taken."""
    length = draw.choice([262_145, 10**7, 10**12, 10**18])
    pieces: list[bytes | float] = [b"a" * 65_536] * 40
    if draw.random() < 0.5:
        return [request(_path(draw), None, [f"content-length: {length}"]), *pieces]
    chunks = [b"10000\r\n" + b"a" * 65_536 + b"\r\n"] * 40
    return [request(_path(draw), None, ["transfer-encoding: chunked"]), *chunks]


def lengths(draw: random.Random) -> Plan:
    """Lengths that are none, or more than one."""
    length = draw.choice(
        ["-1", "+5", "0x10", "1e3", "", " ", "5, 5", "9" * 30, "5\r\ncontent-length: 6", "\xb2", "5\0"]
    )
    also = draw.choice([[], ["transfer-encoding: chunked"], ["transfer-encoding: gzip, chunked"]])
    return [request(_path(draw), None, [f"content-length: {length}", *also]) + b"12345"]


def chunks(draw: random.Random) -> Plan:
    """A chunked body that is broken."""
    body = draw.choice(
        [b"zz\r\n{}\r\n0\r\n\r\n", b"-1\r\n{}\r\n", b"5\r\n{}\r\n0\r\n\r\n", b"2\r\n{}", b"ffffffffffffffff\r\n{}",
         b"2;" + b"e" * 70_000 + b"\r\n{}\r\n0\r\n\r\n", b"2\n{}\n0\n\n", b"\r\n\r\n",
         b"0\r\n" + b"t: " + b"v" * 70_000,
         b"0\r\n" + b"t: v\r\n" * 20_000 + b"\r\n", b"1\r\n{\r\n" * 30_000]
    )  # fmt: skip
    return [
        request(_path(draw), None, ["transfer-encoding: chunked", "content-type: application/json"]) + body
    ]


def encodings(draw: random.Random) -> Plan:
    """No UTF-8, NUL, bytes of everything."""
    path = _path(draw)
    bad = draw.choice(
        [
            b"\xff",
            b"\xc3\x28",
            b"\xed\xa0\x80",
            b"\0",
            b"\xef\xbb\xbf",
            b"\xf4\x90\x80\x80",
            draw.randbytes(20),
        ]
    )
    body = _body(path)
    at = draw.randrange(len(body))
    return [request(path, draw.choice([body[:at] + bad + body[at:], bad, draw.randbytes(500)]))]


def paths(draw: random.Random) -> Plan:
    """Out of the tree, encoded twice, long, none."""
    method = draw.choice(
        ["GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "TRACE", "CONNECT", "BREW", "G\0T"]
    )
    path = draw.choice([*ODD_PATHS, "/" + "".join(chr(draw.randrange(33, 256)) for _ in range(30))])
    return [request(path, draw.choice([None, b"{}"]), method=method)]


def headers(draw: random.Random) -> Plan:
    """Many, long, without end, odd."""
    kind = draw.randrange(7)
    odd = ["a", ": b", "a b: c", "a:\0", "host: other", "expect: 100-continue",
           "upgrade: websocket\r\nconnection: upgrade",
           "authorization: Bearer \xff", "connection: close, keep-alive", "transfer-encoding: chunked, chunked",
           "content-type: text/xml", " folded: yes", "x: \r\n y", "\x80: a"]  # fmt: skip
    made = [
        [f"h{number}: v" for number in range(5_000)],
        ["x: " + "v" * 100_000],
        ["n" * 100_000 + ": v"],
        [draw.choice(odd) for _ in range(3)],
        ["x-a: b"] * 99,
        [draw.choice(odd)],
        ["cookie: " + "a=b; " * 6_000],
    ][kind]
    body = draw.choice([None, b"{}"])
    return [request("/v1/recommend", body, made)]


def no_end(draw: random.Random) -> Plan:
    """A head or a body that stops in the middle."""
    path = _path(draw)
    whole = request(path, _body(path))
    return [whole[: draw.randrange(1, len(whole))]]


def pipeline(draw: random.Random) -> Plan:
    """Many requests at once, the last one perhaps broken."""
    path = _path(draw)
    return [
        request(path, _body(path)) * draw.choice([2, 20]) + draw.choice([b"", b"\r\n\r\n", b"GET", b"\0" * 9])
    ]


def types(draw: random.Random) -> Plan:
    """Another type of content than that of the body."""
    path = _path(draw)
    kind = draw.choice(["text/plain", "application/xml", "multipart/form-data; boundary=a",
                        "application/json; charset=utf-16",
                        "\xff/\xff", "", "application/x-www-form-urlencoded", "application/json" * 50])  # fmt: skip
    body = draw.choice([_body(path), b"<a/>", b"--a\r\n\r\n--a--", b"a=b", b""])
    head = request(path, None, [f"content-type: {kind}", f"content-length: {len(body)}"])
    return [head + body]


def values(draw: random.Random) -> Plan:
    """A valid request with another value somewhere, written as JSON has it or not."""
    path = _path(draw)
    text = _body(path).decode()
    parts = list(re.finditer(r'(?<=[:\[ ])("[^"]*"|-?[\d.]+|true|false|null)(?=[,\]}])', text))
    odd = draw.choice([*NUMBERS, *STRINGS, "null", "true", "[]", "{}", "[" * 5 + "]" * 5, '{"$ref": "#"}'])
    if parts:
        found = draw.choice(parts)
        text = text[: found.start()] + odd + text[found.end() :]
    return [request(path, text.encode())]


def keys(draw: random.Random) -> Plan:
    """Keys twice, unknown ones, ones that are no text."""
    path = _path(draw)
    text = _body(path).decode()
    key = draw.choice(
        [
            r'"\ud800"',
            '"k"',
            '"__proto__"',
            '""',
            '"' + "k" * 100_000 + '"',
            r'"\u0000"',
            '"user_id"',
            '"boosts"',
        ]
    )
    value = draw.choice(["1", '{"\\ud800": 1}', "null", '{"a": NaN}', '{"Drama": 1e308}', "[]"])
    return [request(path, f"{{{key}: {value}, {text[1:]}".encode())]


def mutations(draw: random.Random) -> Plan:
    """Bytes of a valid request that are changed, lost, doubled."""
    path = _path(draw)
    whole = bytearray(request(path, _body(path)))
    for _ in range(draw.randint(1, 8)):
        at = draw.randrange(len(whole))
        how = draw.randrange(4)
        if how == 0:
            whole[at] = draw.randrange(256)
        elif how == 1:
            del whole[at : at + draw.randint(1, 9)]
        elif how == 2:
            whole[at:at] = whole[at : at + draw.randint(1, 30)]
        else:
            whole[at:at] = draw.randbytes(draw.randint(1, 9))
    return [bytes(whole)]


def slow(draw: random.Random) -> Plan:
    """A byte now and then, or nothing any more."""
    path = _path(draw)
    whole = request(path, _body(path))
    start = draw.choice([0, 10, len(whole) - 20])
    return [whole[:start], *(part for byte in whole[start : start + 10] for part in (bytes([byte]), 0.1))]


KINDS: dict[str, Callable[[random.Random], Plan]] = {
    kind.__name__: kind
    for kind in (deep, huge_body, lengths, chunks, encodings, paths, headers, no_end, pipeline, types, values, keys,
                 mutations, slow)
}  # fmt: skip
QUIET = {"no_end": 0.3, "slow": 0.3}  # seconds of patience where the server rightly waits for more
