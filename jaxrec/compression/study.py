"""A run compressed by several methods, each measured from its files, beside the original and beside other runs.

A method that is finished is not done again; latencies are measured anew each time, all programs in turns.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrec.compression.files import CompressedModel, read_model, write_model
from jaxrec.compression.latency import Program, answer_program, median_milliseconds
from jaxrec.compression.methods import MethodRefusedError, Source
from jaxrec.compression.named_methods import METHODS
from jaxrec.compression.parameters import check_compressible, parameters_of
from jaxrec.compression.rivals import equal_bytes_overrides
from jaxrec.compression.served import compressed_run, rank_users
from jaxrec.config import run_directory
from jaxrec.core.files import write_whole
from jaxrec.data.dataset import PreparedDataset
from jaxrec.evaluation.comparison import compare_runs, write_ranks
from jaxrec.evaluation.significance import Comparison
from jaxrec.metrics.ranking import mean_metrics
from jaxrec.runs import load_state

logger = logging.getLogger(__name__)

ORIGINAL, SOURCE_FILE, MEASURED_FILE, SUMMARY_FILE = (
    "original",
    "source.json",
    "measured.json",
    "compression.json",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for.

    Attributes:
      workdir: of the trained run.
      out: a directory a method, and the summary.
      methods: names of `METHODS`.
      beside: workdirs of other runs on the same data to hold the methods against, such as a student, or a small
        dense model.
      repeats: of each latency.
    """

    workdir: Path
    out: Path
    methods: Sequence[str]
    beside: Sequence[Path] = ()
    split: str = "test"
    repeats: int = 30

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise ValueError(f"methods={unknown[0]!r} is unknown; take some of {', '.join(METHODS)}.")
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats} must be at least 1.")
        names = [beside_name(path) for path in self.beside]
        if len(set(names)) < len(names):
            raise ValueError(
                f"beside={', '.join(map(str, self.beside))}: two workdirs have one name; rename one."
            )


def beside_name(workdir: Path) -> str:
    """The directory of a run beside, in `out`."""
    return f"beside-{workdir.resolve().name}"


def run_study(request: Request) -> dict[str, Any]:
    """Compresses, measures, and writes `compression.json`; returns what it holds.

    Raises:
      ValueError: there is no run, it has parts that compression does not know, `out` belongs to another one, or no
        method can be applied.
    """
    source = open_source(request.workdir)
    _note_source(request, source)
    programs: dict[str, Program] = {}
    rows: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    with jax.set_mesh(source.setup.mesh):
        entries = {ORIGINAL: source}
        entries |= {beside_name(path): open_source(path) for path in request.beside}
        for name, other in entries.items():
            if other.dataset.metadata.fingerprint != source.dataset.metadata.fingerprint:
                raise ValueError(
                    f"{name} was trained on data of fingerprint {other.dataset.metadata.fingerprint}, and "
                    f"{request.workdir} on {source.dataset.metadata.fingerprint}; give a run on the same data."
                )
            identity = {"method": name, "parameters": digest(other), "split": request.split}
            directory = request.out / name
            if not _is_measured(directory, identity):
                _measure(directory, other.original(), source.dataset, request.split, identity)
            rows[name] = _row(directory, source, request.out)
            programs[name] = _program(other.original(), source, request.split)
        for name in request.methods:
            method, directory = METHODS[name], request.out / name
            identity = {"method": str(method), "step": str(source.step), "split": request.split}
            if not _is_measured(directory, identity):
                logger.info("compressing: %s", name)
                try:
                    model = method.compress(source)
                except MethodRefusedError as reason:
                    logger.warning("%s cannot be applied: %s", name, reason)
                    refused[name] = str(reason)
                    continue
                write_model(directory, model)
                method.finish(directory, source, model)
                _measure(directory, read_model(directory), source.dataset, request.split, identity)
            model = read_model(directory)
            rows[name] = _row(directory, source, request.out) | {"command": _rival_command(source, model)}
            programs[name] = _program(model, source, request.split)
        if refused and len(refused) == len(set(request.methods)):
            reasons = " ".join(f"{name}: {reason}" for name, reason in refused.items())
            raise ValueError(f"no method can be applied to {request.workdir}; take others. {reasons}")
        latencies = median_milliseconds(programs, request.repeats)
    for name, row in rows.items():
        row["latency_ms"] = latencies[name]
        row["share_of_bytes"] = row["num_bytes"] / rows[ORIGINAL]["num_bytes"]
    _pair_with_rivals(request, rows, source)
    values = {
        "dataset": source.dataset.metadata.name,
        "split": request.split,
        "step": source.step,
        "headline_metric": source.config.evaluation.metric,
        "confidence": source.config.evaluation.confidence,
        "num_items": source.dataset.metadata.num_items,
        "systems": rows,
        "refused": refused,
    }
    _write_json(request.out / SUMMARY_FILE, values)
    return values


def open_source(workdir: Path) -> Source:
    """The best state of a run, ready to be compressed."""
    config, dataset, setup, state = load_state(run_directory(workdir))
    check_compressible(config)
    with jax.set_mesh(setup.mesh):
        return Source(
            config=config,
            dataset=dataset,
            setup=setup,
            state=state,
            step=int(jax.device_get(state.step)),
            arrays=parameters_of(setup, state),
        )


def digest(source: Source) -> str:
    """Of the run's parameters: what tells one state from another."""
    found = hashlib.sha256()
    for name, array in sorted(source.arrays.items()):
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()[:16]


def _note_source(request: Request, source: Source) -> None:
    """`out` belongs to one state of one run: numbers of two must not meet in a table."""
    identity = {"name": source.config.name, "step": source.step, "parameters": digest(source)}
    path = request.out / SOURCE_FILE
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known != identity:
            raise ValueError(
                f"{request.out} holds the methods of {known}, and {request.workdir} is {identity}; take another --out."
            )
    request.out.mkdir(parents=True, exist_ok=True)
    _write_json(path, identity)


def _is_measured(directory: Path, identity: Mapping[str, Any]) -> bool:
    path = directory / MEASURED_FILE
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["identity"] == identity


def _measure(
    directory: Path, model: CompressedModel, dataset: PreparedDataset, split: str, identity: Mapping[str, Any]
) -> None:
    """Ranks every user with a model; `measured.json` comes last, so that it never lacks its ranks."""
    directory.mkdir(parents=True, exist_ok=True)
    mesh = jax.sharding.get_mesh()
    run = compressed_run(model, dataset, mesh)
    ranks = rank_users(run, split)
    write_ranks(directory, dataset, split, ranks)
    metrics = mean_metrics(ranks.ranks, model.config.evaluation.ks)
    logger.info("%s: %s", directory.name, " ".join(f"{k} {v:.4f}" for k, v in metrics.items() if "@10" in k))
    values = {
        "identity": identity,
        "num_bytes": model.num_bytes,
        "num_targets": len(ranks),
        "metrics": metrics,
    }
    _write_json(directory / MEASURED_FILE, values)


def _row(directory: Path, source: Source, out: Path) -> dict[str, Any]:
    measured = json.loads((directory / MEASURED_FILE).read_text(encoding="utf-8"))
    row = {name: measured[name] for name in ("num_bytes", "num_targets", "metrics")}
    if directory.name == ORIGINAL:
        return row
    return row | {"against_original": _paired(out / ORIGINAL, directory, source)}


def _program(model: CompressedModel, source: Source, split: str) -> Program:
    return answer_program(compressed_run(model, source.dataset, source.setup.mesh), model, split)


def _rival_command(source: Source, model: CompressedModel) -> str:
    """What trains the dense model of equal bytes; "" where none is narrow enough."""
    overrides = equal_bytes_overrides(source.config, source.dataset, source.setup.mesh, model.num_bytes)
    if overrides is None:
        return ""
    return " ".join(f"--config.{name}={value}" for name, value in overrides.items())


def _pair_with_rivals(request: Request, rows: dict[str, dict[str, Any]], source: Source) -> None:
    """Each method against the largest run beside that weighs no more than the method, to a percent."""
    beside = [beside_name(path) for path in request.beside]
    for name in [name for name in request.methods if name in rows]:
        limit = 1.01 * rows[name]["num_bytes"]
        lighter = [other for other in beside if rows[other]["num_bytes"] <= limit]
        if lighter:
            rival = max(lighter, key=lambda other: rows[other]["num_bytes"])
            paired = _paired(request.out / rival, request.out / name, source)
            rows[name] |= {"rival": rival, "against_rival": paired}


def _paired(path_a: Path, path_b: Path, source: Source) -> dict[str, Any]:
    """B less A over the same users, by metric."""
    found: Mapping[str, Comparison] = compare_runs(path_a, path_b, config=source.config.evaluation)
    return {
        name: {
            "difference": one.difference,
            "interval": [one.low, one.high],
            "relative": one.difference / one.mean_a if one.mean_a else 0.0,
            "adjusted_p_value": one.adjusted_p_value,
        }
        for name, one in found.items()
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(values, indent=1, allow_nan=False) + "\n")
