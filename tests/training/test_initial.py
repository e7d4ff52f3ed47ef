"""A run that starts from another one: parameters by path, rows by key, on any mesh and for any placement."""

import dataclasses
import logging

import jax
import numpy as np
import pytest

from jaxrec.core.mesh import make_mesh
from jaxrec.data.vocabulary import known_ids
from jaxrec.embedding.placement import Columns, Replicated, Rows
from jaxrec.embedding.table import TableSpec, from_logical, init_table, to_logical
from jaxrec.models.two_tower import ITEM, ITEM_BIAS, USER, TwoTowerConfig
from jaxrec.tasks.behaviour import Behaviour
from jaxrec.tasks.next_item import NextItem
from jaxrec.training.checkpoint import Checkpoints
from jaxrec.training.initial import Match, Start, overlay
from jaxrec.training.rates import by_path
from jaxrec.training.state import to_checkpoint

TASKS = {"next_item": NextItem()}
MORE_TASKS = {"next_item": NextItem(), "behaviour": Behaviour()}
KNOWN, HERE = 1030, 40  # items of the other data set (more than a file's block of rows) and of this one


@pytest.mark.parametrize(
    ("keys", "known", "expected"),
    [
        ([7, 5, 9], [5, 6, 7], [0, 3, 1, 0]),
        (["b", "z", "a"], ["a", "b"], [0, 2, 0, 1]),
        ([1, 2], ["2", "02"], [0, 0, 1]),
        (np.array([2**64 - 1, 3], np.uint64), np.array([-1, 3]), [0, 0, 2]),
        ([4], np.zeros(0, np.int64), [0, 0]),
    ],
)
def test_ids_are_matched_by_key(keys, known, expected):
    np.testing.assert_array_equal(known_ids(np.asarray(keys), np.asarray(known)), expected)


def matches_of(items, users=None):
    """Every second item of this run is known, in an order of its own."""
    ids = np.zeros(items + 1, np.int64)
    ids[2::2] = np.random.default_rng(0).permutation(np.arange(1, KNOWN + 1))[: items // 2]
    ids[2] = KNOWN
    found = {ITEM: Match(known_ids=ids, num_known=KNOWN)}
    return found | ({USER: Match(known_ids=np.arange(users + 1), num_known=users)} if users else {})


@pytest.mark.parametrize(
    ("placement", "dim"), [(Rows(), 1), (Replicated(), 1), (Columns(parts=2), 8)], ids=str
)
def test_rows_come_by_key_on_every_mesh_and_placement(mesh, dim, placement):
    table = TableSpec(num_rows=HERE + 1, dim=dim, placement=placement)
    other = TableSpec(num_rows=KNOWN + 1, dim=dim)
    fresh = init_table(table, jax.random.key(0), mesh)
    rows = np.random.default_rng(1).normal(size=(KNOWN + 1, dim)).astype(np.float32)
    ids = matches_of(HERE)[ITEM].known_ids
    logical = lambda x: np.asarray(to_logical(x, table.num_rows, table.placement))[: HERE + 1]  # noqa: E731
    expected = np.where(ids[:, None] > 0, rows[ids], logical(fresh))
    known = jax.jit(lambda x: from_logical(x, other.num_rows), out_shardings=other.row_format(mesh))(rows)
    found = overlay(table, fresh, known, ids, mesh)
    np.testing.assert_array_equal(logical(found), expected)
    assert found.sharding.is_equivalent_to(table.sharding(mesh), 2)


def model_of(make, mesh, **changes):
    encoder = dataclasses.replace(make(mesh).model.encoder, **changes.pop("encoder", {}))
    return TwoTowerConfig(encoder=encoder, item_dim=8, user_dim=4, **changes)


def facts_of(make, mesh, items):
    return dataclasses.replace(make(mesh).step.facts, num_items=items, item_counts=None)


def shaken(state):
    """Another number in every place, and averages that are not the parameters."""
    generator = np.random.default_rng(3)
    return jax.tree.map(
        lambda x: (
            jax.device_put(generator.normal(size=x.shape).astype(x.dtype), x.sharding)
            if x.dtype == np.float32
            else x
        ),
        state,
    )


@pytest.fixture(scope="module")
def trained(make, tmp_path_factory):
    """A run over another catalogue, of one task, as its checkpoint lies on the disk."""
    directory = tmp_path_factory.mktemp("other")
    mesh = make_mesh((2, 4))
    with jax.set_mesh(mesh):
        setup = make(mesh, model=model_of(make, mesh), tasks=TASKS, facts=facts_of(make, mesh, KNOWN), seed=1)
        saved = to_checkpoint(setup.init_state(), setup.tables, mesh)
        saved = shaken(saved)
        with Checkpoints(str(directory), keep=1, save_every_steps=1) as checkpoints:
            checkpoints.save(7, saved)
        return directory, jax.tree.map(np.array, saved)


def start(setup, directory, matches, without=()):
    return Start(setup, Checkpoints(str(directory), keep=1, save_every_steps=1), matches, without)


def test_a_state_takes_what_it_knows(mesh, make, trained, caplog):
    directory, saved = trained
    setup = make(mesh, model=model_of(make, mesh), tasks=MORE_TASKS)
    users = setup.step.facts.num_users
    fresh = setup.init_state()
    before = jax.tree.map(np.array, fresh)
    with caplog.at_level(logging.INFO):
        state = start(setup, directory, matches_of(80, users))(fresh)
    averages = by_path(saved["ema"]["dense"])
    for path, found in by_path(state.dense).items():
        expected = averages.get(path, by_path(before.dense)[path])
        assert (path in averages) != path.startswith("behaviour_head.")
        np.testing.assert_array_equal(found, expected, err_msg=path)
        assert found.sharding == by_path(fresh.dense)[path].sharding
    ids = matches_of(80)[ITEM].known_ids[:, None]
    files = to_checkpoint(state, setup.tables, mesh)
    for name, averaged in ((ITEM, "ema"), (ITEM_BIAS, "ema"), (USER, "tables")):
        rows = saved["ema"]["tables"][name] if averaged == "ema" else saved["tables"][name]
        old = np.asarray(to_logical(before.tables[name], setup.tables[name].num_rows))
        known = np.arange(users + 1)[:, None] if name == USER else ids
        expected = np.where(known > 0, rows[known[:, 0]], old[: len(known)])
        np.testing.assert_array_equal(files["tables"][name][: len(known)], expected, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, state.ema["dense"], state.dense)
    for name in (ITEM, ITEM_BIAS):
        np.testing.assert_array_equal(state.ema["tables"][name], state.tables[name])
    for part in ("step", "dense_slots", "table_slots", "failure"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, part), getattr(before, part))
    assert f"starting from {directory / '7'} (averages): 21 of 25 dense parameters" in caplog.text
    assert "table item: 40 rows by key, 40 fresh (no such item there)" in caplog.text
    assert "fresh, not there: behaviour_head.hidden.bias, behaviour_head.hidden.kernel, " in caplog.text


def test_a_table_on_the_host_takes_its_rows(make, trained):
    directory, saved = trained
    mesh = make_mesh((1, 2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        setup = make(mesh, model=model_of(make, mesh), tasks=TASKS, cache_rows={USER: 16})
        users = setup.step.facts.num_users
        matches = matches_of(80, users)
        matches[USER].known_ids[1::2] = 0
        fresh = setup.init_state()
        before = fresh.tables[USER].copy()
        state = start(setup, directory, matches)(fresh)
    expected = np.where(
        matches[USER].known_ids[:, None] > 0, saved["tables"][USER][matches[USER].known_ids], before
    )
    np.testing.assert_array_equal(state.tables[USER], expected)


def test_what_is_left_out_starts_fresh(make, one_device, trained, caplog):
    directory, _ = trained
    setup = make(one_device, model=model_of(make, one_device), tasks=TASKS)
    fresh = setup.init_state()
    before = jax.tree.map(np.array, fresh)
    with caplog.at_level(logging.INFO):
        state = start(setup, directory, matches_of(80, 60), ("encoder.*", USER))(fresh)
    jax.tree.map(np.testing.assert_array_equal, state.dense["encoder"], before.dense["encoder"])
    np.testing.assert_array_equal(state.tables[USER], before.tables[USER])
    assert np.any(state.dense["projection"] != before.dense["projection"])
    assert "table user: 0 rows by key, 60 fresh (init_without)" in caplog.text
    assert "fresh, init_without: encoder.blocks.0.attention.out_bias, " in caplog.text
    with pytest.raises(ValueError, match="init_without='nothing' matches no parameter; there are encoder"):
        start(setup, directory, matches_of(80, 60), ("nothing",))


def test_another_shape_is_named_with_both(make, one_device, trained):
    directory, _ = trained
    model = dataclasses.replace(model_of(make, one_device, encoder={"mlp_dim": 24}), user_dim=6)
    with pytest.raises(
        ValueError, match=r"mlp_in.kernel is \[16, 16\] there and \[16, 24\] here.*init_without"
    ) as e:
        start(make(one_device, model=model, tasks=TASKS), directory, matches_of(80, 60))
    assert "user is [1024, 4] there and [rows, 6] here" in str(e.value)


def test_adapters_are_not_left_behind(make, one_device, tmp_path):
    adapted = make(one_device, model=model_of(make, one_device, encoder={"lora_rank": 2}), tasks=TASKS)
    shapes = to_checkpoint(adapted.init_state(), adapted.tables, one_device)
    with Checkpoints(str(tmp_path), keep=1, save_every_steps=1) as checkpoints:
        checkpoints.save(1, shapes)
    plain = make(one_device, model=model_of(make, one_device), tasks=TASKS)
    with pytest.raises(ValueError, match="attention.qkv_kernel has an adapter there and none here"):
        start(plain, tmp_path, {ITEM: matches_of(80)[ITEM], USER: matches_of(80, 60)[USER]})


def test_nothing_in_common_is_an_error(make, one_device, trained):
    directory, _ = trained
    setup = make(one_device, model=model_of(make, one_device), tasks=TASKS)
    with pytest.raises(ValueError, match="nothing there has the path of a parameter or the key of a row"):
        nothing = Match(known_ids=np.zeros(81, np.int64), num_known=KNOWN)
        start(setup, directory, {ITEM: nothing}, ("*.*", "mask_vector", "projection", "user"))
