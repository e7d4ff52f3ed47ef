"""Several tasks in one model: fixed weights, learned weights, gradient surgery."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.core.mesh import make_mesh
from jaxrec.data.pipeline import train_batches
from jaxrec.embedding.engine import squared_norm
from jaxrec.models.two_tower import LOG_VARIANCES, TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.behaviour import Behaviour
from jaxrec.tasks.next_item import NextItem
from jaxrec.training import balance
from jaxrec.training.balance import GradientSurgery, UncertaintyWeights
from jaxrec.training.checkpoint import Checkpoints
from jaxrec.training.gradients import batch_gradients, task_gradients
from jaxrec.training.loop import LoopConfig, restore, train
from jaxrec.training.setup import place_batch
from jaxrec.training.state import to_checkpoint
from jaxrec.training.writer import read_metrics

TASKS = {"next_item": NextItem(), "behaviour": Behaviour(weight=3.0)}
KEY = jax.random.key(7)


@jax.jit
def join(gradients, key):
    return GradientSurgery().join(gradients, {}, {}, key)


def surgery_twin(gradients, key):
    """PCGrad as the paper writes it, on whole vectors: `gradients [K, P]`; also the conflicting pairs."""
    num_tasks = len(gradients)
    projected = gradients.astype(np.float64)
    for task in range(num_tasks):
        order = jax.random.permutation(
            jax.random.fold_in(jax.random.fold_in(key, balance._ORDERS), task), num_tasks
        )
        for other in (int(other) for other in order if other != task):
            product = projected[task] @ gradients[other]
            if product < 0:
                projected[task] -= product / (gradients[other] @ gradients[other]) * gradients[other]
    pairs = np.triu(gradients @ gradients.T < 0, 1)
    return projected.sum(0), int(pairs.sum())


@settings(max_examples=25)
@given(st.integers(2, 4), st.integers(0, 2**31 - 1), st.sampled_from([1.0, 1e-3, 1e4]))
def test_surgery_equals_the_papers_algorithm(num_tasks, seed, scale):
    """Parameters of one task's own stand beside the shared ones, and come out as they were."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((num_tasks, 6)).astype(np.float32) * scale
    own = rng.standard_normal((num_tasks, 3)).astype(np.float32)
    only_own = np.eye(num_tasks, dtype=np.float32)[:, :, None] * own
    trees = [
        {"shared": {"a": shared[i, :2], "b": shared[i, 2:].reshape(2, 2)}, "own": list(only_own[i])}
        for i in range(num_tasks)
    ]
    key = jax.random.key(seed)
    found, metrics = join(trees, key)
    expected, conflicts = surgery_twin(shared, key)
    flat = np.concatenate([found["shared"]["a"], found["shared"]["b"].reshape(-1)])
    np.testing.assert_allclose(flat, expected, rtol=1e-3, atol=1e-4 * scale)
    np.testing.assert_array_equal(np.stack(found["own"]), own)
    assert int(metrics["conflicting_pairs"]) == conflicts


@given(st.integers(0, 2**31 - 1))
@settings(max_examples=10)
def test_without_conflict_surgery_is_the_plain_sum(seed):
    gradients = np.random.default_rng(seed).random((3, 5)).astype(np.float32)
    found, metrics = join(list(gradients), jax.random.key(seed))
    np.testing.assert_allclose(found, gradients.sum(0), rtol=1e-6)
    assert int(metrics["conflicting_pairs"]) == 0


@pytest.mark.parametrize(
    ("gradients", "expected"),
    [
        ([[1.0, 0.0], [-1.0, 0.0]], [0.0, 0.0]),  # opposite: nothing is left of either
        ([[1.0, 0.0], [0.0, 0.0]], [1.0, 0.0]),  # a task without targets
        ([[1.0, 0.0], [-1.0, 1.0]], [0.5, 1.5]),
        ([[np.nan, 0.0], [-1.0, 1.0]], [np.nan, 1.0]),  # the step's guard must see it
    ],
)
def test_surgery_by_hand(gradients, expected):
    found, _ = join([jnp.array(g) for g in gradients], KEY)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_order_is_that_of_the_key():
    gram = jnp.array([[1.0, -0.9, -0.9], [-0.9, 1.0, 0.8], [-0.9, 0.8, 1.0]])
    found = {tuple(np.asarray(balance.surgery_factors(gram, jax.random.key(i)))) for i in range(8)}
    assert len(found) > 1
    assert tuple(np.asarray(balance.surgery_factors(gram, jax.random.key(0)))) in found


def plain(make, mesh, **changes):
    """A setup without dropout, whose microbatches add up to the batch."""
    encoder = EncoderConfig(
        embed_dim=8, num_heads=2, mlp_dim=8, num_layers=1, max_positions=16,
        dropout_rate=0.0, attention_dropout_rate=0.0, embedding_dropout_rate=0.0,
    )  # fmt: skip
    model = TwoTowerConfig(encoder=encoder, item_dim=4)
    return make(mesh, **({"model": model, "tasks": TASKS} | changes))


def one_batch(dataset, mesh):
    (batch,) = train_batches(dataset, global_batch_size=16, history_length=16, seed=0, stop_step=1)
    return place_batch(batch, mesh)


def flat(tree, keep=lambda name: True):
    return np.concatenate(
        [
            np.asarray(leaf).reshape(-1)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            if keep(jax.tree_util.keystr(path, simple=True, separator="/"))
        ]
    )


def taken(setup, state, batch):
    """A batch's gradients of dense parameters, the norms of those of rows and tables, losses and metrics."""

    @jax.jit
    def run(state, batch):
        found = batch_gradients(setup.step, state, batch, KEY)
        rows = {name: squared_norm(sparse) for name, sparse in found.sparse.items()}
        tables = {name: jnp.sum(jnp.square(gradient)) for name, gradient in found.catalogue.items()}
        return found.dense, (rows, tables), found.losses, found.metrics

    return jax.device_get(run(state, batch))


def surgery(make, mesh, dataset, **changes):
    setup = plain(make, mesh, balance=GradientSurgery(), **changes)
    return taken(setup, setup.init_state(), one_batch(dataset, mesh))


@pytest.fixture(scope="module")
def twin(make, dataset):
    """Surgery on one device."""
    mesh = make_mesh((1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        return surgery(make, mesh, dataset)


close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6)


def test_every_mesh_operates_alike(mesh, make, dataset, twin):
    jax.tree.map(close, surgery(make, mesh, dataset), twin)


def test_microbatches_are_summed_before_they_are_projected(make, dataset, one_device, twin):
    jax.tree.map(close, surgery(make, one_device, dataset, accumulation_steps=4), twin)


def test_surgery_changes_what_the_tasks_share_and_nothing_else(make, dataset, one_device, twin):
    setup = plain(make, one_device)
    state, batch = setup.init_state(), one_batch(dataset, one_device)
    dense, rows, losses, metrics = taken(setup, state, batch)
    assert metrics == {}
    jax.tree.map(close, (rows, losses), twin[1:3])
    by_task = jax.device_get(jax.jit(functools.partial(task_gradients, setup.step))(state, batch, KEY))
    close(flat(dense), sum(task.weight * flat(by_task[name]) for name, task in TASKS.items()))
    own = lambda name: name.startswith("behaviour_head")  # noqa: E731
    close(flat(twin[0], own), flat(dense, own))
    shared = lambda name: not own(name)  # noqa: E731
    expected, conflicts = surgery_twin(
        np.stack([task.weight * flat(by_task[name], shared) for name, task in TASKS.items()]), KEY
    )
    close(flat(twin[0], shared), expected)
    assert int(twin[3]["conflicting_pairs"]) == conflicts


@given(st.floats(0.0, 3.0), st.floats(1e-3, 20.0), st.floats(-3.0, 3.0), st.integers(0, 5), st.integers(0, 5))
def test_learned_weights_have_their_closed_form(weight, loss, log_variance, targets, others):
    task = NextItem(weight=weight)
    all_targets = targets + others

    def objective(log_variance, loss):
        return UncertaintyWeights().objective(
            "a", task, loss, {LOG_VARIANCES: {"a": log_variance}},
            targets=jnp.float32(targets), all_targets=jnp.float32(all_targets),
        )  # fmt: skip

    found = jax.grad(objective, argnums=(0, 1))(jnp.float32(log_variance), jnp.float32(loss))
    share = targets / max(all_targets, 1)
    expected = weight * (0.5 * share - np.exp(-log_variance) * loss), weight * np.exp(-log_variance)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_learned_weight_moves_towards_its_best_value(make, dataset, one_device):
    """Over microbatches, each with its share of the regulariser."""
    setup = plain(make, one_device, balance=UncertaintyWeights(), accumulation_steps=4)
    take = jax.jit(functools.partial(batch_gradients, setup.step))
    state, batch = setup.init_state(), one_batch(dataset, one_device)
    losses = {name: float(loss) for name, loss in take(state, batch, KEY).losses.items()}
    # Twice the best weight must fall, and half of it rise: s moves against its gradient.
    for factor in (2.0, 0.5):
        weights = {"next_item": factor * 0.5 / losses["next_item"], "behaviour": 0.5 / losses["behaviour"]}
        log_variances = {name: -jnp.log(jnp.float32(weight)) for name, weight in weights.items()}
        found = take(
            dataclasses.replace(state, dense=state.dense | {LOG_VARIANCES: log_variances}), batch, KEY
        )
        gradients = found.dense[LOG_VARIANCES]
        np.testing.assert_allclose(float(gradients["next_item"]), 0.5 * (1 - factor), rtol=1e-4)
        np.testing.assert_allclose(float(gradients["behaviour"]), 0.0, atol=1e-5)
        for name, task in TASKS.items():
            close(float(found.metrics[f"task_weight/{name}"]), task.weight * weights[name])


LOOP = LoopConfig(
    num_train_steps=4, global_batch_size=16, history_length=16, windows="last", log_every_steps=1,
    checkpoint_every_steps=4, keep_checkpoints=2, validate_every_steps=0, metric="ndcg@10",
)  # fmt: skip


def files(setup, state):
    return jax.tree.map(np.array, to_checkpoint(state, setup.tables, setup.mesh))


def test_learned_weights_are_resumed_to_the_bit_and_move_to_another_mesh(
    make, dataset, tmp_path, monkeypatch, one_device
):
    setup = plain(make, one_device, balance=UncertaintyWeights())
    expected = files(setup, train(setup, dataset, LOOP, tmp_path / "whole", None))
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "reached_preemption", lambda self, done: done == 2)
        train(setup, dataset, LOOP, tmp_path / "stopped", None)
    resumed = train(setup, dataset, LOOP, tmp_path / "stopped", None)
    jax.tree.map(np.testing.assert_array_equal, files(setup, resumed), expected)
    learned, average = expected["dense"][LOG_VARIANCES], expected["ema"]["dense"][LOG_VARIANCES]
    assert learned.keys() == TASKS.keys()
    assert all(learned[name] > average[name] > 0 for name in TASKS)  # every loss is above 1/2
    lines = list(read_metrics(tmp_path / "stopped"))
    assert lines[0]["task_weight/behaviour"] == 3.0 > lines[-1]["task_weight/behaviour"]
    other = make_mesh((2, 4))
    with (
        jax.set_mesh(other),
        Checkpoints(str(tmp_path / "whole" / "checkpoints"), keep=1, save_every_steps=1) as at,
    ):
        setup = plain(make, other, balance=UncertaintyWeights())
        moved = restore(setup, setup.init_state(), at)
        jax.tree.map(np.testing.assert_array_equal, files(setup, moved), expected)
