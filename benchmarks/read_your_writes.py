"""Feeds back through one server and asks through another one, a millisecond later, while servers are killed.

Two servers share a state, SQLite and then Redis. Each of the clients takes an item of the list that it got last, says
through one server that the user took it, waits a millisecond, and asks the other server for the user's history and for
a list. A pair is stale where the history does not end with the item or the list still has it. At a third of the pairs
one server is killed (SIGKILL) and started again, at two thirds the other. A client that gets no answer asks the server
that lives, with the same `event_id`: what was taken before the kill must not count twice.

Bars: every pair done, none stale, and at the end the log has every acknowledged event exactly once and nothing else, in
each user's order.

    python benchmarks/read_your_writes.py --pairs=10000
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import http.client
import itertools
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import record
import served

from jaxrec.serving.redis_store import RedisStore
from jaxrec.serving.sqlite_store import SqliteStore
from jaxrec.serving.store import Store, read_log

WORKERS = 8
PAIRS_OF_A_USER = 20
WAIT_SECONDS = 0.001
PATIENCE_SECONDS = 120.0  # of a client for whom no server answers


class Worker(threading.Thread):
    """A client: its own users, a connection to each server."""

    def __init__(self, name: str, ports: list[int], pairs: int):
        super().__init__(name=name)
        self.pairs, self.done = pairs, 0
        self.acknowledged: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
        self.stale: list[str] = []
        self.failures: list[str] = []
        self.retries = self.known_already = 0
        self.seconds: list[float] = []
        self._clients = [served.Client(port, timeout=10) for port in ports]

    def run(self) -> None:
        """All pairs; a failure that is not a server's death ends the worker."""
        try:
            for number in range(self.pairs):
                self._pair(number)
                self.done += 1
        except Exception as error:
            self.failures.append(f"{self.name}: {type(error).__name__}: {error}")
        for client in self._clients:
            client.close()

    def _pair(self, number: int) -> None:
        user = f"{self.name}-{number // PAIRS_OF_A_USER}"
        first = number % 2
        events = self.acknowledged[user]
        if not events:
            self._listed = self._list(user, first)
        item = self._listed[number % len(self._listed)]
        event_id = f"{user}-{number}"
        event = {"user_id": user, "item_id": item, "event_id": event_id}
        started = time.perf_counter()
        answer = self._ask(first, "/v1/feedback", {"events": [event]})
        self.known_already += answer["known_already"]
        events.append((event_id, str(item)))
        time.sleep(WAIT_SECONDS)
        self._listed = self._list(user, 1 - first)
        self.seconds.append(time.perf_counter() - started)
        history = self._ask(1 - first, f"/v1/users/{user}", None)["history"]
        if item in self._listed:
            self.stale.append(f"{event_id}: item {item} is still in the list")
        if [str(event["item_id"]) for event in history] != [key for _, key in events]:
            self.stale.append(f"{event_id}: the history is not that which was acknowledged")

    def _list(self, user: str, server: int) -> list[Any]:
        answer = self._ask(server, "/v1/recommend", {"user_id": user, "k": 10, "deadline_ms": 60_000})
        return [item["item_id"] for item in answer["items"]]

    def _ask(self, server: int, path: str, body: Any) -> Any:
        """The answer of a server, or of the other one while that is away.

        Raises:
          RuntimeError: an answer that says no, or none for two minutes.
        """
        until = time.monotonic() + PATIENCE_SECONDS
        for attempt in itertools.count():
            client = self._clients[(server + attempt) % len(self._clients)]
            try:
                status, answer = client.get(path) if body is None else client.post(path, body)
            except (OSError, http.client.HTTPException):
                self.retries += 1
                if time.monotonic() > until:
                    raise RuntimeError("no server answers any more.") from None
                time.sleep(0.01)
                continue
            if status != 200:
                raise RuntimeError(f"{path}: status {status}: {str(answer)[:300]}")
            return answer
        raise AssertionError("unreachable")


def trial(name: str, state: str, model: Path, base: Path, pairs: int) -> dict[str, Any]:
    """All pairs on one kind of state, with two kills; what was seen."""
    shares = [pairs // WORKERS + (number < pairs % WORKERS) for number in range(WORKERS)]
    logs = [base / f"{name}-{number}.log" for number in range(2)]
    compiled = base / "compiled"
    with contextlib.ExitStack() as stack:
        servers = []
        for log in logs:
            servers.append(stack.enter_context(served.Server(model, state, log, compiled=compiled)))
            servers[-1].wait_ready()
        workers = [
            Worker(f"w{number}", [server.port for server in servers], share)
            for number, share in enumerate(shares)
        ]
        started = time.monotonic()
        for worker in workers:
            worker.start()
        kills = []
        for number, server in enumerate(servers):
            wait_for(workers, pairs * (number + 1) // 3)
            before = sum(worker.done for worker in workers)
            server.kill()
            server.start()
            back_seconds = server.wait_ready()
            kills.append(
                {"server": number, "after_pairs": before, "ready_again_seconds": round(back_seconds, 1),
                 "pairs_meanwhile": sum(worker.done for worker in workers) - before}
            )  # fmt: skip
            print(f"{name}: killed {kills[-1]}", flush=True)
        for worker in workers:
            worker.join()
        took = time.monotonic() - started
        errors = [line for server in servers for line in server.log_lines("Traceback", "a request failed")]
    store: Store = RedisStore(state) if name == "redis" else SqliteStore(state)
    lost, doubled, strange, disordered = compared(store, workers)
    store.close()
    seconds = np.array([value for worker in workers for value in worker.seconds])
    return {
        "pairs": sum(worker.done for worker in workers),
        "stale": [text for worker in workers for text in worker.stale],
        "failures": [text for worker in workers for text in worker.failures],
        "lost": lost,
        "doubled": doubled,
        "strange": strange,
        "users_out_of_order": disordered,
        "kills": kills,
        "requests_asked_again": sum(worker.retries for worker in workers),
        "events_taken_before_their_answer_was_lost": sum(worker.known_already for worker in workers),
        "seconds": round(took, 1),
        "pair_ms": {
            f"p{quantile}": round(float(np.quantile(seconds, quantile / 100)) * 1000, 1)
            for quantile in (50, 90, 99)
        },
        "errors": errors[:20],
    }


def wait_for(workers: list[Worker], pairs: int) -> None:
    """Until so many pairs are done, or no worker works any more."""
    while sum(worker.done for worker in workers) < pairs and any(worker.is_alive() for worker in workers):
        time.sleep(0.01)


def compared(store: Store, workers: list[Worker]) -> tuple[int, int, int, int]:
    """Acknowledged events that the log lacks, that it has twice, events nobody sent, users in another order."""
    kept: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
    for _, event in read_log(store):
        kept[event.user_id].append((event.event_id, event.item_id))
    said = {user: events for worker in workers for user, events in worker.acknowledged.items()}
    counts = collections.Counter(event for events in kept.values() for event in events)
    sent = {event for events in said.values() for event in events}
    return (
        len(sent - counts.keys()),
        sum(count - 1 for count in counts.values()),
        len(counts.keys() - sent),
        sum(kept[user] != events for user, events in said.items()),
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=10_000, help="on each kind of state")
    parser.add_argument("--model", type=Path, metavar="DIR", help="an exported version; default: one is made")
    return parser.parse_args()


def main() -> int:
    """SQLite, then Redis."""
    arguments = parse_arguments()
    found = {}
    with tempfile.TemporaryDirectory(prefix="read-your-writes-") as name:
        base = Path(name)
        model = served.version_at(base / "exports" / "v1", arguments.model)
        found["sqlite"] = trial("sqlite", f"{base}/state.db", model, base, arguments.pairs)
        with served.redis_server() as url:
            found["redis"] = trial("redis", url, model, base, arguments.pairs)
    bars = []
    for kind, seen in found.items():
        at_most = {
            "stale pairs": len(seen["stale"]),
            "acknowledged events lost": seen["lost"],
            "events taken twice": seen["doubled"],
            "events that nobody acknowledged": seen["strange"],
            "users whose events are in another order": seen["users_out_of_order"],
            "clients that gave up": len(seen["failures"]),
            "errors in the servers' logs": len(seen["errors"]),
        }
        bars.append(record.Bar(name=f"{kind}: pairs", value=seen["pairs"], limit=arguments.pairs))
        bars.append(record.Bar(name=f"{kind}: kills", value=len(seen["kills"]), limit=2))
        bars += [
            record.Bar(name=f"{kind}: {text}", value=value, limit=0, at_most=True)
            for text, value in at_most.items()
        ]
        seen["stale"], seen["failures"] = seen["stale"][:20], seen["failures"][:20]
    return record.finish("read_your_writes", {**found, "workers": WORKERS, "servers": 2}, bars)


if __name__ == "__main__":
    sys.exit(main())
