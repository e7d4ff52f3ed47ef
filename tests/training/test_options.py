"""Options of the towers, trained: the same on every mesh as on one device, one score for all, refusals by name."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxrec.core.mesh import make_mesh
from jaxrec.data.evaluation_batches import EvaluationRows
from jaxrec.data.pipeline import train_batches
from jaxrec.embedding.row_optimizer import Sgd
from jaxrec.embedding.table import to_logical
from jaxrec.evaluation.full_ranking import FullRanking
from jaxrec.losses.samplers import UniformSampler
from jaxrec.models.memory import TransitionMemory
from jaxrec.models.mixture import MixtureOfLogits
from jaxrec.models.two_tower import ITEM, ITEM_BIAS, ITEM_OUTPUT, Cosine, Outputs, TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.behaviour import Behaviour
from jaxrec.tasks.candidates import SampledSoftmax
from jaxrec.tasks.distillation import Distillation
from jaxrec.tasks.masked_item import MaskedItem
from jaxrec.tasks.next_item import NextItem
from jaxrec.training.inference import Inference
from jaxrec.training.lookups import whole_tables
from jaxrec.training.optimizer import OptimizerConfig
from jaxrec.training.setup import place_batch
from jaxrec.training.state import make_model, merge_model
from jaxrec.training.step import make_train_step

LENGTH, ROWS = 16, 16
HSTU = EncoderConfig(
    embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16, max_positions=LENGTH, block="hstu", activation="silu",
    norm_position="pre", positions="relative",
)  # fmt: skip
MODEL = TwoTowerConfig(
    encoder=HSTU, item_dim=8, output_table=True, cosine=Cosine(temperature=0.2, learned=True), init_scale=0.5
)
TASKS = {
    "next_item": NextItem(candidates=SampledSoftmax(sampler=UniformSampler(num_samples=11))),
    "behaviour": Behaviour(),
}


def trained(mesh, make, dataset, num_steps=2, **changes):
    """The setup, the state before and after, and the losses."""
    setup = make(mesh, **({"model": MODEL, "tasks": TASKS} | changes))
    first = jax.device_get(setup.init_state())
    state, losses = setup.init_state(), []
    step = make_train_step(setup.step, state, mesh)
    for batch in train_batches(
        dataset, global_batch_size=ROWS, history_length=LENGTH, seed=0, stop_step=num_steps
    ):
        state, metrics = step(state, place_batch(batch, mesh))
        losses.append({name: float(value) for name, value in metrics.items() if name.startswith("loss")})
    return setup, first, state, losses


@functools.cache
def dense_twin(make, dataset):
    """Losses, scores and behaviour logits on one device."""
    mesh = make_mesh((1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        setup, _, state, losses = trained(mesh, make, dataset)
        return losses, asked(setup, state, dataset)


def asked(setup, state, dataset):
    """Scores of the users of a batch over the whole catalogue, and logits of behaviours."""
    rows = EvaluationRows.make(dataset, "validation", rows_per_batch=ROWS, history_length=LENGTH)
    inference, batch = Inference(setup, state), rows.build(0)
    queries, _ = inference.queries(batch)
    vectors, bias = (logical(x) for x in inference.catalogue())
    return np.asarray(queries) @ vectors.T + bias, np.asarray(inference.behaviour_logits(batch))


def logical(rows):
    table = jax.numpy.reshape(rows, (len(rows), -1))
    return np.asarray(jax.jit(lambda t: to_logical(t, 81))(table))[:81].reshape(81, *rows.shape[1:])


def test_every_mesh_trains_and_scores_alike(mesh, make, dataset):
    setup, first, state, losses = trained(mesh, make, dataset)
    twin_losses, twin_asked = dense_twin(make, dataset)
    for one, other in zip(losses, twin_losses, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    for one, other in zip(asked(setup, state, dataset), twin_asked, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3)
    assert float(state.dense["log_temperature"]) != float(first.dense["log_temperature"])


def test_the_loss_the_head_and_the_evaluation_see_one_score(make, dataset, one_device):
    """By hand: cosines over the temperature against the output rows, for the events that the input rows are."""
    encoder = EncoderConfig(
        embed_dim=16, num_layers=1, mlp_dim=8, max_positions=LENGTH, dropout_rate=0.0,
        attention_dropout_rate=0.0, embedding_dropout_rate=0.0,
    )  # fmt: skip
    model = TwoTowerConfig(
        encoder=encoder, item_dim=8, output_table=True, cosine=Cosine(temperature=0.2), init_scale=0.5
    )
    tasks = {"next_item": NextItem(temperature=0.5)}
    setup, first, state, losses = trained(
        one_device, make, dataset, 1, model=model, tasks=tasks, row_optimizer=Sgd(learning_rate=1.0),
        optimizer=OptimizerConfig(),
    )  # fmt: skip
    (batch,) = train_batches(dataset, global_batch_size=ROWS, history_length=LENGTH, seed=0, stop_step=1)
    inputs, outputs = (logical(first.tables[name]) for name in (ITEM, ITEM_OUTPUT))
    towers = merge_model(setup.step.graphdef, setup.step.abstract, first.dense)
    plain = make_model(TwoTowerConfig(encoder=encoder, item_dim=8), Outputs(), 0)
    states = towers.encode(inputs[batch.item_ids], batch, causal=True, key=None)
    plain.projection[...] = towers.projection[...]
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    scores = unit(np.asarray(plain.queries(states))) @ unit(outputs[1:]).T / 0.2 / 0.5
    follows = batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
    at = np.nonzero(follows & (batch.segment_ids[:, 1:] > 0))
    chosen, targets = scores[at], batch.item_ids[:, 1:][at]
    log_sums = np.log(np.exp(chosen).sum(-1))
    wanted = np.mean(log_sums - chosen[np.arange(len(targets)), targets - 1])
    assert losses[0]["loss/next_item"] == pytest.approx(wanted, rel=1e-4)

    vectors, _ = Inference(setup, state).catalogue()
    np.testing.assert_allclose(logical(vectors)[1:], unit(logical(state.tables[ITEM_OUTPUT])[1:]), rtol=1e-5)
    assert whole_tables(setup.tables, tasks) == [ITEM_OUTPUT, ITEM_BIAS]
    moved = [
        set(np.flatnonzero((logical(state.tables[name]) != logical(first.tables[name])).any(-1)))
        for name in (ITEM, ITEM_OUTPUT)
    ]
    assert moved[0] <= set(batch.item_ids.reshape(-1)), "rows of events alone"
    assert moved[1] == set(range(1, 81)), "a full softmax moves every candidate"


MIXED = TwoTowerConfig(
    encoder=EncoderConfig(embed_dim=16, num_layers=1, mlp_dim=8, max_positions=LENGTH),
    item_dim=8,
    mixture=MixtureOfLogits(num_vectors=2, dim=4),
    init_scale=0.5,
)
SAMPLED = {"next_item": NextItem(candidates=SampledSoftmax(sampler=UniformSampler(num_samples=11)))}


def mixture_run(mesh, make, dataset):
    """Losses of a mixture, its users' ranks over the catalogue, and its dense parameters before and after."""
    setup, first, state, losses = trained(mesh, make, dataset, model=MIXED, tasks=SAMPLED)
    rows = EvaluationRows.make(dataset, "validation", rows_per_batch=ROWS, history_length=LENGTH)
    inference, batch = Inference(setup, state), rows.build(0)
    ranking = FullRanking(mesh=mesh, num_items=80, score=MIXED.mixture.score, top_k=5)
    nothing = np.zeros(1, np.int32)
    ranked = ranking.rank(
        ranking.catalogue(*inference.catalogue()),
        inference.queries(batch)[0],
        batch.targets,
        nothing,
        nothing,
    )
    return [one["loss/next_item"] for one in losses], *jax.device_get((ranked, first.dense, state.dense))


@functools.cache
def mixture_twin(make, dataset):
    mesh = make_mesh((1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        return mixture_run(mesh, make, dataset)


def test_a_mixture_trains_and_ranks_alike_on_every_mesh(mesh, make, dataset):
    losses, ranked, _, _ = mixture_run(mesh, make, dataset)
    twin_losses, twin_ranked, first, last = mixture_twin(make, dataset)
    np.testing.assert_allclose(losses, twin_losses, rtol=1e-4)
    np.testing.assert_allclose(ranked.top_scores, twin_ranked.top_scores, rtol=2e-3, atol=2e-3)
    for side in ("query_mixture", "item_mixture"):
        assert np.abs(np.asarray(last[side]["gate"]) - first[side]["gate"]).max() > 0, "the gates are learned"
    assert float(last["query_mixture"]["sharpness"][0]) != 0.0


@pytest.mark.parametrize(
    ("tasks", "who"),
    [
        ({"next_item": NextItem()}, "'next_item' .NextItem."),
        (SAMPLED | {"judge": Behaviour()}, "'judge' .Behaviour."),
        ({"next_item": dataclasses.replace(SAMPLED["next_item"], temperature=0.5)}, "'next_item'"),
    ],
)
def test_a_mixture_refuses_what_scores_by_products(tasks, who, make, one_device):
    with pytest.raises(ValueError, match=f"model.mixture is set, but task {who}"):
        make(one_device, model=MIXED, tasks=tasks)


@pytest.mark.parametrize(
    ("tasks", "memory", "message"),
    [
        ({"next_item": NextItem()}, TransitionMemory(), "set model.memory=none"),
        ({"blanks": MaskedItem()}, None, r"'blanks' \(MaskedItem\) fills in blanks"),
        ({"next_item": NextItem(temperature=0.5)}, None, "student_temperature=1.0, but task 'next_item'"),
    ],
)
def test_what_is_taught_is_what_is_asked(tasks, memory, message, make, one_device):
    model = dataclasses.replace(make(one_device).model, memory=memory)
    with pytest.raises(ValueError, match=message):
        make(one_device, model=model, tasks=tasks | {"distillation": Distillation(teacher="runs/big")})


def test_a_run_is_asked_by_a_task_that_it_trains(make, one_device):
    tasks = {"watched": MaskedItem(weight=0.0), "next_item": NextItem()}
    assert make(one_device, tasks=tasks).ranking_task is tasks["next_item"]
    assert make(one_device, tasks={"watched": MaskedItem(weight=0.0)}).ranking_task.query_mode == "masked"


def test_a_mixture_has_cosines_of_its_own():
    with pytest.raises(ValueError, match="set model.cosine to none"):
        TwoTowerConfig(mixture=MixtureOfLogits(), cosine=Cosine())
    with pytest.raises(ValueError, match="mixture.num_vectors=1"):
        MixtureOfLogits(num_vectors=1)


def test_a_time_bias_needs_times(make, one_device):
    model = TwoTowerConfig(encoder=EncoderConfig(time_bias=True))
    with pytest.raises(ValueError, match=r"time_bias=True needs the times .* data.columns.timestamp"):
        make(one_device, model=model)
