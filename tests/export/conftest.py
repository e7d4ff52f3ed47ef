"""A run in memory, random as it starts, and the bundle that it becomes; keys are strings, and titles have umlauts."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from jaxrec.config import TrainConfig
from jaxrec.core.mesh import make_mesh
from jaxrec.data.config import DataConfig
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.histories import Histories
from jaxrec.embedding.engine import Exchange
from jaxrec.embedding.row_optimizer import Adam
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.export.exporter import ExportOptions, export_state
from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.runs import run_of_state
from jaxrec.tasks.next_item import NextItem
from jaxrec.training.optimizer import OptimizerConfig
from jaxrec.training.setup import dataset_facts, make_setup

NUM_USERS, NUM_ITEMS, LENGTH, TOKENS = 20, 40, 8, 4
ENCODER = EncoderConfig(embed_dim=8, num_layers=2, num_heads=2, mlp_dim=12, max_positions=LENGTH)
MODEL = TwoTowerConfig(encoder=ENCODER, item_dim=6)


def random_dataset(**changes):
    """Users with 1 to 15 events: some histories are longer than the model reads."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 16, NUM_USERS)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(offsets[-1])
    steps = rng.integers(0, 10**5, total) * rng.integers(0, 2, total)
    histories = Histories(
        offsets=offsets,
        item_ids=rng.integers(1, NUM_ITEMS + 1, total).astype(np.int32),
        timestamps=10**9 + np.cumsum(steps),
        labels=rng.integers(-1, 2, (total, 2)).astype(np.int8),
        values=rng.normal(3, 1, total).astype(np.float32),
        context=rng.integers(1, 1000, (total, 2)).astype(np.int32),
    )
    tokens = rng.integers(1, 50, (NUM_ITEMS + 1, TOKENS)).astype(np.int32)
    tokens[0] = tokens[3] = 0
    options = {
        "num_items": NUM_ITEMS,
        "behaviours": ("click", "buy"),
        "item_titles": [f"Söhne & Töchter {i}" if i % 5 else "" for i in range(1, NUM_ITEMS + 1)],
        "item_keys": [f"i{i}" for i in range(1, NUM_ITEMS + 1)],
        "user_keys": [f"u{i}" for i in range(NUM_USERS)],
        "item_tokens": tokens,
    }
    return PreparedDataset.from_histories(histories, **(options | changes))


def run_of(dataset, model=MODEL, tasks=None):
    """A run with random weights, the biases too, and its state."""
    tasks = tasks or {"next_item": NextItem()}
    mesh = make_mesh((1, 1), jax.devices()[:1])
    config = TrainConfig(
        name="tiny",
        data=DataConfig(history_length=LENGTH),
        model=model,
        tasks=tasks,
        num_train_steps=1,
        global_batch_size=4,
        evaluation=EvaluationConfig(rows_per_batch=8),
    )
    with jax.set_mesh(mesh):
        setup = make_setup(
            facts=dataset_facts(dataset),
            mesh=mesh,
            model=model,
            tasks=tasks,
            optimizer=OptimizerConfig(),
            row_optimizer=Adam(learning_rate=1e-2),
            exchange=Exchange(),
            num_train_steps=1,
            accumulation_steps=1,
            seed=0,
        )
        state = setup.init_state()
        rng = np.random.default_rng(1)

        def moved(x):
            # Away from what is zero at the start: gates, biases, adapters.
            if not np.issubdtype(x.dtype, np.floating):
                return x
            noise = rng.normal(0, 0.3, x.shape).astype(np.float32)
            return jax.device_put(np.asarray(x) + noise, x.sharding)

        state = dataclasses.replace(
            state, dense=jax.tree.map(moved, state.dense), tables=jax.tree.map(moved, state.tables)
        )
        return run_of_state(config, dataset, setup, state, 0), state


@pytest.fixture(scope="session")
def world():
    """Makes datasets and runs."""
    return types.SimpleNamespace(dataset=random_dataset, run=run_of, model=MODEL, encoder=ENCODER)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A whole export, ONNX too: the model reads users, times and labels, and judges behaviours."""
    from jaxrec.tasks.behaviour import Behaviour

    model = dataclasses.replace(MODEL, user_dim=4, time_gaps=True, event_behaviours=True)
    tasks = {"next_item": NextItem(), "behaviour": Behaviour()}
    run, state = run_of(random_dataset(), model, tasks)
    out = tmp_path_factory.mktemp("exports")
    export = export_state(run, state, out, ExportOptions(version="v1", k=12, onnx=True))
    return types.SimpleNamespace(run=run, state=state, out=out, export=export, path=export.directory)
