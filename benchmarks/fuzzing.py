"""Sends a server what it should never have to see, and shows that it says no and works on.

Two fuzzers, one after the other, against one process:
- Schemathesis takes the OpenAPI page at its word and makes requests of it, valid ones, ones at the edges, wrong ones
  and sequences of them, and checks answers against the page.
- Raw sockets (`raw_requests.py`): deep JSON, huge bodies, broken chunks and lengths, bytes that are no text, paths that
  lead out, headers without end, slow and silent clients, mutations of valid requests; from a seed.

Bars: no answer of 500 or above, nothing that Schemathesis finds, a normal request is answered after each round of
kinds, the process lives, slow clients are let go, and its memory is flat over the second half.

    python benchmarks/fuzzing.py --seconds=120
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import raw_requests
import record
import served

THREADS = 4
GROWTH = 0.10
READ_SECONDS = 10.0  # that the server waits for a head or a body (`guard.Limits`)
UNREAD = "answers that nobody reads"
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "response_headers_conformance,negative_data_rejection,use_after_free"
)


def raw_fuzz(server: served.Server, seconds: float, seed: int) -> dict[str, Any]:
    """Rounds of all kinds until the time is over; statuses by kind, memory after each round."""
    draw = random.Random(seed)
    statuses: dict[str, collections.Counter[str]] = {
        kind: collections.Counter() for kind in raw_requests.KINDS
    }
    failures: list[str] = []
    rss: list[float] = []
    not_answered = connections = 0
    until = time.monotonic() + seconds
    with ThreadPoolExecutor(THREADS) as pool:
        while time.monotonic() < until and server.alive:
            for kind in raw_requests.KINDS:
                seeds = [draw.random() for _ in range(THREADS)]
                for one, status in pool.map(lambda one, kind=kind: (one, tried(server, kind, one)), seeds):
                    statuses[kind][str(status)] += 1
                    connections += 1
                    if status >= 500:
                        failures.append(f"{kind}, seed {one}: status {status}")
                not_answered += not answers(server)
            rss.append(server.rss_bytes / 2**20)
    return {
        "connections": connections,
        "statuses": {kind: dict(sorted(counts.items())) for kind, counts in statuses.items()},
        "server_errors": failures,
        "normal_requests_not_answered": not_answered,
        "rss_mib": [round(value, 1) for value in rss],
    }


def tried(server: served.Server, kind: str, seed: float) -> int:
    """The worst status of a connection; 0 = closed or left without one, -1 = not even connected."""
    draw = random.Random(seed)
    plan = raw_requests.KINDS[kind](draw)
    patience = raw_requests.QUIET.get(kind, 3.0)
    try:
        answer = raw_requests.talk(
            server.port, plan, patience_seconds=patience, half_close=draw.random() < 0.2
        )
    except OSError:
        return -1
    return max(answer.statuses, default=0)


def answers(server: served.Server) -> bool:
    """Whether a normal request is answered as it should be."""
    client = served.Client(server.port, timeout=20)
    try:
        status, answer = client.post("/v1/recommend", {"history": [1, 2, 3], "k": 5})
        return status == 200 and len(answer["items"]) == 5
    except OSError:
        return False
    finally:
        client.close()


def slow_clients(server: served.Server) -> dict[str, float]:
    """Seconds until the server lets go of clients that send a byte a second, or nothing, or read nothing."""
    body = raw_requests.request("/v1/recommend", b"{}")
    chunked = raw_requests.request("/v1/recommend", None, ["transfer-encoding: chunked"])
    plans: dict[str, Iterator[bytes]] = {
        "nothing": iter(()),
        "an empty line a second": itertools.repeat(b"\r\n"),
        "a head, a byte a second": (body[at : at + 1] for at in range(len(body))),
        "half a body": iter([body[:-1]]),
        "a chunk a second": itertools.chain([chunked], itertools.repeat(b"1\r\n \r\n")),
    }
    with ThreadPoolExecutor(len(plans) + 1) as pool:
        found = {name: pool.submit(held_seconds, server.port, text) for name, text in plans.items()}
        found[UNREAD] = pool.submit(unread_seconds, server)
        return {name: round(result.result(), 1) for name, result in found.items()}


def held_seconds(port: int, pieces: Iterator[bytes], most: float = 60.0) -> float:
    """How long a connection is kept for one that sends a piece a second, and then nothing."""
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection, contextlib.suppress(OSError):
        connection.settimeout(1.0)
        while time.monotonic() - started < most:
            connection.sendall(next(pieces, b""))
            with contextlib.suppress(TimeoutError):
                if not connection.recv(1 << 16):
                    break
    return time.monotonic() - started


def unread_seconds(server: served.Server, most: float = 90.0) -> float:
    """How long a connection is kept for one that asks all the time and reads nothing."""
    started = time.monotonic()
    ask = raw_requests.request("/openapi.json", None, method="GET")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.settimeout(1.0)
        while time.monotonic() - started < most:
            try:
                connection.sendall(ask)
            except TimeoutError:
                continue
            except OSError:
                break
    return time.monotonic() - started


def schemathesis(server: served.Server, seconds: float, seed: int, log: Path) -> dict[str, Any]:
    """What `schemathesis run` finds on the server's own OpenAPI page."""
    program = Path(sys.executable).with_name("schemathesis")
    command = str(program) if program.exists() else shutil.which("schemathesis")
    if command is None:
        raise RuntimeError("schemathesis is wanted: pip install schemathesis")
    with log.open("w") as out, tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [
                *(command, "run", f"http://127.0.0.1:{server.port}/openapi.json", f"--checks={CHECKS}"),
                *(f"--seed={seed}", f"--max-time={max(1, int(seconds))}", "--continue-on-failure"),
                *("--warnings=off", "--suppress-health-check=all", "--request-timeout=30"),
            ],
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env={**os.environ, "NO_COLOR": "1", "COLUMNS": "120"},
            check=False,
        )
    text = log.read_text()
    cases = re.search(r"(\d+) generated", text)
    titles = re.findall(r"^- (.+)$", text, flags=re.M)
    return {
        "status": done.returncode,
        "cases": int(cases[1]) if cases else 0,
        "failures": dict(collections.Counter(titles)),
        "tail": [] if done.returncode == 0 else [line[:200] for line in text.splitlines()[-60:]],
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="of each of the two fuzzers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, metavar="DIR", help="an exported version; default: one is made")
    return parser.parse_args()


def main() -> int:
    """Schemathesis, slow clients, raw sockets."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="fuzzing-") as name:
        base = Path(name)
        model = served.version_at(base / "exports" / "v1", arguments.model)
        with served.Server(model, f"{base}/state.db", base / "server.log") as server:
            server.wait_ready()
            page = schemathesis(server, arguments.seconds, arguments.seed, base / "schemathesis.log")
            print(f"schemathesis: {page['cases']} cases, {page['failures']}", flush=True)
            held = slow_clients(server)
            print(f"slow clients are let go after {held}", flush=True)
            raw = raw_fuzz(server, arguments.seconds, arguments.seed)
            metrics = served.Client(server.port).get("/metrics")[1] if server.alive else ""
            lives, files = server.alive, server.num_files
            errors = server.log_lines("Traceback", "a request failed", "Exception in", "Error: ")
    rss = raw["rss_mib"]
    half = len(rss) // 2
    then = statistics.median(rss[half : half + max(1, half // 4)])
    counted = sum(
        float(line.rpartition(" ")[2])
        for line in metrics.splitlines()
        if line.startswith("jaxrec_requests_total") and re.search(r'status="5', line)
    )
    unread = held.pop(UNREAD)
    bars = [
        record.Bar(name="the server lives", value=lives, limit=1),
        record.Bar(name="raw connections", value=raw["connections"], limit=5 * arguments.seconds),
        record.Bar(name="raw connections answered with 5xx", value=len(raw["server_errors"]), limit=0, at_most=True),
        record.Bar(name="requests that the server counted with 5xx", value=counted, limit=0, at_most=True),
        record.Bar(name="normal requests not answered", limit=0, at_most=True,
                   value=raw["normal_requests_not_answered"]),
        record.Bar(name="cases of Schemathesis", value=page["cases"], limit=5 * arguments.seconds),
        record.Bar(name="findings of Schemathesis, or its status", limit=0, at_most=True,
                   value=max(len(page["failures"]), page["status"])),
        record.Bar(name="seconds that a client that reads nothing is kept", value=unread, limit=75, at_most=True),
        record.Bar(name="seconds that other slow clients are kept", value=max(held.values()),
                   limit=2 * READ_SECONDS, at_most=True),
        record.Bar(name="errors in the server's log", value=len(errors), limit=0, at_most=True),
        record.Bar(name="memory at the end over that at half time", limit=1 + GROWTH, at_most=True,
                   value=statistics.median(rss[-max(1, half // 4):]) / then),
        record.Bar(name="open files at the end", value=files, limit=60, at_most=True),
    ]  # fmt: skip
    raw["server_errors"] = raw["server_errors"][:30]
    figures = {
        "schemathesis": page,
        "slow_clients_kept_seconds": {**held, UNREAD: unread},
        "raw": raw,
        "errors": errors[:20],
    }
    return record.finish("fuzzing", figures, bars)


if __name__ == "__main__":
    sys.exit(main())
