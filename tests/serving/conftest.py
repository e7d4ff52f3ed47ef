"""Stores to test with: SQLite, and a real Redis server of this test's own."""

import copy
import dataclasses
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import pytest
import redis

from jaxrec.config import load_config
from jaxrec.data.config import TextConfig
from jaxrec.export.exporter import ExportOptions, export_run, export_state
from jaxrec.models.item_text import TextTower
from jaxrec.models.memory import TransitionMemory
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.serving.engine import Engine
from jaxrec.serving.measures import Measures
from jaxrec.serving.redis_store import RedisStore
from jaxrec.serving.service import Service, ServiceOptions
from jaxrec.serving.sqlite_store import SqliteStore
from jaxrec.serving.version import Version
from jaxrec.tasks.behaviour import Behaviour
from jaxrec.tasks.next_item import NextItem
from jaxrec.tasks.rating import Rating
from jaxrec.train import train_run


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


@pytest.fixture(scope="session")
def workdir(tmp_path_factory, repository):
    """Two steps of a small model on the embedded data, which have titles and categories; it reads them."""
    path = tmp_path_factory.mktemp("run")
    sizes = {"embed_dim": 8, "num_heads": 2, "mlp_dim": 8}
    text = EncoderConfig(**sizes, num_layers=1, max_positions=16, vocab_size=30_522, type_vocab_size=1)
    base = load_config(str(repository / "configs" / "quickstart.py"))
    model = dataclasses.replace(
        base.model,
        encoder=dataclasses.replace(base.model.encoder, **sizes, max_positions=32),
        item_dim=8,
        memory=TransitionMemory(num_successors=8),
        text=TextTower(encoder=text, trained_items=8),
    )
    config = dataclasses.replace(
        base,
        model=model,
        data=dataclasses.replace(base.data, history_length=32, text=TextConfig(max_tokens=16)),
        num_train_steps=2,
        checkpoint_every_steps=2,
        evaluation=dataclasses.replace(base.evaluation, every_steps=0),
    )
    assert train_run(config, path)
    return path


@pytest.fixture(scope="session")
def bundles(workdir, tmp_path_factory):
    """A directory with one version of it, with histories."""
    out = tmp_path_factory.mktemp("exports")
    export_run(
        workdir,
        out,
        ExportOptions(version="v1", saved_model=False, histories=True, candidates=("item_knn", "ials")),
    )
    return out


@pytest.fixture(scope="session")
def version(bundles):
    """The version, opened and compiled."""
    return Version.open(bundles / "v1")


@pytest.fixture(scope="session")
def raw_requests(repository):
    """The module of that name in `benchmarks/`, which is a directory of scripts and no package."""
    name = "raw_requests"
    spec = importlib.util.spec_from_file_location(name, repository / "benchmarks" / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def judging(repository, tmp_path_factory):
    """A version with task heads, random as they start, of more items than are judged; it reads labels."""
    spec = importlib.util.spec_from_file_location("world", repository / "tests" / "export" / "conftest.py")
    world = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(world)
    num_items = 300
    dataset = world.random_dataset(
        num_items=num_items,
        behaviours=("click", "add to cart"),
        item_titles=[f"Item {i}" for i in range(1, num_items + 1)],
        item_keys=[f"i{i}" for i in range(1, num_items + 1)],
        item_tokens=None,
        filter_seen=False,
    )
    model = dataclasses.replace(world.MODEL, event_behaviours=True)
    tasks = {"next_item": NextItem(), "behaviour": Behaviour(), "rating": Rating()}
    run, state = world.run_of(dataset, model, tasks)
    out = tmp_path_factory.mktemp("judging")
    options = ExportOptions(version="v1", k=12, saved_model=False, histories=True, candidates=("item_knn",))
    export_state(run, state, out, options)
    version = Version.open(out / "v1")
    return types.SimpleNamespace(version=version, dataset=dataset, out=out)


@pytest.fixture(scope="session")
def make_service():
    """A function that makes a service with a state of its own in a directory, and a version in use; None = none."""

    def made(version, directory, engine=Engine(), **options):
        service = Service(SqliteStore(directory / "state.db"), engine, ServiceOptions(**options), Measures())
        if version is not None:
            service.live.install(version)
        return service

    return made


@pytest.fixture(scope="session")
def renamed():
    """A function that gives a version another name; it shares everything else."""

    def other(version, name):
        found = copy.copy(version)
        found.name = name
        return found

    return other
