"""A run whose table of users lives on the host: the bits of a run in memory, and of a run that was not stopped."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxrec.core.mesh import make_mesh
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.evaluation_batches import EvaluationRows
from jaxrec.data.histories import UNKNOWN_TIME, Histories
from jaxrec.embedding.row_optimizer import Adam, Sgd
from jaxrec.models.two_tower import USER, TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.next_item import NextItem
from jaxrec.training import loop
from jaxrec.training.checkpoint import Checkpoints
from jaxrec.training.inference import Inference
from jaxrec.training.loop import LoopConfig, restore, train
from jaxrec.training.optimizer import OptimizerConfig
from jaxrec.training.setup import dataset_facts
from jaxrec.training.state import to_checkpoint
from jaxrec.training.writer import read_metrics

ENCODER = EncoderConfig(embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16, max_positions=16)
USERS, CACHE = 511, 128  # with padding, four times the cache
LOOP = LoopConfig(
    num_train_steps=16,
    global_batch_size=8,
    history_length=16,
    windows="last",
    log_every_steps=4,
    checkpoint_every_steps=8,
    keep_checkpoints=2,
    validate_every_steps=8,
    metric="ndcg@10",
)


@pytest.fixture(scope="module")
def many_users():
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(3, 25, USERS))]).astype(np.int64)
    total = int(offsets[-1])
    histories = Histories(
        offsets=offsets,
        item_ids=rng.integers(1, 81, total).astype(np.int32),
        timestamps=np.full(total, UNKNOWN_TIME),
        labels=np.zeros((total, 0), np.int8),
    )
    return PreparedDataset.from_histories(histories, num_items=80, behaviours=())


@pytest.fixture(scope="module")
def two_devices():
    mesh = make_mesh((1, 2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture(scope="module")
def setup_of(make, many_users, two_devices):
    def setup(**changes):
        model = TwoTowerConfig(encoder=ENCODER, item_dim=8, user_dim=4, init_scale=0.5)
        values = {"model": model, "tasks": {"next_item": NextItem()}, "num_train_steps": LOOP.num_train_steps}
        return make(two_devices, facts=dataset_facts(many_users), **(values | changes))

    return setup


def checkpoint(setup, workdir):
    """The newest one, without what only a cache has."""
    with Checkpoints(str(workdir / "checkpoints"), keep=1, save_every_steps=1) as checkpoints:
        state = restore(setup, setup.init_state(), checkpoints)
        saved = jax.tree.map(np.array, to_checkpoint(state, setup.tables, setup.mesh))
    saved.pop("caches")
    return saved


def test_training_from_the_host_equals_training_in_memory(setup_of, many_users, tmp_path):
    plain = {"row_optimizer": Sgd(learning_rate=0.1), "optimizer": OptimizerConfig(learning_rate=1e-2)}
    asked = {}
    for name, cache_rows in {"memory": {}, "host": {USER: CACHE}}.items():
        setup = setup_of(**plain, cache_rows=cache_rows)
        seen = []

        def validate(state, setup=setup, seen=seen):
            rows = EvaluationRows.make(many_users, "validation", history_length=16, rows_per_batch=64)
            seen.append(np.asarray(Inference(setup, state).queries(rows.build(0))[0]))
            return {"ndcg@10": 0.1 * len(seen)}

        train(setup, many_users, LOOP, tmp_path / name, validate)
        asked[name] = (checkpoint(setup, tmp_path / name), seen)
    jax.tree.map(np.testing.assert_array_equal, asked["host"], asked["memory"])
    rates = [line["cache_hit_rate/user"] for line in read_metrics(tmp_path / "host") if "loss" in line]
    assert len(rates) == 4
    assert min(rates) < 1  # rows came and went


def test_the_devices_hold_the_cache_alone(setup_of, many_users, tmp_path, monkeypatch):
    shapes = []
    original = loop.make_train_step

    def watched(config, state, mesh):
        shapes.append(
            {key: array.shape for key, array in {"": state.tables[USER], **state.table_slots[USER]}.items()}
        )
        return original(config, state, mesh)

    monkeypatch.setattr(loop, "make_train_step", watched)
    setup = setup_of(cache_rows={USER: CACHE})
    state = train(setup, many_users, dataclasses.replace(LOOP, num_train_steps=1), tmp_path, None)
    assert shapes == [
        {"": (CACHE, 4), "first_moment": (CACHE, 4), "second_moment": (CACHE, 4), "count": (CACHE,)}
    ]
    assert state.tables[USER].shape == (4 * CACHE, 4)


def test_a_stopped_run_goes_on_bit_exactly(setup_of, many_users, tmp_path, monkeypatch):
    # Clipping makes every row depend on the order in which the norm is summed, hence on the cache's layout.
    clipped = {"optimizer": OptimizerConfig(learning_rate=1e-2, max_gradient_norm=0.1)}
    setup = setup_of(row_optimizer=Adam(learning_rate=1e-2), cache_rows={USER: CACHE}, **clipped)
    train(setup, many_users, LOOP, tmp_path / "whole", None)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "reached_preemption", lambda self, done: done == 7)
        train(setup, many_users, LOOP, tmp_path / "stopped", None)
    train(setup, many_users, LOOP, tmp_path / "stopped", None)
    expected, found = (checkpoint(setup, tmp_path / name) for name in ("whole", "stopped"))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("cache_rows", "message"),
    [
        ({"item": 16}, "only the table 'user' can live on the host"),
        ({USER: 13}, "must be a multiple of the 2 devices"),
        ({USER: 512}, "below the table's 512 rows"),
    ],
)
def test_what_cannot_be_is_said(setup_of, cache_rows, message):
    with pytest.raises(ValueError, match=message):
        setup_of(cache_rows=cache_rows)


def test_a_model_without_users_is_told(make, two_devices):
    with pytest.raises(ValueError, match="set model.user_dim or leave it out"):
        make(two_devices, cache_rows={USER: 16})
