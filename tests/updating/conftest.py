"""A run of a few steps on a made-up shop, its exported version, and logs of feedback on it."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.config import TrainConfig
from jaxrec.data.config import DataConfig, LeaveOneOut
from jaxrec.data.prepare import prepared_fingerprint
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.export.catalogue import HISTORIES_FILE
from jaxrec.export.manifest import Manifest
from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.serving.sqlite_store import SqliteStore
from jaxrec.serving.store import AddedItem, Feedback
from jaxrec.tasks.next_item import NextItem
from jaxrec.train import train_run
from jaxrec.updating.options import UpdateOptions

USERS, ITEMS, START = 40, 30, 1_000_000
SMALL = ("--config.num_train_steps=2",)
LICENCE = "The shop's, given by hand."


def ring(item, steps=1):
    """In this shop one item follows the other."""
    return (item - 1 + steps) % ITEMS + 1


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    """Users 1 .. 40, each with eight events."""
    directory = tmp_path_factory.mktemp("shop")
    users = np.repeat(np.arange(1, USERS + 1), 8)
    place = np.tile(np.arange(8), USERS)
    events = {
        "user_id": users,
        "item_id": ring(users * 7 % ITEMS + 1, place),
        "timestamp": START + np.arange(len(users)),
        "rating": place % 5 + 1,
    }
    pq.write_table(pa.table(events), directory / "events.parquet")
    items = {"item_id": np.arange(1, ITEMS + 1), "title": [f"thing {n}" for n in range(1, ITEMS + 1)]}
    pq.write_table(pa.table(items), directory / "items.parquet")
    return directory


def shop_config(path):
    return TrainConfig(
        name="shop",
        data=DataConfig(path=str(path), split=LeaveOneOut(validation=False), history_length=16),
        model=TwoTowerConfig(
            encoder=EncoderConfig(embed_dim=8, num_layers=1, num_heads=1, mlp_dim=8, max_positions=16),
            item_dim=8,
            user_dim=4,
        ),
        tasks={"next_item": NextItem()},
        num_train_steps=2,
        global_batch_size=8,
        checkpoint_every_steps=1,
        evaluation=EvaluationConfig(rows_per_batch=8),
    )


@pytest.fixture(scope="session")
def trained(shop, tmp_path_factory):
    """The run, and a version of it that nobody can load; to copy."""
    root = tmp_path_factory.mktemp("trained")
    train_run(shop_config(shop), root / "run")
    write_version(root / "exports" / "v1", prepared_fingerprint(root / "run" / "data"), "2001-01-01")
    (root / "exports" / "v1" / HISTORIES_FILE).touch()
    return root


def write_version(directory, fingerprint, created):
    """What an update looks at in a version, without its programs."""
    directory.mkdir(parents=True)
    data = {"fingerprint": fingerprint, "licence": LICENCE}
    facts = {"created": created, "k": 10, "dtype": "float32", "data": data}
    Manifest(version=directory.name, facts=facts, programs={}, checks=[], files={}).write(directory)


@pytest.fixture
def options(trained, tmp_path):
    """Of an update of a copy of the run."""
    shutil.copytree(trained, tmp_path / "shop")
    return UpdateOptions(
        workdir=tmp_path / "shop" / "run",
        model=tmp_path / "shop" / "exports",
        least_events=10,
        holdout=0.3,
        tolerance=0.99,
        least_users=2,
        overrides=SMALL,
    )


@pytest.fixture(scope="session")
def version():
    """The function that writes a version."""
    return write_version


@pytest.fixture
def store(tmp_path):
    """Empty."""
    found = SqliteStore(tmp_path / "state.db")
    yield found
    found.close()


@pytest.fixture
def append(store):
    """Puts events into the store that go around the ring; every fifth is of an item that the run does not know."""

    def put(first, count, *, users=10, seconds=None):
        store.put_item(AddedItem(item_id="99", title="new thing", categories=("news",), seconds=START))
        events = [
            Feedback(
                event_id=f"e{number}",
                user_id="7" if number % users == 0 else f"guest-{number % users}",
                item_id="99" if number % 5 == 0 else str(ring(number)),
                value=float(number % 5 + 1),
                seconds=START + 10_000 + number if seconds is None else seconds,
            )
            for number in range(first, first + count)
        ]
        assert store.append(events) == count

    return put
