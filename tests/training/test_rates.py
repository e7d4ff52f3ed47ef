"""Factors of the learning rate: by path, by layer, and 0, which keeps every bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.core.mesh import make_mesh
from jaxrec.data.pipeline import train_batches
from jaxrec.embedding.row_optimizer import Adam, Sgd
from jaxrec.models.two_tower import ITEM, ITEM_BIAS, USER, TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.next_item import NextItem
from jaxrec.training.optimizer import OptimizerConfig
from jaxrec.training.rates import layer_factors, make_rates
from jaxrec.training.setup import place_batch
from jaxrec.training.step import make_train_step

ENCODER = EncoderConfig(
    embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16, max_positions=16, norm_position="pre"
)
MODEL = TwoTowerConfig(encoder=ENCODER, item_dim=8, user_dim=4)
TASKS = {"next_item": NextItem()}
DENSE = {"encoder": {"blocks": {0: {"kernel": 0}, 1: {"kernel": 0}}}, "projection": 0}


@pytest.fixture(scope="module")
def take_steps(dataset):
    """Trains a fresh state, or the one that `change` makes of it; returns both ends and the last metrics."""

    def steps(setup, count, change=lambda state: state):
        state = change(setup.init_state())
        first = jax.tree.map(np.array, state)
        step = make_train_step(setup.step, state, setup.mesh)
        stream = train_batches(dataset, global_batch_size=16, history_length=16, seed=0, stop_step=count)
        for batch in stream:
            state, metrics = step(state, place_batch(batch, setup.mesh))
        return first, jax.tree.map(np.array, state), jax.device_get(metrics)

    return steps


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_layers_get_their_factors():
    table = {
        "encoder.blocks.0.mlp_in.kernel": 0.125,
        "encoder.blocks.1.mlp_norm.scale": 0.25,
        "encoder.blocks.2.attention.qkv_kernel": 0.5,
        "encoder.final_norm.scale": 1.0,
        "encoder.embedding_norm.bias": 0.0625,
        "encoder.position_table": 0.0625,
        "event_in.kernel": 0.0625,
        "user_in.kernel": 0.0625,
        "mask_vector": 0.0625,
        "time_gap_table": 0.0625,
        "behaviour_table": 0.0625,
        "projection": 1.0,
        "behaviour_head.out.kernel": 1.0,
        "text.encoder.blocks.0.mlp_in.kernel": 0.5,
        "text.encoder.position_table": 0.25,
        "text.token_table": 0.25,
        "text.pooler.kernel": 1.0,
    }
    assert layer_factors(table, 0.5) == table
    assert set(layer_factors(table, 1.0).values()) == {1.0}


def test_the_last_pattern_that_matches_counts():
    config = OptimizerConfig(
        rates={"*": 0.5, "encoder.*": 0.0, "encoder.blocks.1.*": 2.0, "item": 0.25}, layer_decay=0.5
    )
    rates = make_rates(config, DENSE, ["item", "user"])
    assert rates.dense == {
        "encoder": {"blocks": {0: {"kernel": 0.0}, 1: {"kernel": 1.0}}}, "projection": 0.5
    }  # fmt: skip
    assert rates.tables == {"item": 0.25, "user": 0.5}
    assert rates.summary() == [
        "frozen: encoder.blocks.0.kernel",
        "learning rate x 0.25: item",
        "learning rate x 0.5: projection, user",
    ]


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"decoder.*": 0.0}, r"rates\['decoder.\*'\]=0.0 matches no .* there are encoder.blocks.0.kernel, .*item"),
        ({"*": 0.0}, "freezes every parameter; leave one"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(rates, message):
    with pytest.raises(ValueError, match=message):
        make_rates(OptimizerConfig(rates=rates), DENSE, ["item"])


@pytest.mark.parametrize(
    "values", [{"rates": {"item": -1.0}}, {"rates": {"item": float("inf")}}, {"layer_decay": 0.0}]
)
def test_bad_factors_name_themselves(values):
    with pytest.raises(ValueError, match=r"optimizer.(rates\['item'\]|layer_decay)="):
        OptimizerConfig(**values)


def test_frozen_parameters_keep_every_bit(make, take_steps):
    mesh = make_mesh((2, 4))
    frozen = {"encoder.blocks.*": 0.0, "encoder.position_table": 0.0, "event_in.*": 0.0, ITEM: 0.0, USER: 0.0}
    optimizer = OptimizerConfig(
        learning_rate=1e-2, ema_decay=0.9, max_gradient_norm=0.1, weight_decay=0.1, rates=frozen
    )
    rows = Adam(learning_rate=1e-2, weight_decay=0.1)

    def with_negative_zeros(state):
        dense = jax.tree.map(lambda x: x, state.dense)
        dense["event_in"]["bias"] = -dense["event_in"]["bias"]
        return dataclasses.replace(
            state, dense=dense, ema={**state.ema, "dense": jax.tree.map(jnp.copy, dense)}
        )

    with jax.set_mesh(mesh):
        setup = make(
            mesh, model=MODEL, tasks=TASKS, optimizer=optimizer, row_optimizer=rows, accumulation_steps=2
        )
        first, last, metrics = take_steps(setup, 3, with_negative_zeros)
    kept = set()
    for part in ("dense", "tables", "table_slots", "ema"):
        before, after = by_path(getattr(first, part)), by_path(getattr(last, part))
        kept |= {f"{part}.{path}" for path, x in before.items() if x.tobytes() == after[path].tobytes()}
    is_frozen = lambda path: "blocks" in path or "position_table" in path or "event_in" in path  # noqa: E731
    dense = {path for path in by_path(first.dense) if is_frozen(path)}
    slots = {f"table_slots.{name}.{slot}" for name in (ITEM, USER) for slot in first.table_slots[name]}
    tables = {f"tables.{ITEM}", f"tables.{USER}", f"ema.tables.{ITEM}"}
    assert kept - {"dense.mask_vector", "ema.dense.mask_vector"} == (
        {f"dense.{path}" for path in dense} | {f"ema.dense.{path}" for path in dense} | slots | tables
    )
    assert {name for name in metrics if name.startswith("gradient_norm/")} == {
        "gradient_norm/dense", f"gradient_norm/{ITEM_BIAS}"
    }  # fmt: skip


def test_no_norm_counts_what_is_frozen(make, one_device, take_steps):
    optimizer = OptimizerConfig(rates={"*": 0.0, ITEM_BIAS: 1.0})
    _, _, metrics = take_steps(make(one_device, model=MODEL, tasks=TASKS, optimizer=optimizer), 1)
    assert metrics["gradient_norm/dense"] == 0
    assert metrics["gradient_norm"] == metrics[f"gradient_norm/{ITEM_BIAS}"] > 0


def test_a_factor_scales_the_step(make, one_device, take_steps):
    factors = {ITEM: 0.25, USER: 0.5, "encoder.blocks.0.mlp_in.*": 0.5}
    moved = []
    for changes in ({}, {"rates": factors, "layer_decay": 0.5}):
        optimizer = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, **changes)
        setup = make(
            one_device, model=MODEL, tasks=TASKS, optimizer=optimizer, row_optimizer=Sgd(learning_rate=1.0)
        )
        first, last, _ = take_steps(setup, 1)
        moved.append(
            by_path(jax.tree.map(np.subtract, (last.dense, last.tables), (first.dense, first.tables)))
        )
    expected = {
        f"1.{ITEM}": 0.25, f"1.{USER}": 0.5, f"1.{ITEM_BIAS}": 1.0, "0.projection": 1.0, "0.event_in.kernel": 0.25,
        "0.encoder.final_norm.bias": 1.0, "0.encoder.position_table": 0.25,
        "0.encoder.blocks.0.mlp_in.kernel": 0.25, "0.encoder.blocks.0.mlp_out.kernel": 0.5,
    }  # fmt: skip
    for path, factor in expected.items():
        assert np.any(moved[0][path])
        np.testing.assert_allclose(
            moved[1][path], factor * moved[0][path], rtol=1e-3, atol=1e-7, err_msg=path
        )
