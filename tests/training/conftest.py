"""A small world to train in: 60 users, 80 items, two behaviours, all tasks."""

import jax
import numpy as np
import pytest

from jaxrec.core.mesh import make_mesh
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.histories import UNKNOWN_TIME, Histories
from jaxrec.embedding.engine import Exchange
from jaxrec.embedding.row_optimizer import Adam
from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.behaviour import Behaviour
from jaxrec.tasks.masked_item import MaskedItem
from jaxrec.tasks.next_item import NextItem
from jaxrec.training.optimizer import OptimizerConfig
from jaxrec.training.setup import dataset_facts, make_setup

LENGTH = 16
ENCODER = EncoderConfig(embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16, max_positions=LENGTH)
TASKS = {"next_item": NextItem(), "masked_item": MaskedItem(weight=0.5), "behaviour": Behaviour(weight=0.1)}


@pytest.fixture(scope="session")
def dataset():
    """Histories in memory, leave-one-out."""
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(3, 25, 60))]).astype(np.int64)
    total = int(offsets[-1])
    histories = Histories(
        offsets=offsets,
        item_ids=rng.integers(1, 81, total).astype(np.int32),
        timestamps=np.full(total, UNKNOWN_TIME),
        labels=rng.integers(-1, 2, (total, 2)).astype(np.int8),
    )
    return PreparedDataset.from_histories(histories, num_items=80, behaviours=("click", "buy"))


@pytest.fixture
def one_device():
    """The mesh of the dense twin."""
    mesh = make_mesh((1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture(scope="session")
def make(dataset):
    """Makes a `Setup` on a mesh; keywords replace the defaults."""

    def setup(mesh, **changes):
        optimizer = OptimizerConfig(
            learning_rate=1e-2, ema_decay=0.9, max_gradient_norm=1.0, weight_decay=0.1
        )
        values = {
            "facts": dataset_facts(dataset),
            "model": TwoTowerConfig(encoder=ENCODER, item_dim=8, time_gaps=True),
            "tasks": TASKS,
            "optimizer": optimizer,
            "row_optimizer": Adam(learning_rate=1e-2),
            "exchange": Exchange(),
            "num_train_steps": 10,
            "accumulation_steps": 1,
            "seed": 0,
        }
        return make_setup(mesh=mesh, **(values | changes))

    return setup
