"""Stages: runs that follow each other in one workdir, each from the parameters of the one before.

A config with stages becomes a plain config for each of them, whose workdir is `DIR/<stage>`; `DIR/stages.json` lists
their names. Only the entries know of stages.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxrec.config.overrides import apply_overrides
from jaxrec.config.train_config import TrainConfig
from jaxrec.core.files import write_whole

STAGES_FILE = "stages.json"
OVERRIDE = "--config.stages."


def stage_configs(config: TrainConfig, workdir: Path) -> dict[str, TrainConfig]:
    """The run of each stage, by name, in their order; {} for a config without stages.

    Raises:
      ValueError: a name cannot be that of a directory.
    """
    runs: dict[str, TrainConfig] = {}
    start = {"init_from": config.init_from, "init_without": config.init_without}
    for name, stage in config.stages.items():
        if not name.isidentifier():
            raise ValueError(
                f"the stage name {name!r} must consist of letters, digits and underscores; rename it."
            )
        given = {field.name: getattr(stage, field.name) for field in dataclasses.fields(stage)}
        changes = start | {field: value for field, value in given.items() if value is not None}
        if changes["init_from"] in runs:
            changes["init_from"] = str(workdir / changes["init_from"])
        runs[name] = dataclasses.replace(config, name=f"{config.name}-{name}", stages={}, **changes)
        start = {"init_from": str(workdir / name), "init_without": ()}
    return runs


def note_stages(workdir: Path, names: Sequence[str]) -> None:
    """Keeps the names in the workdir; later ones may join those that are there.

    Raises:
      ValueError: the workdir holds a run without stages, or other ones.
    """
    known = _read_names(workdir)
    if list(names[: len(known)]) != known:
        raise ValueError(
            f"{workdir} holds the stages {', '.join(known)}, and the config has {', '.join(names) or 'none'}; new ones "
            "come after those that are there, or take another --workdir."
        )
    if not names:
        return
    if (workdir / "config.json").exists():
        raise ValueError(f"{workdir} holds a run without stages; take another --workdir.")
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_whole(workdir / STAGES_FILE, json.dumps(list(names)) + "\n")


def run_directory(workdir: Path) -> Path:
    """The directory of the run that a workdir stands for: that of its last stage where it has any, else itself."""
    return workdir.joinpath(*_read_names(workdir)[-1:])


def override_run(config: TrainConfig, overrides: Sequence[str]) -> TrainConfig:
    """`apply_overrides`, the run's own fields first, so that a stage that changes a part of one starts from the run's.

    Raises:
      ValueError: see `apply_overrides`.
    """
    paths = {one: one.partition("=")[0].removeprefix(OVERRIDE).split(".") for one in overrides}
    inner = [one for one in overrides if one.startswith(OVERRIDE) and len(paths[one]) > 1]
    config = apply_overrides(config, [one for one in overrides if one not in inner])
    stages = dict(config.stages)
    for name, field, *below in (paths[one] for one in inner):
        if below and name in stages and getattr(stages[name], field, below) is None:
            stages[name] = dataclasses.replace(stages[name], **{field: getattr(config, field)})
    return apply_overrides(dataclasses.replace(config, stages=stages), inner)


def _read_names(workdir: Path) -> list[str]:
    path = workdir / STAGES_FILE
    if not path.is_file():
        return []
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        if names and isinstance(names, list) and all(str(name).isidentifier() for name in names):
            return [str(name) for name in names]
    except ValueError:
        pass
    raise ValueError(f"{path} does not list the names of stages; remove it, or take another workdir.")
