"""Servers to try: small exported models, `python -m jaxrec.serve` as processes, a Redis server, clients.

The servers are processes as a user starts them: a kill is a real kill, their memory is their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis
import safetensors.numpy
import training_runs
from record import ROOT

from jaxrec.export.layout import ITEM_VECTORS_FILE
from jaxrec.export.manifest import CHECKSUM, MANIFEST, Manifest, file_entries

CONFIG = "configs/quickstart.py"
FEW_STEPS = ("num_train_steps=2", "checkpoint_every_steps=2", "evaluation.every_steps=0")
READY_SECONDS = 240.0
IDLE_SECONDS = 15.0  # after which a client opens a connection anew, before the server lets go of it


def version_at(place: Path, given: Path | None, overrides: Sequence[str] = ()) -> Path:
    """A version at `place`: a copy of a given one (`--model` of the programs), or one that is trained and exported."""
    if given is None:
        return export(place, overrides)
    shutil.copytree(given, place)
    _label(Manifest.read(place), place)
    return place


def export(place: Path, overrides: Sequence[str] = ()) -> Path:
    """Trains a few steps on the embedded data and exports them, with histories, as the version `place`."""
    workdir = place.parent.with_name(f"run-{place.parent.name}-{place.name}")
    run = training_runs.Run(config=CONFIG, workdir=workdir, overrides=(*FEW_STEPS, *overrides))
    run.finish()
    to = f"--out={place.parent}"
    run.finish("export", to, f"--version={place.name}", "--no-saved-model", "--histories")
    return place


def another(version: Path, place: Path, *, damage: bool = False) -> Path:
    """A version at `place` as another training would make it: newer, other item vectors, right hashes.

    What is the same as in `version` is the same file: a hundred versions take little space.

    Args:
      damage: turns a bit of the vectors after the hashes were taken.
    """
    shutil.copytree(version, place, copy_function=os.link)
    for changed in (ITEM_VECTORS_FILE, MANIFEST, CHECKSUM):
        (place / changed).unlink()
    arrays = safetensors.numpy.load_file(version / ITEM_VECTORS_FILE)
    factor = 1 + zlib.crc32(place.name.encode()) % 1000 / 1e5
    moved = {name: array * array.dtype.type(factor) for name, array in arrays.items()}
    safetensors.numpy.save_file(moved, place / ITEM_VECTORS_FILE)
    _label(Manifest.read(version), place)
    if damage:
        vectors = place / ITEM_VECTORS_FILE
        content = bytearray(vectors.read_bytes())
        content[-1] ^= 1
        vectors.write_bytes(content)
    return place


def _label(manifest: Manifest, place: Path) -> None:
    """Writes the manifest of a version with its directory's name, as made now, of the files that there are."""
    facts = {**manifest.facts, "created": datetime.now(UTC).isoformat(timespec="microseconds")}
    dataclasses.replace(manifest, version=place.name, facts=facts, files=file_entries(place)).write(place)


class Server:
    """`python -m jaxrec.serve`; use it as a context manager.

    Its log is `log`, one file for all its starts. Servers with the same `compiled` share a directory of compiled
    programs, so that a second start takes seconds.
    """

    def __init__(self, model: Path, state: str, log: Path, *options: str, compiled: Path | None = None):
        self.port = free_port()
        self._log = log
        self._environment = dict(os.environ)
        if compiled is not None:
            self._environment |= {
                "JAX_COMPILATION_CACHE_DIR": str(compiled),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            }
        self._command = [
            *(sys.executable, "-m", "jaxrec.serve"),
            *(f"--model={model}", f"--state={state}", f"--port={self.port}", *options),
        ]
        self.process: subprocess.Popen[bytes]
        self.start()

    def start(self) -> None:
        """Starts it, again after a kill."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdout=log, stderr=log
            )

    def wait_ready(self, seconds: float = READY_SECONDS) -> float:
        """Seconds until it answered that it is ready.

        Raises:
          RuntimeError: it ended, or did not answer in time.
        """
        started = time.monotonic()
        while time.monotonic() < started + seconds and self.process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if Client(self.port, timeout=5).get("/v2/health/ready")[0] == 200:
                    return time.monotonic() - started
            time.sleep(0.1)
        raise RuntimeError(f"no server (status {self.process.poll()}):\n{training_runs.tail(self._log)}")

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    @property
    def rss_bytes(self) -> int:
        """Memory that is resident now."""
        return int(_status(self.process.pid, "VmRSS")) * 1024

    @property
    def processor_seconds(self) -> float:
        """Of all its threads so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    @property
    def num_threads(self) -> int:
        """Threads now."""
        return int(_status(self.process.pid, "Threads"))

    @property
    def num_files(self) -> int:
        """Open files and sockets now."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def log_lines(self, *words: str) -> list[str]:
        """Lines of its log with one of the words."""
        lines = self._log.read_text(errors="replace").splitlines()
        return [line for line in lines if any(word in line for word in words)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.alive:
            self.process.terminate()
            try:
                self.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.kill()


class Client:
    """One connection that is kept, and opened anew after an error."""

    def __init__(self, port: int, *, timeout: float = 30.0):
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
        self._used = time.monotonic()

    def get(self, path: str) -> tuple[int, Any]:
        """Status and answer.

        Raises:
          OSError, http.client.HTTPException: there was no answer.
        """
        return self._ask("GET", path, None)

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and answer; raises as `get`."""
        return self._ask("POST", path, json.dumps(body).encode())

    def close(self) -> None:
        """Lets go of the connection."""
        self._connection.close()

    def _ask(self, method: str, path: str, body: bytes | None) -> tuple[int, Any]:
        headers = {} if body is None else {"content-type": "application/json"}
        if time.monotonic() - self._used > IDLE_SECONDS:
            self._connection.close()
        try:
            self._connection.request(method, path, body, headers)
            answer = self._connection.getresponse()
            content = answer.read()
            self._used = time.monotonic()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            raise
        is_json = answer.headers.get_content_type() == "application/json"
        return answer.status, json.loads(content) if is_json else content.decode()


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    """A server that writes each change to a file before it answers; yields its URL."""
    program = shutil.which("redis-server")
    if program is None:
        raise RuntimeError("redis-server is wanted: apt-get install redis-server")
    # A path of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="redis") as directory:
        path = Path(directory) / "redis.sock"
        command = [program, "--port", "0", "--unixsocket", str(path), "--dir", directory, "--save", ""]
        server = subprocess.Popen([*command, "--appendonly", "yes"], stdout=subprocess.DEVNULL)
        try:
            client = redis.Redis(unix_socket_path=str(path))
            until = time.monotonic() + 20
            while time.monotonic() < until:
                with contextlib.suppress(redis.RedisError):
                    client.ping()
                    break
                time.sleep(0.05)
            client.ping()
            client.close()
            yield f"unix://{path}"
        finally:
            server.terminate()
            server.wait(20)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def metric(text: str, name: str) -> float:
    """The sum of a metric of Prometheus' text over its labels; 0 where it has none yet."""
    lines = (line for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{")))
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def _status(pid: int, name: str) -> str:
    text = Path(f"/proc/{pid}/status").read_text()
    return next(line.split()[1] for line in text.splitlines() if line.startswith(f"{name}:"))
