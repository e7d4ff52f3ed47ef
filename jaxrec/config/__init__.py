"""The typed configuration of a run: its tree, its files, its overrides on the command line, and its checks."""

from jaxrec.config.json_text import from_json, to_json
from jaxrec.config.overrides import apply_overrides, describe_fields, split_overrides
from jaxrec.config.run import (
    RunArguments,
    check_run_config,
    load_config,
    parse_train_arguments,
    read_run_config,
    resume_differences,
    run_fingerprint,
    write_run_config,
)
from jaxrec.config.stages import note_stages, override_run, run_directory, stage_configs
from jaxrec.config.train_config import Stage, TrainConfig, validate

__all__ = [
    "RunArguments",
    "Stage",
    "TrainConfig",
    "apply_overrides",
    "check_run_config",
    "describe_fields",
    "from_json",
    "load_config",
    "note_stages",
    "override_run",
    "parse_train_arguments",
    "read_run_config",
    "resume_differences",
    "run_directory",
    "run_fingerprint",
    "split_overrides",
    "stage_configs",
    "to_json",
    "validate",
    "write_run_config",
]
