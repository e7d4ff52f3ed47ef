"""The export, whole: gather, write, load back, compare, and only then give the version its name."""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import safetensors.numpy
from jaxtyping import Float32

from jaxrec import __version__
from jaxrec.config.json_text import to_json
from jaxrec.data.dataset import PreparedDataset
from jaxrec.evaluation.behaviours import learned_behaviours
from jaxrec.evaluation.evaluator import EVALUATION_FILE
from jaxrec.evaluation.user_ranking import UserRanker
from jaxrec.export import layout
from jaxrec.export.artifacts import Artifacts, Say, expected_results
from jaxrec.export.candidates import write_candidates
from jaxrec.export.catalogue import write_catalogue, write_histories, write_users
from jaxrec.export.check import Check, compare, difference
from jaxrec.export.directory import new_version
from jaxrec.export.histories import histories_of, label_facts
from jaxrec.export.item_index import ItemIndex
from jaxrec.export.licence import licence_of
from jaxrec.export.manifest import Manifest, file_entries
from jaxrec.export.model_card import model_card
from jaxrec.export.programs import ProgramSpec, programs_of, used_arrays
from jaxrec.export.requests import requests_of, spread_users
from jaxrec.export.served_model import BIAS, VECTORS, ServedModel, Weights
from jaxrec.export.weights import HostWeights, gather_weights, served_model, stored
from jaxrec.runs import Run, load_state, run_of_state
from jaxrec.training.state import TrainState

CHECKED_USERS = 32
# What accelerators round in a product is no difference between artifacts.
EXACT = functools.partial(jax.default_matmul_precision, "highest")
LIBRARIES = ("jax", "flax", "numpy", "tensorflow-cpu", "tensorflow", "onnx", "onnxruntime")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is asked of an export.

    Attributes:
      version: of the directory; "" = the time and the step.
      k: length of the lists.
      dtype: of the stored weights.
      saved_model: write TensorFlow's SavedModel; jaxrec.serve does not read it.
      onnx: write ONNX too.
      data_licence: of the data, for the card; "" = what is known of it.
      histories: write the users' latest events too, for a server that starts with them; personal data.
      candidates: other methods whose candidates a server may add; see `candidates.METHODS`.
      index: write an approximate index of the items.
    """

    version: str = ""
    k: int = 100
    dtype: str = "float32"
    saved_model: bool = True
    onnx: bool = False
    data_licence: str = ""
    histories: bool = False
    candidates: tuple[str, ...] = ()
    index: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """What was written.

    Attributes:
      agreement: the largest difference of scores between the programs and the run's own recommendations, relative
        as `check.TOLERANCE` is, and the share of lists that are the same.
    """

    directory: Path
    manifest: Manifest
    checks: list[Check]
    agreement: tuple[float, float]


def export_run(
    workdir: Path,
    out: Path,
    options: ExportOptions,
    *,
    mesh_shape: tuple[int, int] | None = None,
    measured: Mapping[str, Any] = MappingProxyType({}),
    histories: PreparedDataset | None = None,
    say: Say = lambda text: None,
) -> Export:
    """Exports the run in `workdir` as a new version in `out`; see `export_state`.

    Args:
      measured: of the run, beside what its evaluation says.
    """
    say(f"loading {workdir}")
    config, dataset, setup, state = load_state(workdir, mesh_shape=mesh_shape)
    with jax.set_mesh(setup.mesh):
        run = run_of_state(config, dataset, setup, state, int(state.step))
    metrics = {**_evaluation(workdir), **measured}
    return export_state(run, state, out, options, metrics=metrics, histories=histories, say=say)


def export_state(
    run: Run,
    state: TrainState,
    out: Path,
    options: ExportOptions,
    *,
    metrics: Mapping[str, Any] = MappingProxyType({}),
    histories: PreparedDataset | None = None,
    say: Say = lambda text: None,
) -> Export:
    """Exports a state of a run as a new version in `out`.

    Args:
      metrics: what `evaluation.json` holds; `update`, the paired test that a version was promoted by; `compression`,
        what codes have cost. {} = nothing was measured.
      histories: whose events `options.histories` means, where a server has the later ones; None = the run's own.

    Raises:
      ValueError: the run cannot be exported, the version is there, or an artifact does not do what the model does.
      NotImplementedError: the model does what cannot be written for another runtime.
    """
    if jax.process_count() > 1:
        raise ValueError(f"an export runs in one process, and this one is of {jax.process_count()}.")
    with jax.set_mesh(run.mesh), EXACT():
        weights = stored(gather_weights(run.setup, state, run.dataset), options.dtype)
    return export_weights(run, weights, out, options, metrics=metrics, histories=histories, say=say)


def export_weights(
    run: Run,
    weights: Weights,
    out: Path,
    options: ExportOptions,
    *,
    compression: str = "",
    metrics: Mapping[str, Any],
    histories: PreparedDataset | None = None,
    say: Say,
) -> Export:
    """Exports a run whose weights are these; see `export_state`.

    Args:
      compression: the method that made codes of the weights; "" = none has.
    """
    dataset, created = run.dataset, datetime.datetime.now(datetime.UTC)
    version = options.version or f"{created:%Y%m%dT%H%M%SZ}-step{run.step}"
    with new_version(out, version) as place:
        model = served_model(run.setup, dataset, run.config.data.history_length)
        programs = programs_of(model, weights, options.k)
        arrays = used_arrays(programs, weights)
        say(f"writing {', '.join(programs)}")
        write_data(place, run, model, arrays, metrics)
        if options.histories:
            reads = bool(model.outputs.read_behaviours)
            write_histories(histories_of(histories or dataset, model.max_events, labels=reads), place)
        if options.candidates:
            say(f"fitting {', '.join(options.candidates)}")
            write_candidates(dataset, options.candidates, place)
        users = spread_users(dataset, CHECKED_USERS)
        requests = requests_of(programs, model, dataset, users)
        facts = _facts(run, model, options, created) | {"compression": compression}
        facts["event_labels"] = label_facts(histories or dataset)  # a server's log goes on with these data
        with EXACT():
            expected = expected_results(programs, arrays, requests)
            if options.index:
                say("indexing the items")
                facts["index"] = write_index(weights, expected[layout.USER_TOWER]["query"], place)
            say("comparing with the run's own recommendations")
            agreement = compare_with_run(run, users, expected["recommend"], options.dtype)
        signatures = {name: _signature(program) for name, program in programs.items()}
        manifest = Manifest(version=version, facts=facts, programs=signatures, checks=[], files={})
        manifest.write(place)  # as far as it is known: the checks read it
        artifacts = Artifacts(
            place=place,
            programs=programs,
            weights=arrays,
            facts=facts,
            requests=requests,
            expected=expected,
        )
        checks = artifacts.write(saved_model=options.saved_model, onnx=options.onnx, say=say)
        say("writing the manifest")
        manifest = _finish(place, manifest, metrics, checks)
    return Export(directory=out / version, manifest=manifest, checks=checks, agreement=agreement)


def _finish(place: Path, manifest: Manifest, metrics: Mapping[str, Any], checks: Sequence[Check]) -> Manifest:
    """The card, and the manifest that lists every file."""
    card = model_card(manifest.facts, metrics, checks)
    (place / layout.CARD_FILE).write_text(card, encoding="utf-8")
    whole = dataclasses.replace(
        manifest, checks=[dataclasses.asdict(check) for check in checks], files=file_entries(place)
    )
    whole.write(place)
    Manifest.read(place).verify(place)
    return whole


def write_data(
    place: Path, run: Run, model: ServedModel, weights: HostWeights, metrics: Mapping[str, Any]
) -> None:
    """Everything that is no program: weights, vocabularies, titles, tokenizer, config, metrics."""
    dataset = run.dataset
    of_items = {name: array for name, array in weights.items() if name.startswith("items/")}
    others = {name: array for name, array in weights.items() if name not in of_items}
    safetensors.numpy.save_file(of_items, place / layout.ITEM_VECTORS_FILE)
    safetensors.numpy.save_file(others, place / layout.WEIGHTS_FILE)
    num_items = dataset.metadata.num_items
    categories = pa.array([list(names) for names in dataset.item_categories], pa.list_(pa.string()))
    table = {
        "item_id": pa.array(dataset.item_keys),
        "title": pa.array(dataset.titles(np.arange(1, num_items + 1)), pa.string()),
        "categories": categories,
        "train_count": pa.array(np.asarray(dataset.item_counts[1:], np.int64)),
    }
    write_catalogue(pa.table(table), place)
    if model.config.user_dim:
        write_users(dataset.user_keys, place)
    if model.config.text is not None and dataset.directory is not None:
        for name in ("vocab.txt", "tokenizer_config.json"):
            if (dataset.directory / name).is_file():
                shutil.copyfile(dataset.directory / name, place / name)
    (place / layout.CONFIG_FILE).write_text(to_json(run.config), encoding="utf-8")
    text = json.dumps(dict(metrics), indent=1, ensure_ascii=False) + "\n"
    (place / layout.METRICS_FILE).write_text(text, encoding="utf-8")


def write_index(weights: Weights, queries: Float32[np.ndarray, "q d"], place: Path) -> dict[str, float]:
    """The approximate index; returns what a server needs to know of it."""
    vectors, bias = (np.asarray(weights[name].decode()) for name in (VECTORS, BIAS))
    index, recall = ItemIndex.build(vectors, bias, queries)
    index.write(place)
    return {"num_probes": index.num_probes, "recall": recall}


def compare_with_run(
    run: Run, users: np.ndarray, found: Mapping[str, np.ndarray], dtype: str
) -> tuple[float, float]:
    """The largest difference of scores from the run's own recommendations, and the share of lists that are the same.

    Raises:
      ArtifactError: they differ although both compute in float32.
    """
    config = run.config
    k = found["top_item_ids"].shape[1]
    with jax.set_mesh(run.mesh):
        ranker = UserRanker(run, top_k=k)
        rows = ranker.rows("all", rows_per_batch=config.evaluation.rows_per_batch, user_indices=users)
        ranks, _ = ranker.rank(rows)
    order = np.argsort(users)
    places = order[np.searchsorted(users, ranks.user_indices, sorter=order)]
    expected = {"top_item_ids": ranks.top_item_ids, "top_scores": ranks.top_scores}
    ours = {name: array[places] for name, array in found.items()}
    same = float(np.mean(np.all(ours["top_item_ids"][:, :10] == ranks.top_item_ids[:, :10], axis=1)))
    # Rounded weights and activations are the user's choice; the figures say what they cost.
    if dtype == config.model.encoder.dtype == "float32":
        (check,) = compare("the programs", {"recommend": expected}, {"recommend": ours})
        return check.difference, same
    return difference(ranks.top_scores, ours["top_scores"]), same


def _facts(
    run: Run, model: ServedModel, options: ExportOptions, created: datetime.datetime
) -> dict[str, Any]:
    """What readers need to know, and what people want to."""
    metadata, config = run.dataset.metadata, model.config
    return {
        "created": created.isoformat(timespec="seconds"),
        "run": {"name": run.config.name, "step": run.step, "tasks": list(run.config.tasks)},
        "data": {
            name: getattr(metadata, name)
            for name in ("name", "num_users", "num_items", "num_events", "split", "fingerprint")
        }
        | {"licence": options.data_licence or licence_of(run.config.data)},
        "libraries": {"jaxrec": __version__, **_versions()},
        "dtype": options.dtype,
        "k": min(options.k, metadata.num_items),
        "num_items": metadata.num_items,
        "item_dim": config.item_dim,
        "max_events": model.max_events - model.masked,
        "filter_seen": metadata.filter_seen,
        "behaviours": list(metadata.behaviours),
        "learned_behaviours": list(learned_behaviours(model.tasks, metadata.behaviours)),
        "context": list(metadata.context),
        "domains": list(metadata.domains) if model.has_domains else [],
        "reads": {
            "user_ids": bool(config.user_dim),
            "seconds": config.time_gaps or config.encoder.time_bias,
            "labels": model.outputs.read_behaviours,
            "text_tokens": model.facts.num_text_tokens if config.text is not None else 0,
        },
    }


def _signature(program: ProgramSpec) -> dict[str, Any]:
    """As the manifest holds it."""
    arrays = {
        part: [{"name": a.name, "dims": list(a.dims), "dtype": a.dtype} for a in getattr(program, part)]
        for part in ("inputs", "outputs")
    }
    return {**arrays, "weights": list(program.weights)}


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _evaluation(workdir: Path) -> dict[str, Any]:
    """What `python -m jaxrec.evaluate` wrote; {} where it was not run."""
    path = workdir / EVALUATION_FILE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
