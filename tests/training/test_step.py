"""The train step: equal on every mesh, placed as declared, guarded against NaN."""

import dataclasses
import json
import pathlib
import re

import jax
import numpy as np
import pytest

from jaxrec.core.mesh import make_mesh
from jaxrec.data.pipeline import train_batches
from jaxrec.embedding.row_optimizer import RowAdagrad, Sgd
from jaxrec.embedding.table import to_logical
from jaxrec.losses.samplers import UniformSampler
from jaxrec.models.two_tower import ITEM, TwoTowerConfig
from jaxrec.tasks.behaviour import Behaviour
from jaxrec.tasks.candidates import InBatch, SampledBinary, SampledSoftmax
from jaxrec.tasks.next_item import NextItem
from jaxrec.training.lookups import make_plans
from jaxrec.training.optimizer import OptimizerConfig, decay_mask, schedule_factor
from jaxrec.training.setup import place_batch
from jaxrec.training.step import make_train_step

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "shardings.json"
LENGTH, ROWS = 16, 16
DATASET = []


@pytest.fixture(scope="module", autouse=True)
def _dataset(dataset):
    DATASET[:] = [dataset]


def batches(setup, num_steps):
    """The first batches of a setup's data, placed."""
    stream = train_batches(
        DATASET[0], global_batch_size=ROWS, history_length=LENGTH, seed=0, stop_step=num_steps
    )
    return [place_batch(batch, setup.mesh) for batch in stream]


def run(setup, num_steps, state=None):
    """Trains; returns the state, the metrics of every step, and the compiled program's text."""
    state = setup.init_state() if state is None else state
    stream = batches(setup, num_steps)
    step = make_train_step(setup.step, state, setup.mesh).lower(state, stream[0]).compile()
    found = []
    for batch in stream:
        state, metrics = step(state, batch)
        found.append(jax.device_get(metrics))
    return state, found, step.as_text()


def logical(table):
    return np.asarray(jax.jit(lambda t: to_logical(t, 81))(table))[:81]


@pytest.fixture(scope="module")
def twin(make):
    """Five steps of the dense one-device twin."""
    mesh = make_mesh((1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        state, metrics, _ = run(make(mesh), 5)
        return metrics, logical(state.tables[ITEM])


@pytest.fixture(scope="module", params=[(8, 1), (2, 4), (1, 8)], ids=lambda shape: f"{shape[0]}x{shape[1]}")
def trained(request, make):
    """Five steps on a mesh: compiled once, looked at by several tests."""
    mesh = make_mesh(request.param)
    with jax.set_mesh(mesh):
        yield mesh, *run(make(mesh), 5)


def test_losses_equal_the_one_device_twin(trained, twin):
    _, state, metrics, _ = trained
    expected_metrics, expected_table = twin
    for found, expected in zip(metrics, expected_metrics, strict=True):
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(logical(state.tables[ITEM]), expected_table, atol=2e-4)


def test_everything_lies_where_it_was_declared(trained):
    """`tests/golden/shardings.json` is the declared layout; delete it and run this test to write it anew."""
    mesh, state, _, _ = trained
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): [
            list(axis) if isinstance(axis, tuple) else axis for axis in leaf.sharding.spec
        ]
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert golden.keys() == found.keys()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = jax.sharding.PartitionSpec(*(tuple(a) if isinstance(a, list) else a for a in golden[name]))
        assert leaf.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), leaf.ndim), name


def gathered_shapes(text):
    return re.findall(r"= \(?(\w+\[[\d,]*\])[^=]*? all-gather(?:-start)?\(", text)


def assert_no_table_gathered(text, rows):
    gathered = gathered_shapes(text)
    assert gathered, "the look-up gathers ids, so an empty list means that the pattern is stale"
    assert not [shape for shape in gathered if f"[{rows}," in shape or f"[{rows}]" in shape]


def test_a_full_softmax_gathers_no_table(trained):
    _, state, _, text = trained
    assert_no_table_gathered(text, state.tables[ITEM].shape[0])


def test_accumulated_microbatches_equal_one_batch(one_device, make):
    plain = TwoTowerConfig(
        encoder=dataclasses.replace(
            make(one_device).model.encoder,
            dropout_rate=0.0,
            attention_dropout_rate=0.0,
            embedding_dropout_rate=0.0,
        ),
        item_dim=8,
    )
    changes = {"model": plain, "tasks": {"next_item": NextItem(), "behaviour": Behaviour(weight=0.1)}}
    _, whole, _ = run(make(one_device, **changes), 3)
    _, parts, _ = run(make(one_device, **changes, accumulation_steps=4), 3)
    for found, expected in zip(parts, whole, strict=True):
        for name in ("loss", "loss/next_item", "loss/behaviour", "gradient_norm"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("row_optimizer", [Sgd(learning_rate=0.1), RowAdagrad(learning_rate=0.1)])
def test_sparse_tasks_touch_the_rows_of_the_batch_only(make, row_optimizer):
    mesh = make_mesh((2, 4))
    with jax.set_mesh(mesh):
        # 19 draws do not divide over 8 devices.
        sampled = NextItem(candidates=SampledSoftmax(sampler=UniformSampler(num_samples=19)))
        binary = NextItem(candidates=SampledBinary(sampler=UniformSampler(num_samples=5)))
        in_batch = NextItem(candidates=InBatch())
        tasks = {"sampled": sampled, "binary": binary, "in_batch": in_batch, "behaviour": Behaviour()}
        setup = make(mesh, tasks=tasks, row_optimizer=row_optimizer)
        before = setup.init_state()
        old = logical(before.tables[ITEM])
        after, _, text = run(setup, 1, before)
        changed = np.flatnonzero((logical(after.tables[ITEM]) != old).any(1))
        batch = batches(setup, 1)[0]
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 2), 0)
        plans = make_plans(setup.step, batch, key)
        draws = np.concatenate([plans[name].shared_lookups["negatives"] for name in ("sampled", "binary")])
    assert len(changed)
    assert set(changed) <= (set(np.unique(batch.item_ids)) | set(np.unique(draws))) - {0}
    assert_no_table_gathered(text, after.tables[ITEM].shape[0])


def poisoned(state, where):
    if where == "table":
        return dataclasses.replace(
            state, tables={**state.tables, ITEM: state.tables[ITEM].at[1:].set(np.nan)}
        )
    dense = jax.tree.map(lambda x: x, state.dense)
    dense["behaviour_head"]["out"]["kernel"] = dense["behaviour_head"]["out"]["kernel"] * np.inf
    return dataclasses.replace(state, dense=dense)


@pytest.mark.parametrize(("where", "tasks"), [("table", 0b111), ("behaviour head", 0b100)])
def test_a_number_that_is_not_finite_stops_before_the_update(one_device, make, where, tasks):
    setup = make(one_device)
    state = poisoned(setup.init_state(), where)
    before = jax.tree.map(np.array, state)
    after, metrics, _ = run(setup, 3, state)
    assert [int(m["failed_step"]) for m in metrics] == [0, 0, 0]
    assert int(metrics[0]["failed_tasks"]) == tasks
    assert int(after.step) == 0
    unchanged = dataclasses.replace(after, failure=before.failure)
    jax.tree.map(np.testing.assert_array_equal, unchanged, before)


def test_schedule_warms_up_and_falls():
    config = OptimizerConfig(warmup_steps=10, schedule="cosine", final_factor=0.1)
    factors = [float(schedule_factor(config, 100, np.int32(step))) for step in (0, 9, 10, 55, 100)]
    np.testing.assert_allclose(factors, [0.1, 1.0, 1.0, 0.55, 0.1], atol=1e-6)
    assert float(schedule_factor(OptimizerConfig(), 100, np.int32(99))) == 1.0


def test_only_kernels_decay(make, one_device):
    state = make(one_device).init_state()
    mask = {
        jax.tree_util.keystr(path, simple=True, separator="/"): decays
        for path, decays in jax.tree_util.tree_leaves_with_path(decay_mask(state.dense))
    }
    assert {name.rsplit("/", 1)[-1] for name, decays in mask.items() if decays} == {
        "kernel",
        "qkv_kernel",
        "out_kernel",
        "projection",
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", -1.0), ("warmup_steps", -1), ("ema_decay", 1.0), ("max_gradient_norm", -0.1),
        ("beta1", 1.0), ("beta2", -0.1), ("epsilon", 0.0), ("weight_decay", -1.0), ("final_factor", 1.5),
        ("schedule", "cosin"),
    ],
)  # fmt: skip
def test_bad_optimizer_settings_name_themselves(field, value):
    with pytest.raises(ValueError, match=f"optimizer.{field}={value!r} must"):
        OptimizerConfig(**{field: value})
