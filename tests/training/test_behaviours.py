"""Heads and funnels in the step and at inference: the same on every mesh, in every layout."""

import jax
import numpy as np
import pytest

from jaxrec.core.mesh import make_mesh
from jaxrec.data.evaluation_batches import EvaluationRows
from jaxrec.data.pipeline import train_batches
from jaxrec.losses.binary import product_logits
from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.nn.heads import PLE
from jaxrec.tasks.behaviour import Behaviour
from jaxrec.tasks.candidates import InBatch
from jaxrec.tasks.funnel import Funnel
from jaxrec.tasks.next_item import NextItem
from jaxrec.training.inference import Inference
from jaxrec.training.setup import place_batch
from jaxrec.training.step import make_train_step

LENGTH, ROWS = 16, 16
HEAD = PLE(num_layers=2, shared_experts=2, own_experts=1, expert_dim=8)
NEXT = NextItem(weight=0.1, candidates=InBatch())
TASKS = {"next_item": NEXT, "funnel": Funnel(first="click", second="buy")}
LAYOUTS = {(8, 1): "fsdp", (2, 4): "tensor", (1, 8): "replicated"}


def model_of(layout):
    encoder = EncoderConfig(
        embed_dim=16, num_layers=1, num_heads=4, mlp_dim=16, max_positions=LENGTH, layout=layout
    )
    return TwoTowerConfig(encoder=encoder, item_dim=8, head=HEAD)


def trained(setup, dataset):
    """Two steps: the state, the losses, and the evaluation batch's logits after them."""
    state = setup.init_state()
    step = make_train_step(setup.step, state, setup.mesh)
    stream = train_batches(dataset, global_batch_size=ROWS, history_length=LENGTH, seed=0, stop_step=2)
    losses = []
    for batch in stream:
        state, metrics = step(state, place_batch(batch, setup.mesh))
        losses.append(float(metrics["loss/funnel"]))
    return state, losses, logits_of(setup, state, dataset)


def logits_of(setup, state, dataset):
    rows = EvaluationRows.make(dataset, "test", rows_per_batch=ROWS, history_length=LENGTH)
    batch = rows.build(0)
    return np.asarray(Inference(setup, state).behaviour_logits(batch))[batch.user_indices >= 0]


@pytest.fixture(scope="module")
def twin(make, dataset):
    """One device, and the same state asked by a task that takes the head's logits as they are."""
    mesh = make_mesh((1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        setup = make(mesh, model=model_of("replicated"), tasks=TASKS)
        state, losses, logits = trained(setup, dataset)
        plain = make(mesh, model=setup.model, tasks={"next_item": NEXT, "behaviour": Behaviour()})
        return losses, logits, logits_of(plain, state, dataset)


def test_inference_gives_the_logits_of_the_funnel(twin):
    _, logits, raw = twin
    np.testing.assert_array_equal(logits[:, 0], raw[:, 0])
    np.testing.assert_allclose(logits[:, 1], product_logits(raw[:, 0], raw[:, 1]), rtol=1e-5)
    assert (logits[:, 1] <= logits[:, 0]).all()


def test_every_mesh_and_layout_gives_the_same(mesh, make, dataset, twin):
    layout = LAYOUTS[mesh.devices.shape]
    state, losses, logits = trained(make(mesh, model=model_of(layout), tasks=TASKS), dataset)
    np.testing.assert_allclose(losses, twin[0], rtol=1e-4)
    np.testing.assert_allclose(logits, twin[1], atol=2e-4)
    kernel = state.dense["behaviour_head"]["levels"][0]["expert_kernel"]
    shape = kernel.sharding.shard_shape(kernel.shape)
    assert shape == (*kernel.shape[:2], 1 if layout == "fsdp" else HEAD.expert_dim)
