import asyncio
import os
import subprocess
import sys

import jax
import pytest

from jaxrec.serving import live as live_module
from jaxrec.serving import precompile as precompile_module
from jaxrec.serving.live import LiveVersions
from jaxrec.serving.measures import Measures
from jaxrec.serving.precompile import precompile
from jaxrec.serving.sqlite_store import SqliteStore


@pytest.fixture
def cache(tmp_path):
    """An empty directory in the place of the cache of the tests."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "programs"))
    yield tmp_path / "programs"
    jax.config.update("jax_compilation_cache_dir", before)


def test_another_process_fills_the_cache(bundles, version, cache):
    assert asyncio.run(precompile(bundles / "v1"))
    assert len(list(cache.glob("*-cache"))) >= len(version.lengths)


def test_what_goes_wrong_is_told_and_the_server_compiles_itself(tmp_path, cache, caplog, monkeypatch):
    assert not asyncio.run(precompile(tmp_path / "nothing"))
    assert "nothing is compiled by the server itself" in caplog.text
    assert "holds no whole bundle" in caplog.text
    monkeypatch.setattr(precompile_module, "MOST_SECONDS", 0.05)
    assert not asyncio.run(precompile(tmp_path / "nothing"))
    assert "ahead it took over" in caplog.text


def test_without_a_cache_no_process_is_started(cache, bundles, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    jax.config.update("jax_compilation_cache_dir", None)
    assert not asyncio.run(precompile(bundles / "v1"))


def test_a_server_that_stops_waits_for_no_compiler(bundles, cache, monkeypatch):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, command, **options):
            super().__init__([sys.executable, "-c", "import time; time.sleep(60)"], **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Popen)

    async def main():
        task = asyncio.create_task(precompile(bundles / "v1"))
        while not started:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())
    assert started[0].wait(10) < 0


def test_only_programs_that_no_version_in_use_has_are_compiled_ahead(bundles, tmp_path, monkeypatch):
    asked = []

    async def seen(directory, needs):
        asked.append(directory.name)

    monkeypatch.setattr(live_module, "precompile", seen)
    store = SqliteStore(tmp_path / "state.db")
    live = LiveVersions(lambda version: None, store, Measures(), shares={})
    monkeypatch.setattr(live, "_retire", lambda live: None)

    async def main():
        await live.load(bundles / "v1")
        await live.load(bundles / "v1")
        assert asked == [], "the first cannot be waited for, and the second has the same programs"
        monkeypatch.setattr(live, "_programs_in_use", lambda: {"another"})
        await live.load(bundles / "v1")

    asyncio.run(main())
    assert asked == ["v1"]


def test_programs_are_kept_for_the_life_of_the_process():
    """In a process of its own: what JAX is told holds for all of it."""
    program = (
        "import jax; from jaxrec.serving.precompile import keep_programs; keep_programs();"
        "print(jax.config.values['jax_compilation_cache_dir'])"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_COMPILATION")}
    run = lambda environment: subprocess.run(  # noqa: E731
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert not os.path.exists(run(environment))
    assert run(environment | {"JAX_COMPILATION_CACHE_DIR": "/somewhere"}) == "/somewhere"
