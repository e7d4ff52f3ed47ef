"""The loop: resuming is bit-exact, on another mesh too; NaN stops the run and says where; the best state is kept."""

import dataclasses
import logging

import jax
import numpy as np
import pytest

from jaxrec.core.mesh import make_mesh
from jaxrec.models.two_tower import ITEM
from jaxrec.training import loop as loop_module
from jaxrec.training.checkpoint import Checkpoints
from jaxrec.training.loop import LoopConfig, NotFiniteError, restore, train
from jaxrec.training.state import to_checkpoint
from jaxrec.training.writer import read_metrics

CONFIG = LoopConfig(
    num_train_steps=10,
    global_batch_size=16,
    history_length=16,
    windows="last",
    log_every_steps=2,
    checkpoint_every_steps=4,
    keep_checkpoints=2,
    validate_every_steps=4,
    metric="ndcg@10",
)


@pytest.fixture(scope="module")
def mesh_2x4():
    mesh = make_mesh((2, 4))
    with jax.set_mesh(mesh):
        yield mesh


def final_state(setup, workdir):
    """The newest checkpoint, in the order of its files."""
    with Checkpoints(str(workdir / "checkpoints"), keep=1, save_every_steps=1) as checkpoints:
        state = restore(setup, setup.init_state(), checkpoints)
        return jax.tree.map(np.array, to_checkpoint(state, setup.tables, setup.mesh))


def rising(state):
    """A validation that is best at step 8."""
    step = int(jax.device_get(state.step))
    return {"ndcg@10": {4: 0.1, 8: 0.3, 10: 0.2}[step]}


@pytest.fixture(scope="module")
def uninterrupted(make, mesh_2x4, tmp_path_factory, dataset):
    workdir = tmp_path_factory.mktemp("whole")
    setup = make(mesh_2x4)
    train(setup, dataset, CONFIG, workdir, rising)
    return setup, workdir, final_state(setup, workdir)


def preempt_at(monkeypatch, step):
    monkeypatch.setattr(Checkpoints, "reached_preemption", lambda self, done: done == step)


def test_a_stopped_run_goes_on_bit_exactly(uninterrupted, tmp_path, monkeypatch, caplog, dataset):
    setup, whole, expected = uninterrupted
    with monkeypatch.context() as patch:
        preempt_at(patch, 7)
        train(setup, dataset, CONFIG, tmp_path, rising)
    with caplog.at_level(logging.INFO):
        train(setup, dataset, CONFIG, tmp_path, rising)
    assert "resuming from step 7" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, final_state(setup, tmp_path), expected)
    names = ("loss", "gradient_norm", "validation/ndcg@10")
    curves = [[(m["step"], *(m.get(n) for n in names)) for m in read_metrics(d)] for d in (whole, tmp_path)]
    # Step 7 is logged by neither; every other line is the same to the last bit.
    assert curves[0] == curves[1]


def test_a_finished_run_trains_no_further(uninterrupted, dataset):
    setup, whole, expected = uninterrupted
    state = train(setup, dataset, CONFIG, whole, rising)
    assert int(jax.device_get(state.step)) == CONFIG.num_train_steps
    jax.tree.map(np.testing.assert_array_equal, final_state(setup, whole), expected)


def test_a_checkpoint_moves_to_another_mesh(uninterrupted, make):
    _, whole, expected = uninterrupted
    other = make_mesh((8, 1))
    with jax.set_mesh(other):
        setup = make(other)
        jax.tree.map(np.testing.assert_array_equal, final_state(setup, whole), expected)
        assert len(setup.init_state().tables[ITEM].addressable_shards) == 8


def test_the_best_state_by_validation_is_kept(uninterrupted):
    _, whole, _ = uninterrupted
    with Checkpoints(str(whole / "best"), keep=1, save_every_steps=1) as best:
        assert best.latest_step() == 8
        assert best.latest_metadata()["ndcg@10"] == 0.3


def test_the_log_holds_rates_losses_and_norms(uninterrupted):
    lines = [line for line in read_metrics(uninterrupted[1]) if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
    for name in (
        "loss/next_item",
        "loss/masked_item",
        "loss/behaviour",
        "gradient_norm/dense",
        "gradient_norm/item",
    ):
        assert all(np.isfinite(line[name]) for line in lines)
    for name in ("events_per_second", "steps_per_second", "flops_utilisation", "input_wait_share"):
        assert all(line[name] >= 0 for line in lines)


def test_nan_stops_the_run_and_names_step_and_task(make, mesh_2x4, tmp_path, monkeypatch, dataset):
    setup = make(mesh_2x4)

    def poisoned_state(self):
        state = original(self)
        return dataclasses.replace(state, tables={**state.tables, ITEM: state.tables[ITEM] * np.nan})

    original = type(setup).init_state
    monkeypatch.setattr(type(setup), "init_state", poisoned_state)
    with pytest.raises(
        NotFiniteError, match=r"step 0 .* task next_item, masked_item, behaviour, at batch index 0"
    ):
        train(setup, dataset, CONFIG, tmp_path, None)
    # Nothing was saved that a later start would resume from.
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_waiting_for_input_is_measured(make, mesh_2x4, dataset):
    prefetch = loop_module.Prefetch(
        make(mesh_2x4), dataset, dataclasses.replace(CONFIG, num_train_steps=2), 0
    )
    _, first, waited = prefetch.next()
    assert waited >= 0
    assert first.item_ids.shape == (16, 16)
    prefetch.next()
    with pytest.raises(AssertionError, match="as many batches as there are steps"):
        prefetch.next()
