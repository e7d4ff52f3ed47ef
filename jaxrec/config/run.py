"""Where a config comes from and where a run keeps it: config files, command lines, and `config.json` in the workdir.

A config file is a Python file with a function `get_config()` that returns a `TrainConfig`; further functions without
parameters are its variants: `configs/x.py` means `get_config`, `configs/x.py:tiny` means `tiny`.
"""

import argparse
import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from jaxrec.config.json_text import CLASS, CONFIG_FILE_MODULE, from_json, to_json
from jaxrec.config.overrides import describe_fields, split_overrides
from jaxrec.config.stages import override_run
from jaxrec.config.train_config import TrainConfig
from jaxrec.core.files import write_whole

DEFAULT_VARIANT = "get_config"
CONFIG_FILE = "config.json"

# What may change between the start of a run and its resumption: none of it enters the parameters or the batches.
MAY_CHANGE = (
    "name",
    "mesh_shape",
    "placement",
    "log_every_steps",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "evaluation",
    "model.encoder.remat",
    "model.encoder.attention",
)
# Where the data lie may change too, if the fingerprint says that they are the same.
PLACES_OF_DATA = ("data.path", "data.name", "data.tfds_data_dir")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunArguments:
    """What the command line of a training run says."""

    config: TrainConfig
    workdir: Path


def load_config(location: str) -> TrainConfig:
    """The config of `path/to/file.py` or `path/to/file.py:variant`.

    While the file runs, the directory above its own can be imported from, so that `from configs import quickstart`
    works wherever the command is given.

    Raises:
        ValueError: there is no such file or variant, the file itself fails, or the variant returns something else.
    """
    path_text, _, variant = location.partition(":")
    variant = variant or DEFAULT_VARIANT
    path = Path(path_text)
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(_missing_file(path))
    module = _run_file(path)
    variants = _variants(module)
    if variant not in variants:
        has = f"its variants: {', '.join(variants)}" if variants else "it has none"
        raise ValueError(
            f"{path} has no variant {variant!r} ({has}); a variant is a function without parameters."
        )
    try:
        config = variants[variant]()
    except Exception as error:
        raise ValueError(_failure(path, error)) from error
    if not isinstance(config, TrainConfig):
        raise ValueError(
            f"{variant}() of {path} returned a {type(config).__name__}; it must return a TrainConfig."
        )
    return config


def _missing_file(path: Path) -> str:
    neighbours = sorted(str(one) for one in path.parent.glob("*.py") if one.name != "__init__.py")
    close = difflib.get_close_matches(str(path), neighbours, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    if neighbours:
        hint += f" There are: {', '.join(neighbours)}."
    return f"there is no config file {path}{hint or '; give the path of a .py file.'}"


def _run_file(path: Path) -> ModuleType:
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(f"{CONFIG_FILE_MODULE}{digest}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name to read their annotations.
    sys.modules[spec.name] = module
    try:
        with _import_path(path.resolve().parent.parent):
            spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise ValueError(_failure(path, error)) from error
    return module


def _failure(path: Path, error: Exception) -> str:
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path
    ]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    where = f", line {lines[-1]}" if lines else ""
    # A ValueError says by itself what is wrong.
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return f"{path}{where}: {kind}{error}"


@contextmanager
def _import_path(directory: Path) -> Iterator[None]:
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path.remove(str(directory))


def _variants(module: ModuleType) -> dict[str, Callable[[], Any]]:
    functions = {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
    return {
        name: function
        for name, function in functions.items()
        if all(
            parameter.default is not parameter.empty
            or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            for parameter in inspect.signature(function).parameters.values()
        )
    }


def parse_train_arguments(description: str | None, arguments: Sequence[str] | None = None) -> RunArguments:
    """Reads `--config=FILE[:VARIANT] --workdir=DIR --config.FIELD=VALUE ...`; what is wrong ends the program.

    `--help` lists every field; together with `--config`, those of that config.
    """
    overrides, rest = split_overrides(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        usage="%(prog)s --config=FILE[:VARIANT] --workdir=DIR [--config.FIELD=VALUE ...]",
    )
    parser.add_argument(
        "--config", metavar="FILE[:VARIANT]", help="config file, and the function in it that is called"
    )
    parser.add_argument(
        "--workdir", metavar="DIR", type=Path, help="directory of the run; an existing run is resumed"
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this, and the fields of the config")
    parsed, unknown = parser.parse_known_args(rest)
    try:
        config = override_run(load_config(parsed.config), overrides) if parsed.config else None
        if parsed.help:
            parser.epilog = "fields of the config:\n" + (
                describe_fields(config) if config else "  give --config=FILE with --help to see them"
            )
            parser.print_help()
            parser.exit()
        if unknown:
            raise ValueError(
                f"unknown argument {unknown[0]!r}; a field of the config is written --config.FIELD=VALUE."
            )
        if config is None:
            raise ValueError("--config=FILE is missing, such as --config=configs/quickstart.py.")
        if parsed.workdir is None:
            raise ValueError("--workdir=DIR is missing, such as --workdir=runs/quickstart.")
    except ValueError as error:
        parser.error(str(error))
    return RunArguments(config=config, workdir=parsed.workdir)


def write_run_config(
    workdir: str | os.PathLike[str], config: TrainConfig, *, data_fingerprint: str = ""
) -> None:
    """Keeps the config in the workdir, or makes sure that the run there can be resumed with it.

    Args:
        workdir: made where it is missing. Process 0 writes; every process checks.
        config: of this run.
        data_fingerprint: of the prepared data set; while it stays the same, the data may lie elsewhere.

    Raises:
        ValueError: the workdir belongs to another run; the message names the fields that differ.
    """
    path = Path(workdir) / CONFIG_FILE
    new = _text_in(workdir, config)
    old = _read_run_file(path)
    if old is not None:
        old_text, old_fingerprint = old
        same_data = bool(data_fingerprint) and data_fingerprint == old_fingerprint
        differences = _differences(old_text, new, same_data=same_data)
        if data_fingerprint and old_fingerprint and not same_data:
            differences["the data set"] = (f"fingerprint {old_fingerprint}", data_fingerprint)
        _refuse(workdir, differences)
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        body = {"data_fingerprint": data_fingerprint, "config": json.loads(new)}
        write_whole(path, json.dumps(body, indent=2, ensure_ascii=False) + "\n")


def check_run_config(workdir: str | os.PathLike[str], config: TrainConfig) -> None:
    """Makes sure, before any data are read, that a run in the workdir can be resumed with this config.

    Where the data lie may change: `write_run_config` sees whether they are the same.

    Raises:
        ValueError: as `write_run_config`.
    """
    old = _read_run_file(Path(workdir) / CONFIG_FILE)
    if old is not None:
        _refuse(workdir, _differences(old[0], _text_in(workdir, config), same_data=bool(old[1])))


def _text_in(workdir: str | os.PathLike[str], config: TrainConfig) -> str:
    if config.init_from:  # seen from the workdir, so that both may move together
        config = dataclasses.replace(config, init_from=os.path.relpath(config.init_from, workdir))
    return to_json(config)


def _refuse(workdir: str | os.PathLike[str], differences: Mapping[str, tuple[str, str]]) -> None:
    if differences:
        listed = "; ".join(f"{name} was {was}, and is {now}" for name, (was, now) in differences.items())
        raise ValueError(
            f"{workdir} belongs to another run: {listed}. Take another --workdir, or give the run's own values to"
            " resume it."
        )


def run_fingerprint(workdir: str | os.PathLike[str]) -> str:
    """The fingerprint of the data that the run in a workdir was trained on; "" where there is no run, or none is known.

    Raises:
        ValueError: the run's config cannot be read.
    """
    found = _read_run_file(Path(workdir) / CONFIG_FILE)
    return found[1] if found else ""


def read_run_config(workdir: str | os.PathLike[str]) -> TrainConfig:
    """The config of the run in a workdir.

    Raises:
        ValueError: there is no run, or its config cannot be read.
    """
    path = Path(workdir) / CONFIG_FILE
    found = _read_run_file(path)
    if found is None:
        raise ValueError(
            f"{workdir} holds no run ({CONFIG_FILE} is missing); train one there first: --workdir={workdir}."
        )
    try:
        return from_json(found[0], TrainConfig)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_run_file(path: Path) -> tuple[str, str] | None:
    """(JSON text of the config, fingerprint of its data)."""
    if not path.is_file():
        return None
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        return json.dumps(body["config"]), str(body["data_fingerprint"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not the config of a run ({error!r}); remove it, or take another workdir."
        ) from error


def resume_differences(old_json: str, new_json: str) -> list[str]:
    """The fields, dotted, whose change forbids to go on with a run; each is a field of one config or of both."""
    return list(_differences(old_json, new_json, same_data=False))


def _differences(old_json: str, new_json: str, *, same_data: bool) -> dict[str, tuple[str, str]]:
    """Field -> (old value, new value), as JSON."""
    # Through the classes, so that a field that is newer than the run counts with its default.
    old, new = (_flat(json.loads(to_json(from_json(text, TrainConfig)))) for text in (old_json, new_json))
    may_change = MAY_CHANGE + (PLACES_OF_DATA if same_data else ())
    if old["optimizer.schedule"] == new["optimizer.schedule"] == '"constant"':
        # The other schedules fall towards the last step, so that a new end is another curve.
        may_change += ("num_train_steps",)
    counts = lambda name: not any(f"{name}.".startswith(f"{prefix}.") for prefix in may_change)  # noqa: E731
    changed = {
        name: (old.get(name, "absent"), new.get(name, "absent"))
        for name in old | new
        if old.get(name) != new.get(name) and counts(name)
    }
    # Fields have the order of their class; keys may change theirs, and that of tasks and of rates counts.
    orders = ([name for name in one if name in old and name in new and counts(name)] for one in (old, new))
    moved = [(was, now) for was, now in zip(*orders, strict=True) if was != now]
    return changed | ({"the order of keys": moved[0]} if moved else {})


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted name -> JSON of every leaf; the class of a dataclass stands under the name of its field."""
    flat: dict[str, str] = {}
    for name, value in tree.items():
        path = prefix.rstrip(".") if name == CLASS and prefix else f"{prefix}{name}"
        if isinstance(value, dict):
            flat |= _flat(value, f"{path}.")
        elif name != CLASS:
            flat[path] = json.dumps(value, ensure_ascii=False)
        elif prefix:
            flat[path] = value.rpartition(":")[2]
    return flat
