"""Every config fits a directory in the contract's layout, given by its place alone; some train on it."""

import ast
import dataclasses
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jax.sharding import NamedSharding

from jaxrec.config import load_config, stage_configs, to_json
from jaxrec.config.stages import override_run
from jaxrec.core.mesh import make_mesh
from jaxrec.core.partition import spec
from jaxrec.data.domains import Domains
from jaxrec.data.social import Social
from jaxrec.runs import open_dataset, setup_run
from jaxrec.train import main
from jaxrec.training.step import make_train_step

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = sorted(REPOSITORY.glob("configs/*.py"))
# These import another config and change the mesh, no more (a test below): what they train is trained once.
OTHER_MESHES = ("multi_gpu", "tpu_pod")
PODS = ("web_scale", "web_scale_cpu")
# One of each kind is trained; the others are as good as their parts, which have tests of their own.
TRAINED = ("debug", "kuairand", "quickstart", "web_scale_cpu")


def smaller(path):
    """The encoder in the size of a test: what is made for pods as a whole, of the others the depth."""
    sizes = {"num_layers": 1}
    if name_of(path) in PODS:
        sizes = {"embed_dim": 16, "num_layers": 3, "num_heads": 2, "mlp_dim": 16}
    return [f"--config.model.encoder.{field}={value}" for field, value in sizes.items()]


def given(source, directory):
    """Where the data are; what joins several domains gets the same one for each."""
    if isinstance(source, Domains):
        return [f"--config.data.source.paths.{name}={directory}" for name in source.paths]
    if isinstance(source, Social):
        return [f"--config.data.source.path={directory}"]
    return [f"--config.data.path={directory}", "--config.data.source=none"]


NUM_USERS, NUM_ITEMS = 24, 40


def name_of(path):
    return path.stem


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A data set as small as can be, with the columns of a rating set of a video app and of a log of
    advertisements, with tags, and with friends."""
    path = tmp_path_factory.mktemp("tiny")
    random = np.random.default_rng(0)
    user_ids = np.repeat(np.arange(1, NUM_USERS + 1), random.integers(6, 14, NUM_USERS))
    events = {
        "user_id": user_ids,
        "item_id": random.integers(1, NUM_ITEMS + 1, len(user_ids)),
        "timestamp": np.sort(random.integers(10**9, 10**9 + 10**6, len(user_ids))),
        "order": np.arange(len(user_ids), dtype=np.int32),
        "rating": random.integers(1, 6, len(user_ids)).astype(np.float32),
    }
    events["timestamp_est"] = events["timestamp"]
    context = ("position", "campaign", *(f"user_feature_{i}" for i in range(4)))
    for name in (*context, *(f"item_feature_{i}" for i in range(1, 4))):
        events[name] = random.integers(0, 4, len(user_ids))
    for name in ("is_click", "long_view", "is_profile_enter", "is_comment"):
        events[name] = random.integers(0, 2, len(user_ids)).astype(np.int8)
    items = {
        "item_id": np.arange(1, NUM_ITEMS + 1),
        "title": [f"Film {i} (19{i + 40})" for i in range(NUM_ITEMS)],
        "genres": ["Comedy|Drama" if i % 2 else "Action" for i in range(NUM_ITEMS)],
        "keywords": [f"word {i}" for i in range(NUM_ITEMS)],
        "year": [1940 + i for i in range(NUM_ITEMS)],
        "brand": [f"brand {i % 7}" for i in range(NUM_ITEMS)],
    }
    pq.write_table(pa.table(events), path / "events.parquet")
    tags = {"tag": [f"word{i % 9}" for i in range(60)], "item_id": random.integers(1, NUM_ITEMS + 1, 60)}
    pq.write_table(pa.table(items), path / "items.parquet")
    pq.write_table(pa.table(tags), path / "tags.parquet")
    friends = {"user_id": np.arange(1, NUM_USERS), "friend_id": np.arange(2, NUM_USERS + 1)}
    pq.write_table(pa.table(friends), path / "friends.parquet")
    return path


def test_the_promised_configs_are_there():
    promised = {
        "quickstart",
        "ml1m_bert4rec",
        "ml1m_sasrec",
        "ml1m_multitask",
        "kuairand",
        "debug",
        "pretrain_finetune",
        *OTHER_MESHES,
        *PODS,
    }
    assert promised <= set(map(name_of, CONFIGS))


def overrides(path, directory):
    """A config in the size of a test, on the data of a test."""
    config = load_config(str(path))
    return [
        *given(config.data.source, directory),
        *smaller(path),
        "--config.num_train_steps=2",
        "--config.global_batch_size=8",
        "--config.accumulation_steps=1",
        "--config.log_every_steps=1",
        "--config.evaluation.every_steps=2",
        *(f"--config.stages.{name}.num_train_steps=2" for name in config.stages),
        *(f"--config.stages.{name}.data.path={directory}" for name, one in config.stages.items() if one.data),
    ]


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.stem not in (*OTHER_MESHES, *TRAINED)], ids=name_of
)
def test_every_config_fits_its_data_and_its_step_can_be_traced(path, directory, tmp_path):
    """Every stage of it; what a step computes is not waited for."""
    config = override_run(load_config(str(path)), overrides(path, directory))
    for name, run in (stage_configs(config, tmp_path) or {"": config}).items():
        dataset = open_dataset(run, tmp_path / name)
        mesh = make_mesh(run.mesh_shape)
        with jax.set_mesh(mesh):
            setup = setup_run(run, dataset, mesh)
            rows = NamedSharding(mesh, spec("batch"))
            batch = setup.step.facts.abstract_batch(run.global_batch_size, run.data.history_length, rows)
            state = setup.abstract_state()
            after, metrics = jax.eval_shape(make_train_step(setup.step, state, mesh), state, batch)
        assert {f"loss/{task}" for task in run.tasks} <= set(metrics)
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem in TRAINED], ids=name_of)
def test_configs_of_every_kind_train_two_steps(path, directory, tmp_path):
    status = main([f"--config={path}", f"--workdir={tmp_path}", *overrides(path, directory)])
    assert status == 0
    check_metrics(tmp_path, load_config(str(path)).tasks)


def check_metrics(workdir, tasks):
    """Both steps logged a loss of each task, and it is a number."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = {
        (int(line["step"]), name): value
        for line in lines
        for name, value in line.items()
        if name.startswith("loss/")
    }
    assert {(step, f"loss/{task}") for step in (1, 2) for task in tasks} <= set(losses)
    assert all(math.isfinite(value) for value in losses.values())


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_the_docstring_holds_the_command(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert f"--config=configs/{path.name}" in docstring


def test_the_variants_of_kuairand_differ_in_head_or_tasks_alone():
    path = REPOSITORY / "configs" / "kuairand.py"
    base = load_config(str(path))
    names = re.findall(r"`(\w+)`", ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))))
    assert len(names) == 8
    for name in names:
        variant = load_config(f"{path}:{name}")
        model = dataclasses.replace(variant.model, head=base.model.head)
        assert dataclasses.replace(variant, name=base.name, tasks=base.tasks, model=model) == base
        assert variant.name == f"kuairand_{name}"
        assert variant.tasks["next_item"] == base.tasks["next_item"]


@pytest.mark.parametrize("name", OTHER_MESHES)
def test_another_machine_changes_the_mesh_alone(name):
    def rest(path):
        return to_json(dataclasses.replace(load_config(str(path)), mesh_shape=(-1, 1)))

    path = REPOSITORY / "configs" / f"{name}.py"
    assert rest(path) in [rest(other) for other in CONFIGS if name_of(other) not in OTHER_MESHES]
