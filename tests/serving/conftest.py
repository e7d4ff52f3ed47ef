"""Stores to test with: SQLite, and a real Redis server of this test's own."""

import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import redis

from jaxrec.serving.redis_store import RedisStore
from jaxrec.serving.sqlite_store import SqliteStore


@pytest.fixture(scope="session")
def redis_url():
    """A server on a socket in a directory that goes away."""
    program = shutil.which("redis-server")
    assert program, "the tests need redis-server: apt-get install redis-server"
    with tempfile.TemporaryDirectory(prefix="redis") as directory:
        socket = Path(directory) / "redis.sock"
        server = subprocess.Popen(
            [program, "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", directory],
            stdout=subprocess.DEVNULL,
        )
        try:
            client = redis.Redis(unix_socket_path=str(socket))
            for _ in range(200):
                try:
                    client.ping()
                    break
                except redis.RedisError:
                    time.sleep(0.05)
            client.ping()
            client.close()
            yield f"unix://{socket}"
        finally:
            server.terminate()
            server.wait(10)


@pytest.fixture(params=["sqlite", "redis"])
def open_store(request, tmp_path):
    """A function that opens the same state again, as another process would."""
    if request.param == "sqlite":
        make = lambda: SqliteStore(tmp_path / "state.db")  # noqa: E731
    else:
        url = request.getfixturevalue("redis_url")
        make = lambda: RedisStore(url, prefix=f"{request.node.nodeid}:{tmp_path}:")  # noqa: E731
    opened = []

    def open_one():
        opened.append(make())
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()
