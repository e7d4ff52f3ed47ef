"""Holds the architecture: which room may import which, and the libraries that have a single door.

The tables below are those of docs/architecture.md; a new room is a row in both.
"""

import ast
import collections.abc
import pathlib
import re

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "jaxrec"
ARCHITECTURE = PACKAGE.parent / "docs" / "architecture.md"

MODELS_MAY = {"nn", "embedding", "core"}
TASKS_MAY = {"models", "losses"} | MODELS_MAY
TRAINING_MAY = {"tasks", "data"} | TASKS_MAY
EVALUATION_MAY = {"training", "metrics"} | TRAINING_MAY
CONFIG_MAY = {"evaluation"} | EVALUATION_MAY
ENTRIES = {
    "train",
    "evaluate",
    "recommend",
    "prepare",
    "plan",
    "tune",
    "interference",
    "serve",
    "compress",
    "blend",
    "update",
}

MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "nn": {"core"},
    "embedding": {"core"},
    "losses": {"core"},
    "metrics": {"core"},
    "models": MODELS_MAY,
    "tasks": TASKS_MAY,
    "data": {"core"},
    "serving": {"core", "export", "evaluation"},
    "training": TRAINING_MAY,
    "evaluation": EVALUATION_MAY,
    "config": CONFIG_MAY,
    "planning": {"config"} | CONFIG_MAY,
    "tuning": {"config"} | CONFIG_MAY,
    "runs": {"config"} | CONFIG_MAY,
    "export": {"config", "runs", "compression"} | CONFIG_MAY,
    "compression": {"config", "runs"} | CONFIG_MAY,
    "updating": {"config", "runs", "export", "serving"} | CONFIG_MAY,
} | {
    entry: {"config", "runs", "planning", "tuning", "serving", "compression", "updating"} | CONFIG_MAY
    for entry in ENTRIES
}
MAY_IMPORT["update"].add("train")  # an update trains as that entry does

# Library -> the only places that may import it.
LIBRARY_DOORS = {
    "orbax": ("training/checkpoint.py",),
    "tensorflow": ("data/", "export/"),
    "onnx": ("export/",),
    "onnxruntime": ("export/",),
    "faiss": ("export/item_index.py",),
    "tensorflow_datasets": ("data/",),
    "array_record": ("data/",),
    # Nothing of ours may load one: a pickle runs code.
    "pickle": (),
    "dill": (),
    "cloudpickle": (),
    "joblib": (),
}
# Device questions have one door, so that a mesh is never bypassed.
DEVICE_DOOR = "core/mesh.py"
DEVICE_QUESTIONS = {"devices", "device_count", "local_devices", "local_device_count"}
NO_ROOM_FOR = {"utils", "util", "common", "helpers", "lib", "misc"}

SOURCES = sorted(PACKAGE.rglob("*.py"))
RELATIVE = [str(path.relative_to(PACKAGE)) for path in SOURCES]


def room_of(relative: str) -> str:
    return relative.removesuffix(".py").split("/")[0]


def imported_modules(source: str, relative: str) -> collections.abc.Iterator[str]:
    """Every module that the source imports, anywhere in it, by its absolute dotted name."""
    package = ["jaxrec", *pathlib.PurePosixPath(relative).parts[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def forbidden_imports(source: str, relative: str) -> list[str]:
    """What this source imports against the tables."""
    found, room = [], room_of(relative)
    may = MAY_IMPORT.get(room, set())
    for module in imported_modules(source, relative):
        library, *rest = module.split(".")
        if library == "jaxrec":
            target = rest[0] if rest else ""
            if target not in {room, "", "__version__"} and target not in may:
                found.append(f"{relative} imports {module}: {room} may import {sorted(may)}")
        elif library in LIBRARY_DOORS and not relative.startswith(LIBRARY_DOORS[library] or ("\0",)):
            found.append(f"{relative} imports {module}: its only door is {LIBRARY_DOORS[library] or 'none'}")
    return found


def device_questions(source: str, relative: str) -> list[str]:
    """Where this source asks jax for devices, past the one door."""
    if relative == DEVICE_DOOR:
        return []
    found = [
        f"{relative}:{node.lineno} asks jax.{node.attr}: its only door is {DEVICE_DOOR}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and node.attr in DEVICE_QUESTIONS
        and isinstance(node.value, ast.Name)
        and node.value.id == "jax"
    ]
    names = {f"jax.{name}" for name in DEVICE_QUESTIONS}
    return found + [f"{relative} imports {m}" for m in imported_modules(source, relative) if m in names]


@pytest.mark.parametrize("relative", RELATIVE)
def test_imports_point_down_and_libraries_have_one_door(relative):
    source = (PACKAGE / relative).read_text(encoding="utf-8")
    assert forbidden_imports(source, relative) == []
    assert device_questions(source, relative) == []


def test_every_room_has_a_row_here_and_in_the_architecture_page():
    rooms = {room_of(relative) for relative in RELATIVE} - {"__init__"}
    assert rooms <= set(MAY_IMPORT)
    assert not rooms & NO_ROOM_FOR
    table = ARCHITECTURE.read_text(encoding="utf-8").split("## Rooms")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    documented = {room_of(name.rstrip("/")) for row in rows for name in re.findall(r"[\w./]+", row)}
    assert documented == set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("source", "relative"),
    [
        ("from jaxrec.training.step import train_step", "nn/encoder.py"),
        ("def f():\n    import jaxrec.tasks.base", "losses/softmax.py"),
        ("from ..models import two_tower", "core/mesh.py"),
        ("from jaxrec import data", "metrics/ranking.py"),
        ("import orbax.checkpoint as ocp", "training/loop.py"),
        ("import tensorflow as tf", "training/loop.py"),
        ("import pickle", "data/prepare.py"),
    ],
)
def test_the_rule_sees_a_forbidden_import(source, relative):
    assert len(forbidden_imports(source, relative)) == 1


@pytest.mark.parametrize("source", ["import jax\nn = len(jax.devices())", "from jax import device_count"])
def test_the_rule_sees_a_device_question(source):
    assert len(device_questions(source, "training/loop.py")) == 1
    assert device_questions(source, DEVICE_DOOR) == []
