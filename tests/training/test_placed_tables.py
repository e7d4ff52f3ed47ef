"""A run's tables lie as the config says, or as the planner does; its numbers and its files do not change."""

import jax
import numpy as np
import pytest

from jaxrec.config import TrainConfig, apply_overrides
from jaxrec.config.json_text import from_json, to_json
from jaxrec.config.run import resume_differences
from jaxrec.core.batch import abstract_batch
from jaxrec.core.mesh import make_mesh
from jaxrec.data.evaluation_batches import EvaluationRows
from jaxrec.data.pipeline import train_batches
from jaxrec.embedding.placement import Columns, Replicated, Rows
from jaxrec.embedding.row_optimizer import Adam, RowAdagrad
from jaxrec.losses.samplers import UniformSampler
from jaxrec.models.two_tower import ITEM, ITEM_BIAS, USER, TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.candidates import SampledSoftmax
from jaxrec.tasks.next_item import NextItem
from jaxrec.training.checkpoint import Checkpoints
from jaxrec.training.inference import Inference
from jaxrec.training.lookups import lookup_sizes
from jaxrec.training.loop import restore
from jaxrec.training.optimizer import OptimizerConfig
from jaxrec.training.placed_tables import place_tables
from jaxrec.training.setup import place_batch
from jaxrec.training.state import abstract_checkpoint, to_checkpoint
from jaxrec.training.step import make_train_step

LENGTH, BATCH, STEPS = 16, 16, 3
ENCODER = EncoderConfig(embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16, max_positions=LENGTH)
MODEL = TwoTowerConfig(encoder=ENCODER, item_dim=8, user_dim=4, init_scale=0.5)
TASKS = {"next_item": NextItem(candidates=SampledSoftmax(sampler=UniformSampler(num_samples=11)))}
BY_ROWS = {ITEM: Rows(), ITEM_BIAS: Rows(), USER: Rows()}
MIXED = {ITEM: Columns(parts=4), ITEM_BIAS: Replicated(), USER: Replicated()}


def placed(make, mesh, given, **changes):
    values = {
        "model": MODEL, "tasks": TASKS, "accumulation_steps": 2,
        "row_optimizer": Adam(learning_rate=1e-2, weight_decay=0.1),
        "optimizer": OptimizerConfig(learning_rate=1e-2, max_gradient_norm=0.1),
    }  # fmt: skip
    setup = make(mesh, **(values | changes))
    return place_tables(setup, given, global_batch_size=BATCH, history_length=LENGTH)


def trained(setup, dataset):
    state = setup.init_state()
    step = make_train_step(setup.step, state, setup.mesh)
    found = []
    for batch in train_batches(
        dataset, global_batch_size=BATCH, history_length=LENGTH, seed=0, stop_step=STEPS
    ):
        state, metrics = step(state, place_batch(batch, setup.mesh))
        found.append(jax.device_get(metrics))
    return state, found


@pytest.fixture(scope="module")
def runs(make, dataset):
    """Three steps with clipping and microbatches, by rows and otherwise."""
    mesh = make_mesh((2, 4))
    found = {}
    with jax.set_mesh(mesh):
        for name, given in {"rows": BY_ROWS, "mixed": MIXED}.items():
            setup = placed(make, mesh, given)
            found[name] = (setup, *trained(setup, dataset))
        yield found


def saved(setup, state):
    return jax.tree.map(np.asarray, to_checkpoint(state, setup.tables, setup.mesh))


def test_training_does_not_see_the_placement(runs):
    (rows, rows_state, rows_metrics), (mixed, state, metrics) = runs["rows"], runs["mixed"]
    for one, other in zip(metrics, rows_metrics, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            if name != "exchange_extra_rounds":
                np.testing.assert_allclose(one[name], other[name], rtol=1e-5, err_msg=name)
    close = lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, saved(mixed, state), saved(rows, rows_state))


def test_arrays_lie_as_the_setup_declares(runs):
    setup, state, _ = runs["mixed"]
    for fresh in (setup.init_state(), state):
        for leaf, declared in zip(
            jax.tree.leaves(fresh), jax.tree.leaves(setup.abstract_state()), strict=True
        ):
            assert (leaf.shape, leaf.dtype) == (declared.shape, declared.dtype)
            assert leaf.sharding.is_equivalent_to(declared.sharding, leaf.ndim)
    assert state.tables[ITEM].shape == (41 * 8, 2)  # 81 rows in 4 parts over 8 devices
    assert state.tables[USER].sharding.is_fully_replicated


def test_a_checkpoint_moves_between_placements_and_meshes(runs, make, tmp_path):
    setup, state, _ = runs["mixed"]
    expected = saved(setup, state)
    with Checkpoints(tmp_path, keep=1, save_every_steps=1) as checkpoints:
        checkpoints.save(STEPS, to_checkpoint(state, setup.tables, setup.mesh))
        checkpoints.wait()
        other_mesh = make_mesh((1, 4), jax.devices()[:4])
        for mesh, given in ((other_mesh, BY_ROWS), (setup.mesh, {**MIXED, USER: Columns()})):
            with jax.set_mesh(mesh):
                other = placed(make, mesh, given)
                restored = restore(other, other.init_state(), checkpoints)
                jax.tree.map(np.testing.assert_array_equal, saved(other, restored), expected)
                for name, table in other.tables.items():
                    assert restored.tables[name].sharding.is_equivalent_to(table.sharding(mesh), 2)
                    assert restored.tables[name].shape == table.physical_shape(mesh.size)
                template = abstract_checkpoint(restored, other.tables, mesh)
                assert jax.tree.map(np.shape, template) == jax.tree.map(np.shape, expected)


def test_an_evaluation_does_not_see_the_placement(runs, dataset):
    setup, state, _ = runs["mixed"]
    rows_setup, rows_state, _ = runs["rows"]
    batch = EvaluationRows.make(dataset, "validation", history_length=LENGTH, rows_per_batch=16).build(0)
    found = {}
    for name, (one, its_state) in {"mixed": (setup, state), "rows": (rows_setup, rows_state)}.items():
        inference = Inference(one, its_state)
        found[name] = jax.tree.map(np.asarray, (inference.queries(batch)[0], *inference.catalogue()))
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4), *found.values()
    )


def test_the_planner_is_asked_for_the_rest(make):
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        setup = placed(make, mesh, {USER: Columns()})
        asked = lookup_sizes(setup.step, abstract_batch(BATCH, LENGTH, 2))
    # Events and targets, and 11 draws that are filled up to the devices.
    assert asked == {ITEM: 2 * BATCH * LENGTH + 16, USER: BATCH * LENGTH}
    choices = setup.placement_plan.choices
    assert choices[USER].reason == "the config says so"
    assert setup.tables[USER].placement == setup.step.tables[USER].placement == Columns()
    assert all(choices[name].reason.split()[1:3] == ["would", "send"] for name in (ITEM, ITEM_BIAS))


def test_a_full_softmax_and_a_cache_keep_their_tables_by_rows(make):
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        setup = placed(make, mesh, {}, tasks={"next_item": NextItem()}, cache_rows={USER: 16})
        assert {name: str(table.placement) for name, table in setup.tables.items()} == dict.fromkeys(
            BY_ROWS, "Rows"
        )
        for name, reason in (
            (ITEM, "a full softmax reads it whole"),
            (USER, "the devices hold a cache of it"),
        ):
            with pytest.raises(
                ValueError, match=rf"placement\['{name}'\]=Replicated: {reason}.*leave it out"
            ):
                placed(
                    make, mesh, {name: Replicated()}, tasks={"next_item": NextItem()}, cache_rows={USER: 16}
                )


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        ({"shop": Rows()}, {}, "the model has no such table; it has item, item_bias, user"),
        ({ITEM: Columns(parts=3)}, {}, "does not divide dim=8"),
        (
            {ITEM: Columns()},
            {"row_optimizer": RowAdagrad()},
            "RowAdagrad keeps one float a row.*Take Rows, or Adam",
        ),
    ],
)
def test_what_cannot_be_is_said(make, given, changes, message):
    mesh = make_mesh()
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        placed(make, mesh, given, **changes)


def test_the_command_line_sets_a_placement_and_a_resumption_may_change_it():
    config = TrainConfig(name="x", tasks=TASKS, num_train_steps=1, global_batch_size=8)
    changed = apply_overrides(
        config,
        [
            "--config.placement.item=Columns",
            "--config.placement.item.parts=4",
            "--config.placement.user=Replicated",
        ],
    )
    assert changed.placement == {ITEM: Columns(parts=4), USER: Replicated()}
    assert from_json(to_json(changed), TrainConfig) == changed
    assert resume_differences(to_json(config), to_json(changed)) == []
    assert apply_overrides(changed, ["--config.placement.user=none"]).placement == {ITEM: Columns(parts=4)}
