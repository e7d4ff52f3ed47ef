"""A run that was never trained: its parameters are random, which codes and pruning do not mind."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxrec.compression.methods import Source
from jaxrec.compression.parameters import parameters_of, serving_setup
from jaxrec.config import TrainConfig
from jaxrec.core.mesh import make_mesh
from jaxrec.data.config import DataConfig
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.histories import UNKNOWN_TIME, Histories
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.next_item import NextItem

LENGTH, NUM_ITEMS = 12, 300
ENCODER = EncoderConfig(
    embed_dim=16, num_layers=2, num_heads=2, mlp_dim=32, max_positions=LENGTH, norm_position="pre"
)


def make_config(encoder=ENCODER, **model):
    return TrainConfig(
        name="small",
        data=DataConfig(history_length=LENGTH),
        model=TwoTowerConfig(**({"encoder": encoder, "item_dim": 16, "init_scale": 0.5} | model)),
        tasks={"next_item": NextItem()},
        num_train_steps=1,
        global_batch_size=8,
        evaluation=EvaluationConfig(rows_per_batch=8, bootstrap_samples=100),
    )


@pytest.fixture(scope="session")
def small_dataset():
    """Sixty users, leave-one-out."""
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(3, 20, 60))]).astype(np.int64)
    total = int(offsets[-1])
    histories = Histories(
        offsets=offsets,
        item_ids=rng.integers(1, NUM_ITEMS + 1, total).astype(np.int32),
        timestamps=np.full(total, UNKNOWN_TIME),
        labels=np.zeros((total, 0), np.int8),
    )
    return PreparedDataset.from_histories(histories, num_items=NUM_ITEMS)


@pytest.fixture
def make_source(small_dataset):
    """Makes a source on one device, its dense parameters changed by a function of name and array."""

    def make(config=None, change=None):
        config = config or make_config()
        mesh = make_mesh((1, 1), jax.devices()[:1])
        with jax.set_mesh(mesh):
            setup = serving_setup(config, small_dataset, mesh)
            state = setup.init_state()
            if change is not None:
                changed = lambda path, x: change(".".join(str(part.key) for part in path), x)  # noqa: E731
                state = dataclasses.replace(
                    state, dense=jax.tree_util.tree_map_with_path(changed, state.dense)
                )
            return Source(
                config=config,
                dataset=small_dataset,
                setup=setup,
                state=state,
                step=3,
                arrays=parameters_of(setup, state),
            )

    return make


@pytest.fixture
def config_of_small_runs():
    """Makes the config of a small run."""
    return make_config
