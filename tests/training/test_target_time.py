"""The time of the target, told to a model that asks for it: in training, in the evaluation, on every mesh."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxrec.core.mesh import make_mesh
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.evaluation_batches import EvaluationRows
from jaxrec.data.histories import UNKNOWN_TIME, Histories
from jaxrec.data.pipeline import train_batches
from jaxrec.embedding.row_optimizer import Adam
from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.masked_item import MaskedItem
from jaxrec.tasks.next_item import NextItem
from jaxrec.training.inference import Inference
from jaxrec.training.optimizer import OptimizerConfig
from jaxrec.training.setup import dataset_facts, place_batch
from jaxrec.training.step import make_train_step

LENGTH, ROWS, ITEMS, STEPS = 16, 16, 8, 60
ENCODER = EncoderConfig(embed_dim=8, num_layers=1, num_heads=2, mlp_dim=8, max_positions=LENGTH)
MODEL = TwoTowerConfig(encoder=ENCODER, item_dim=8, target_time=True)
TASKS = {"next_item": NextItem()}


def gaps_say_it_all(seed=0):
    """80 histories in which the time before an event says whether its item is of the first half."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, 16, 80)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    late = rng.random(offsets[-1]) < 0.5
    item_ids = rng.integers(1, ITEMS // 2 + 1, offsets[-1]) + late * (ITEMS // 2)
    gaps = np.where(late, 90_000, 30)
    times = np.concatenate(
        [np.cumsum(part) for part in np.split(gaps, offsets[1:-1])],
    )
    return PreparedDataset.from_histories(
        Histories(
            offsets=offsets,
            item_ids=item_ids.astype(np.int32),
            timestamps=times.astype(np.int64),
            labels=np.zeros((offsets[-1], 0), np.int8),
        ),
        num_items=ITEMS,
        behaviours=(),
    )


@pytest.fixture(scope="module")
def timed():
    return gaps_say_it_all()


def trained(make, mesh, dataset, model=MODEL, steps=STEPS):
    setup = make(
        mesh,
        facts=dataset_facts(dataset),
        model=model,
        tasks=TASKS,
        optimizer=OptimizerConfig(learning_rate=3e-2, schedule="constant", warmup_steps=0),
        row_optimizer=Adam(learning_rate=3e-2),
        num_train_steps=steps,
    )
    state = setup.init_state()
    step = make_train_step(setup.step, state, setup.mesh)
    for batch in train_batches(
        dataset, global_batch_size=ROWS, history_length=LENGTH, seed=0, stop_step=steps
    ):
        state, metrics = step(state, place_batch(batch, setup.mesh))
    return setup, state, float(metrics["loss/next_item"])


def asked(setup, state, dataset):
    """The users' queries on test targets, and the targets."""
    rows = EvaluationRows.make(dataset, "test", rows_per_batch=ROWS, history_length=LENGTH)
    inference = Inference(setup, state)
    queries, targets = [], []
    for index in range(rows.num_batches):
        batch = rows.build(index)
        queries.append(np.asarray(inference.queries(batch)[0])[batch.user_mask])
        targets.append(batch.targets[batch.user_mask])
    return np.concatenate(queries), np.concatenate(targets)


def right_halves(setup, state, dataset):
    """The share of users whose best item is of their target's half, on one device."""
    queries, targets = asked(setup, state, dataset)
    vectors, bias = (np.asarray(part) for part in Inference(setup, state).catalogue())
    best = (queries @ vectors.T + bias)[:, 1 : ITEMS + 1].argmax(-1) + 1
    return np.mean((best > ITEMS // 2) == (targets > ITEMS // 2))


def test_a_model_that_is_told_the_time_uses_it_and_another_cannot(make, timed, one_device):
    told, state, loss = trained(make, one_device, timed)
    assert right_halves(told, state, timed) > 0.95
    untold, state, loss_without = trained(
        make, one_device, timed, dataclasses.replace(MODEL, target_time=False)
    )
    assert right_halves(untold, state, timed) < 0.75
    assert loss < loss_without - 0.3


@pytest.fixture(scope="module")
def twin(make, timed):
    mesh = make_mesh((1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        setup, state, loss = trained(make, mesh, timed, steps=3)
        return loss, asked(setup, state, timed)[0]


def test_every_mesh_gives_the_same(mesh, make, timed, twin):
    setup, state, loss = trained(make, mesh, timed, steps=3)
    np.testing.assert_allclose(loss, twin[0], rtol=1e-4)
    np.testing.assert_allclose(asked(setup, state, timed)[0], twin[1], atol=1e-3)


def test_the_gap_of_the_target_is_that_of_its_event(timed):
    rows = EvaluationRows.make(timed, "test", rows_per_batch=ROWS, history_length=LENGTH)
    batch = rows.build(0)
    late = batch.targets[batch.user_mask] > ITEMS // 2
    assert set(batch.target_gaps[batch.user_mask][late]) == {(90_000).bit_length() + 1}
    assert set(batch.target_gaps[batch.user_mask][~late]) == {(30).bit_length() + 1}
    everything = EvaluationRows.make(timed, "all", rows_per_batch=ROWS, history_length=LENGTH).build(0)
    assert not everything.target_gaps.any()


def test_what_cannot_be_told_is_refused(make, timed, one_device):
    with pytest.raises(ValueError, match="'blank' .*fills in blanks"):
        make(one_device, facts=dataset_facts(timed), model=MODEL, tasks={"blank": MaskedItem()})
    histories = timed.histories(np.arange(len(timed.lengths)))
    histories.timestamps[:] = UNKNOWN_TIME
    without = PreparedDataset.from_histories(histories, num_items=ITEMS, behaviours=())
    with pytest.raises(ValueError, match="target_time=True needs the times"):
        make(one_device, facts=dataset_facts(without), model=MODEL, tasks=TASKS)
