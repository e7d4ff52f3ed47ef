"""Takes a hundred versions into use while a server answers, and shows that nobody notices.

Bars: no request fails; the 99th percentile of the latency with reloads is at most twice that without; memory, threads
and open files are flat; each damaged version is refused, counted, and the version before it answers on.

Clients keep their connections and ask one request after the other, each at its own moments (a server that is busy all
the time has no latency to speak of). The latency without reloads is taken before, in the middle and after, so that a
machine that slows down meanwhile does not decide. Most versions are of the same model with other weights, as a nightly
training makes them; every 25th is a model of another size, whose programs are compiled for some ten seconds the first
time (its latencies stand apart, too), and every tenth is damaged and comes on top.

    python benchmarks/hot_reloads.py --reloads=100
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import record
import served

CLIENTS = 4
PAUSE_SECONDS = 0.05  # on average, of a client between an answer and its next request
WATCH_SECONDS = 0.2
OTHER_SIZE_EVERY, DAMAGED_EVERY = 25, 10
OTHER_SIZE = ("model.encoder.mlp_dim=96",)
# Memory goes up and down by a version's own size: the medians of these two shares of the reloads are compared. Both
# come after versions of both sizes.
EARLY, LATE = (0.3, 0.6), (0.7, 1.0)
GROWTH = 0.10


class Load:
    """Clients that ask all the time; latencies are kept with the moment of the answer."""

    def __init__(self, port: int, users: list[str], seed: int):
        self.answers: list[tuple[float, float, str]] = []
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(port, users, random.Random(seed + number)))
            for number in range(CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self, port: int, users: list[str], draw: random.Random) -> None:
        client = served.Client(port)
        while not self._stop.is_set():
            body = {"user_id": draw.choice(users), "k": 10}
            started = time.monotonic()
            try:
                status, answer = client.post("/v1/recommend", body)
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                continue
            ended = time.monotonic()
            if status != 200 or len(answer["items"]) != 10 or answer["degraded"]:
                self.failures.append(f"status {status}: {str(answer)[:300]}")
            else:
                self.answers.append((ended, ended - started, answer["model_version"]))
            self._stop.wait(draw.expovariate(1 / PAUSE_SECONDS))
        client.close()

    def wait_for_version(self, name: str, patience_seconds: float) -> float:
        """Seconds until a client's answer came from a version; NaN where none does. Asks nothing more than they do."""
        started = time.monotonic()
        while time.monotonic() < started + patience_seconds:
            if self.answers and self.answers[-1][2] == name:
                return self.answers[-1][0] - started
            time.sleep(0.02)
        return float("nan")

    def stop(self) -> None:
        """Ends the clients after their last answer."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def latencies(self, spans: list[tuple[float, float]]) -> np.ndarray:
        """Seconds of the answers within spans of time."""
        taken = [
            seconds
            for moment, seconds, _ in list(self.answers)
            if any(start <= moment < end for start, end in spans)
        ]
        return np.array(taken)


def wait_for_refusals(client: served.Client, number: int, patience_seconds: float = 30) -> bool:
    """Whether the server has counted this many versions that it refused."""
    started = time.monotonic()
    while time.monotonic() < started + patience_seconds:
        if served.metric(client.get("/metrics")[1], "jaxrec_reload_failures_total") >= number:
            return True
        time.sleep(0.2)
    return False


def quantiles(seconds: np.ndarray) -> dict[str, float]:
    """Milliseconds."""
    found = np.quantile(seconds, [0.5, 0.9, 0.99, 1.0]) * 1000
    names = ("p50_ms", "p90_ms", "p99_ms", "most_ms")
    return {name: round(float(value), 2) for name, value in zip(names, found, strict=True)} | {
        "answers": len(seconds)
    }


def reload_all(
    server: served.Server,
    client: served.Client,
    load: Load,
    models: list[Path],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Publishes every version and waits for each; returns what was seen, with the spans of time."""
    directory = models[0].parent
    # Made before, so that nothing but the server works while the latency is taken.
    waiting, damaged = prepared(directory, arguments.reloads, models)
    seen: dict[str, Any] = {"seconds": [], "seconds_other_size": [], "samples": [], "refused": 0,
                            "damaged": 0, "answered_on": 0}  # fmt: skip
    published = [models[0]]
    spans: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    quiet = [rest(arguments.quiet_seconds)]
    for number in range(1, arguments.reloads + 1):
        started = time.monotonic()
        newest = f"r{number:04d}"
        published.append((waiting / newest).rename(directory / newest))
        took = load.wait_for_version(newest, served.READY_SECONDS)
        seen["seconds_other_size" if is_other_size(number) else "seconds"].append(took)
        if number in damaged:
            damaged[number].rename(directory / damaged[number].name)
            seen["damaged"] += 1
            seen["refused"] += wait_for_refusals(client, seen["damaged"])
            seen["answered_on"] += client.get("/v1/about")[1]["version"] == newest
        while len(published) > 3:
            old = published.pop(1)
            shutil.rmtree(old)
        spans[is_other_size(number)].append((started, time.monotonic()))
        seen["samples"].append(
            {"reloads": number, "rss_mib": round(server.rss_bytes / 2**20, 1),
             "threads": server.num_threads, "files": server.num_files}
        )  # fmt: skip
        if number % 10 == 0:
            print(f"{number} reloads: {seen['samples'][-1]}", flush=True)
        if number == arguments.reloads // 2:
            quiet.append(rest(arguments.quiet_seconds))
    quiet.append(rest(arguments.quiet_seconds))
    return seen | {"spans": spans[False], "spans_other_size": spans[True], "quiet": quiet}


def is_other_size(number: int) -> bool:
    """Whether the n-th version is of the other model."""
    return number % OTHER_SIZE_EVERY == 0


def prepared(directory: Path, number: int, models: list[Path]) -> tuple[Path, dict[int, Path]]:
    """A hidden directory with all versions, and the damaged ones by the number of the version that they follow."""
    waiting = directory / ".waiting"
    waiting.mkdir()
    damaged = {}
    for at in range(1, number + 1):
        place = served.another(models[is_other_size(at)], waiting / f"r{at:04d}")
        if at % DAMAGED_EVERY == 0:
            damaged[at] = served.another(models[0], place.with_name(f"{place.name}-damaged"), damage=True)
    return waiting, damaged


def rest(seconds: float) -> tuple[float, float]:
    """A span of time without reloads."""
    started = time.monotonic()
    time.sleep(seconds)
    return started, time.monotonic()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reloads", type=int, default=100)
    parser.add_argument(
        "--quiet-seconds", type=float, default=25.0, help="of each of the three spans without reloads"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, metavar="DIR", help="an exported version; default: one is made")
    parser.add_argument("--other", type=Path, metavar="DIR", help="one of another size; default: one is made")
    return parser.parse_args()


def main() -> int:
    """Exports two models, serves one, publishes versions of both under load."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="hot-reloads-") as name:
        base = Path(name)
        model = served.version_at(base / "exports" / "v1", arguments.model)
        other = served.version_at(base / "others" / "v1", arguments.other, OTHER_SIZE)
        with served.Server(
            model.parent, f"{base}/state.db", base / "server.log", f"--watch-seconds={WATCH_SECONDS}"
        ) as server:
            started_seconds = server.wait_ready()
            client = served.Client(server.port)
            load = Load(server.port, client.get("/v1/about")[1]["example_users"], arguments.seed)
            try:
                rest(5.0)
                seen = reload_all(server, client, load, [model, other], arguments)
            finally:
                load.stop()
            metrics = client.get("/metrics")[1]
            errors = server.log_lines("Traceback", "a request failed")
    return judge(arguments, load, seen, metrics, errors, started_seconds)


def judge(
    arguments: argparse.Namespace,
    load: Load,
    seen: dict[str, Any],
    metrics: str,
    errors: list[str],
    started_seconds: float,
) -> int:
    """The bars."""
    with_reloads, with_others, without = (
        load.latencies(seen.pop(name)) for name in ("spans", "spans_other_size", "quiet")
    )
    with_any = np.concatenate([with_reloads, with_others])
    samples = seen["samples"]
    early, late = (
        samples[int(start * len(samples)) : int(end * len(samples))] for start, end in (EARLY, LATE)
    )
    median = {key: (statistics.median(s[key] for s in early), statistics.median(s[key] for s in late))
              for key in ("rss_mib", "threads", "files")}  # fmt: skip
    taken = [seconds for seconds in seen["seconds"] + seen["seconds_other_size"] if seconds == seconds]
    passed_over = min(
        seen["refused"], seen["answered_on"], served.metric(metrics, "jaxrec_reload_failures_total")
    )
    growth = {key: now - then for key, (then, now) in median.items()}
    bars = [
        record.Bar(name="versions taken into use under load", value=len(taken), limit=arguments.reloads),
        record.Bar(name="of them, that answered a client", limit=0.9 * arguments.reloads,
                   value=len({name for _, _, name in load.answers})),
        record.Bar(name="requests that failed", value=len(load.failures), limit=0, at_most=True),
        record.Bar(name="p99 with reloads over p99 without", limit=2.0, at_most=True,
                   value=float(np.quantile(with_any, 0.99) / np.quantile(without, 0.99))),
        record.Bar(name="memory of the last reloads over that of earlier ones", limit=1 + GROWTH, at_most=True,
                   value=median["rss_mib"][1] / median["rss_mib"][0]),
        record.Bar(name="threads more than then", value=growth["threads"], limit=2, at_most=True),
        record.Bar(name="open files more than then", value=growth["files"], limit=4, at_most=True),
        record.Bar(name="damaged versions", value=seen["damaged"], limit=1),
        record.Bar(name="of them, refused, counted and passed over", value=passed_over, limit=seen["damaged"]),
        record.Bar(name="errors in the server's log", value=len(errors), limit=0, at_most=True),
    ]  # fmt: skip
    figures = {
        "with_reloads": quantiles(with_any),
        "with_reloads_of_the_same_size": quantiles(with_reloads),
        "with_reloads_of_another_size": quantiles(with_others) if len(with_others) else None,
        "without": quantiles(without),
        "seconds_to_take_into_use": {
            "same_size": round(statistics.median(seen.pop("seconds")), 2),
            "other_size": [round(seconds, 2) for seconds in seen.pop("seconds_other_size")],
        },
        "server_start_seconds": round(started_seconds, 1),
        **seen,
        "failures": load.failures[:20],
        "errors": errors[:20],
        "clients": CLIENTS,
    }
    return record.finish("hot_reloads", figures, bars)


if __name__ == "__main__":
    sys.exit(main())
