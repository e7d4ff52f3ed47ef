"""The server over real sockets: what no request can do to it, whom it lets go, how it ends."""

import http.client
import itertools
import json
import logging
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import uvicorn
import uvloop

from jaxrec.serving.app import make_app
from jaxrec.serving.connections import bounded_connections
from jaxrec.serving.engine import Engine
from jaxrec.serving.guard import Limits
from jaxrec.serving.measures import Measures
from jaxrec.serving.service import Service, ServiceOptions
from jaxrec.serving.sqlite_store import SqliteStore

LIMITS = Limits(read_seconds=0.5, connections=20)


@pytest.fixture(scope="module")
def port(version, tmp_path_factory):
    """A server in a thread; at the end it has failed at nothing."""
    measures = Measures()
    state = tmp_path_factory.mktemp("state") / "state.db"
    service = Service(SqliteStore(state), Engine(), ServiceOptions(), measures)
    service.live.install(version)
    config = uvicorn.Config(
        make_app(service, LIMITS, measures),
        log_config=None,
        access_log=False,
        http=bounded_connections(LIMITS),
        ws="none",
        timeout_keep_alive=2,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    listener = socket.socket()
    listener.setsockopt(
        socket.SOL_SOCKET, socket.SO_SNDBUF, 4096
    )  # so that an answer that is not read is noticed soon
    listener.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=uvloop.run, args=(server.serve([listener]),))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    errors = Errors()
    logging.getLogger().addHandler(errors)
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()
    logging.getLogger().removeHandler(errors)
    assert b'status="5' not in measures.text()
    assert not errors.seen


class Errors(logging.Handler):
    """What a server's log says of failures."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.seen = []

    def emit(self, record):
        self.seen.append(record.getMessage())


def ask(port, path, body=None, method=None, **headers):
    """Status, headers and answer of a request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    content = None if body is None else json.dumps(body).encode()
    connection.request(method or ("GET" if body is None else "POST"), path, content,
                       {"content-type": "application/json", **headers})  # fmt: skip
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def answers(port):
    status, _, content = ask(port, "/v1/recommend", {"history": [1, 2], "k": 3})
    return status == 200 and len(json.loads(content)["items"]) == 3


def kept_seconds(port, pieces, pause=0.05, most=10.0):
    """How long a connection is kept for one that sends these pieces, and then nothing."""
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(pause)
        while time.monotonic() - started < most:
            try:
                connection.sendall(next(pieces, b""))
                if not connection.recv(1 << 16):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
    return time.monotonic() - started


KINDS = ("deep", "huge_body", "lengths", "chunks", "encodings", "paths", "headers", "no_end", "pipeline", "types",
         "values", "keys", "mutations", "slow")  # fmt: skip


def test_the_kinds_are_all_tried(raw_requests):
    assert set(raw_requests.KINDS) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_comes_is_refused_and_the_next_request_is_answered(port, raw_requests, kind):
    draw = random.Random(kind)
    for _ in range(4):  # benchmarks/fuzzing.py sends thousands
        answer = raw_requests.talk(port, raw_requests.KINDS[kind](draw), patience_seconds=0.7)
        assert max(answer.statuses, default=0) < 500
    assert answers(port)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (r'{"\ud800": 1}', 422),
        (r'{"boosts": {"\ud800": 1.0}}', 422),
        (r'{"user_id": "\ud800"}', 422),
        (r'{"k": true}', 422),
        (r'{"k": "10"}', 422),
        (r'{"diversity": NaN}', 422),
        (r'{"boosts": {"Drama": 1e6}, "history": [1]}', 200),
        (r'{"boosts": {"Drama": 1e308}, "history": [1]}', 422),
        ('{"k": ' + "9" * 5_000 + "}", 422),
        ('{"exclude": [' + "1," * 999 + "1" + " " * 200_000 + "]}", 200),
        (json.dumps({"k": 1}).encode("utf-16"), 400),
        (json.dumps({"k": 1}).encode("utf-32"), 400),
        (b"\xef\xbb\xbf" + b"[" * 13 + b"]" * 13, 400),
    ],
)
def test_odd_json_is_an_error_that_can_be_said(port, raw_requests, body, status):
    content = body if isinstance(body, bytes) else body.encode()
    answer = raw_requests.talk(port, [raw_requests.request("/v1/recommend", content)])
    assert answer.statuses == (status,)


def test_errors_of_every_layer_have_one_form(port, raw_requests):
    for path, method, status in (
        ("/nothing", "GET", 404),
        ("/v1/recommend", "PUT", 405),
        ("/v1/about", "BREW", 400),
    ):
        found, headers, content = ask(port, path, method=method)
        assert found == status
        assert headers["content-type"] == "application/json"
        assert set(json.loads(content)) == {"error"}
    assert "POST" in ask(port, "/v1/recommend", method="PUT")[1]["allow"]


def test_heads_are_bounded(port, raw_requests):
    def status(*headers, path="/v2/health/live"):
        return raw_requests.talk(port, [raw_requests.request(path, None, headers, "GET")]).statuses

    assert status(*["a: b"] * 99) == (200,)
    assert status(*["a: b"] * 100) == (400,)
    assert status("a: " + "b" * 30_000) == (200,)
    assert status("a: " + "b" * 33_000) == (400,)
    assert status(path="/" + "a" * 33_000) == (400,)
    endless = itertools.repeat(b"a" * 1_000)
    assert kept_seconds(port, itertools.chain([b"GET / HTTP/1.1\r\na: "], endless), pause=0.001) < 5


def test_a_client_is_waited_for_no_longer_than_is_said(port, raw_requests):
    whole = raw_requests.request("/v1/recommend", b"{}")
    chunked = raw_requests.request("/v1/recommend", None, ["transfer-encoding: chunked"])
    for pieces in (
        iter(()),
        iter([whole[:20]]),
        (whole[at : at + 1] for at in range(len(whole))),
        itertools.repeat(b"\r\n"),
        iter([whole[:-1]]),
        itertools.chain([chunked], itertools.repeat(b"1\r\n \r\n")),
    ):
        assert LIMITS.read_seconds * 0.9 < kept_seconds(port, pieces, pause=0.1) < 4


def test_a_kept_connection_may_rest_and_be_slow_within_its_time(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    for _ in range(3):
        connection.request("GET", "/v2/health/ready")
        assert connection.getresponse().read() == b'{"ready":true}'
        time.sleep(2 * LIMITS.read_seconds)
    connection.close()


def test_many_requests_at_once_are_all_answered(port, raw_requests):
    one = raw_requests.request("/v1/recommend", json.dumps({"history": [1], "k": 1}).encode())
    assert raw_requests.talk(port, [one * 300], patience_seconds=5.0).statuses[:1] == (200,)
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(one * 300)
    connection.settimeout(20)
    received = b""
    while received.count(b"HTTP/1.1 200") < 300:
        piece = connection.recv(1 << 16)
        assert piece, received[-300:]
        received += piece
    connection.close()


def test_who_does_not_read_is_let_go(port, raw_requests):
    ask_page = raw_requests.request("/openapi.json", None, method="GET")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.settimeout(0.2)
        started = time.monotonic()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while time.monotonic() - started < 60:
                try:
                    connection.sendall(ask_page)
                except TimeoutError:
                    continue
    assert answers(port)


def test_what_follows_a_refusal_is_not_read(port, raw_requests):
    head = raw_requests.request("/v1/recommend", None, ["content-length: 200000", "authorization: none"])
    long = raw_requests.request("/nothing", None, ["content-length: 300000"])
    assert kept_seconds(port, itertools.chain([long], itertools.repeat(b"a" * 10))) < 1
    assert kept_seconds(port, itertools.chain([head], itertools.repeat(b"a" * 10))) < 4


def test_one_connection_too_many_is_told_to_come_back(port, raw_requests):
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(LIMITS.connections)]
    try:
        status, headers, _ = ask(port, "/v2/health/live")
        assert (status, headers["retry-after"]) == (429, "1")
    finally:
        for connection in held:
            connection.close()
    time.sleep(0.2)
    assert answers(port)


def test_sigterm_finishes_what_was_asked(bundles, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "jaxrec.serve",
        f"--model={bundles}",
        f"--port={port}",
        f"--state={tmp_path}/s.db",
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert "answers at" in server.stdout.readline()
    while True:
        try:
            assert ask(port, "/v2/health/ready")[0] == 200
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=30) for _ in range(6)]
    body = json.dumps({"history": list(range(1, 30)), "item_id": 50, "user_id": 1}).encode()
    for connection in connections:
        connection.request("POST", "/v1/explain", body, {"content-type": "application/json"})
    # The requests are in the server's hands when one that came after them is answered.
    assert ask(port, "/v2/health/live")[0] == 200
    server.send_signal(signal.SIGTERM)
    assert [connection.getresponse().status for connection in connections] == [200] * 6
    for connection in connections:
        connection.close()
    _, errors = server.communicate(timeout=60)
    assert server.returncode == 0, "what comes after the last answer was done, too"
    assert "Traceback" not in errors
    with pytest.raises(ConnectionRefusedError):
        ask(port, "/v2/health/live")
