"""Sequence contrast in a step: it trains beside another task, alike on every mesh."""

import jax
import numpy as np
import pytest

from jaxrec.core.mesh import make_mesh
from jaxrec.data.pipeline import train_batches
from jaxrec.tasks.next_item import NextItem
from jaxrec.tasks.sequence_contrast import SequenceContrast
from jaxrec.training.setup import place_batch
from jaxrec.training.step import make_train_step

TASKS = {"next_item": NextItem(), "contrast": SequenceContrast(weight=0.1)}


def losses(mesh, make, dataset):
    """Of the contrast, over a few steps."""
    with jax.set_mesh(mesh):
        setup = make(mesh, tasks=TASKS)
        state = setup.init_state()
        step = make_train_step(setup.step, state, mesh)
        found = []
        for batch in train_batches(dataset, global_batch_size=16, history_length=16, seed=0, stop_step=3):
            state, metrics = step(state, place_batch(batch, mesh))
            found.append(float(metrics["loss/contrast"]))
        return found


@pytest.fixture(scope="module")
def alone(make, dataset):
    """On one device."""
    return losses(make_mesh((1, 1), jax.devices()[:1]), make, dataset)


def test_every_mesh_learns_the_same(mesh, make, dataset, alone):
    assert min(alone) > 0
    np.testing.assert_allclose(losses(mesh, make, dataset), alone, rtol=1e-4)
