"""Two shops trained together: alike on every mesh, each with its own adapter and its own catalogue."""

import functools

import jax
import numpy as np
import pytest

from jaxrec.core.mesh import make_mesh
from jaxrec.data.dataset import UNKNOWN_TIME, Histories, PreparedDataset
from jaxrec.data.evaluation_batches import EvaluationRows
from jaxrec.data.pipeline import train_batches
from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.masked_item import MaskedItem
from jaxrec.tasks.next_item import NextItem
from jaxrec.training.inference import Inference
from jaxrec.training.setup import dataset_facts, place_batch
from jaxrec.training.step import make_train_step

LENGTH, ROWS = 16, 8
ENCODER = EncoderConfig(embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16, max_positions=LENGTH)
TASKS = {"next_item": NextItem(), "masked_item": MaskedItem(weight=0.5)}


@functools.cache
def shops():
    """Users of two shops, of which each has forty items."""
    rng = np.random.default_rng(0)
    shop = rng.integers(0, 2, 60)
    lengths = rng.integers(3, 12, 60)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    item_ids = rng.integers(1, 41, offsets[-1]) + 40 * np.repeat(shop, lengths)
    return PreparedDataset.from_histories(
        Histories(
            offsets,
            item_ids.astype(np.int32),
            np.full(offsets[-1], UNKNOWN_TIME),
            np.zeros((offsets[-1], 0), np.int8),
        ),
        num_items=80,
        domains=("a", "b"),
        user_keys=[f"{'ab'[one]}:{index}" for index, one in enumerate(shop)],
        item_keys=[f"{name}:{item}" for name in "ab" for item in range(40)],
    )


def make_shops(make, mesh, rank, tasks=TASKS):
    model = TwoTowerConfig(encoder=ENCODER, item_dim=8, domain_adapters=rank)
    return make(mesh, facts=dataset_facts(shops()), model=model, tasks=tasks)


def trained(make, mesh, rank=4, num_steps=3, tasks=TASKS):
    """The setup, the state before and after some steps, and the losses."""
    setup = make_shops(make, mesh, rank, tasks)
    state = setup.init_state()
    first, losses = jax.device_get(state.dense), []
    step = make_train_step(setup.step, state, mesh)
    for batch in train_batches(
        shops(), global_batch_size=ROWS, history_length=LENGTH, domain_temperature=3.0, stop_step=num_steps
    ):
        state, metrics = step(state, place_batch(batch, mesh))
        losses.append({name: float(value) for name, value in metrics.items() if name.startswith("loss")})
    return setup, first, state, losses


@functools.cache
def dense_twin(make):
    mesh = make_mesh((1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        _, first, state, losses = trained(make, mesh)
        return losses, first, jax.device_get(state.dense)


def test_every_mesh_trains_alike(mesh, make):
    losses, first, dense = dense_twin(make)
    _, _, _, found = trained(make, mesh)
    for one, other in zip(found, losses, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert np.abs(first["domain_adapters"]["up"]).max() == 0
    assert (np.abs(dense["domain_adapters"]["up"]).max(axis=(1, 2)) > 0).all(), "both have learned"


def test_adapters_change_nothing_before_they_are_trained(make, one_device):
    with_adapters, without = (
        make_shops(make, one_device, rank, {"next_item": NextItem()}) for rank in (4, 0)
    )
    batch = EvaluationRows.make(shops(), "test", rows_per_batch=ROWS, history_length=LENGTH).build(0)
    state = without.init_state()
    dense = with_adapters.init_state().dense | {
        name: value for name, value in state.dense.items() if name != "domain_adapters"
    }
    plain = Inference(without, state)
    adapted = Inference(with_adapters, state)
    adapted.dense = dense
    np.testing.assert_allclose(adapted.queries(batch)[0], plain.queries(batch)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("task", [NextItem(), MaskedItem()], ids=["causal", "masked"])
def test_a_user_is_asked_through_the_adapter_of_the_own_shop(make, one_device, task):
    setup = make_shops(make, one_device, 4, {"task": task})
    inference = Inference(setup, setup.init_state())
    rows = EvaluationRows.make(
        shops(), "test", rows_per_batch=ROWS, history_length=LENGTH, append_slot=inference.appends_slot
    )
    batch = rows.build(0)
    before = np.asarray(inference.queries(batch)[0])
    bias = np.zeros((2, 16), np.float32)
    bias[1] = 1.0
    adapters = inference.dense["domain_adapters"] | {"up_bias": bias}
    inference.dense = inference.dense | {"domain_adapters": adapters}
    moved = (np.asarray(inference.queries(batch)[0]) != before).any(axis=1)
    real = batch.user_indices >= 0
    np.testing.assert_array_equal(moved[real], shops().user_domains[batch.user_indices[real]] == 2)
    assert moved[real].any()
    assert not moved[real].all()


def test_adapters_want_several_domains(make, one_device):
    with pytest.raises(
        ValueError, match=r"domain_adapters=4, but dataset 'memory' has one domain; .*Domains"
    ):
        make(one_device, model=TwoTowerConfig(encoder=ENCODER, domain_adapters=4))
    with pytest.raises(ValueError, match="domain_adapters=-1 must be at least 1"):
        TwoTowerConfig(domain_adapters=-1)
