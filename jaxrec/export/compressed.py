"""A model that `python -m jaxrec.compress` has made, exported: its codes are stored, and the programs read them.

Checked as every export is; what it is held against is the run that the codes stand for.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrec.compression.codes import Code, Plain
from jaxrec.compression.files import CompressedModel, read_model
from jaxrec.compression.parameters import DENSE, MEMORY, TABLE
from jaxrec.compression.served import compressed_state
from jaxrec.compression.study import SUMMARY_FILE
from jaxrec.core.mesh import make_mesh
from jaxrec.export import served_model
from jaxrec.export.artifacts import Say
from jaxrec.export.exporter import Export, ExportOptions, export_weights
from jaxrec.export.weights import HostWeights, gather_weights
from jaxrec.models.two_tower import ITEM, ITEM_BIAS, USER
from jaxrec.runs import dataset_of_run, run_of_state

__all__ = ["export_compressed", "in_codes"]

EXPORTED = "int8, int4, pq, pq_int4, pruned_heads, pruned_layers"


def export_compressed(
    workdir: Path,
    compressed: Path,
    out: Path,
    options: ExportOptions,
    *,
    mesh_shape: tuple[int, int] | None = None,
    say: Say = lambda text: None,
) -> Export:
    """Exports the compressed model in the directory `compressed`, made of the run in `workdir`; see `export_state`.

    Raises:
      ValueError: there is none, it was not measured, or it is one that no program here can be.
    """
    if options.dtype != "float32":
        raise ValueError(
            f"--dtype={options.dtype}: the codes of --compressed are stored as they are; leave it out."
        )
    say(f"loading {compressed}")
    model = read_model(compressed)
    _check_exportable(model, compressed.name)
    quality = _quality(compressed)
    dataset = dataset_of_run(model.config, workdir)
    mesh = make_mesh(mesh_shape or (-1, 1))
    setup, state = compressed_state(model, dataset, mesh)
    with jax.set_mesh(mesh):
        run = run_of_state(model.config, dataset, setup, state, model.step)
        weights = in_codes(gather_weights(setup, state, dataset), model, setup.model.scored_table)
    return export_weights(
        run,
        weights,
        out,
        options,
        compression=compressed.name,
        metrics={"compression": quality},
        say=say,
    )


def in_codes(weights: HostWeights, model: CompressedModel, scored_table: str) -> dict[str, Code]:
    """The weights of a compressed model in the codes that they were read from.

    What no code stands for is kept as it is: with cosines v(y) is a row over its length.
    """
    found: dict[str, Code] = {}
    for name, array in weights.items():
        code = model.codes.get(_name_of_code(name, scored_table))
        if isinstance(code, Plain) and name == served_model.BIAS:  # a table of one column
            code = dataclasses.replace(code, values=code.values[:, 0], full_shape=code.shape[:1])
        if code is None or not np.array_equal(np.asarray(code.decode()), array):
            code = Plain.of(array)
        found[name] = code
    return found


def _name_of_code(name: str, scored_table: str) -> str:
    """By the names of `compression.parameters`; "" = none."""
    if name.startswith(served_model.DENSE):
        return f"{DENSE}.{name.removeprefix(served_model.DENSE).replace('/', '.')}"
    if name.startswith(served_model.MEMORY):
        return f"{MEMORY}.{name.removeprefix(served_model.MEMORY)}"
    tables = {
        served_model.VECTORS: scored_table,
        served_model.EVENTS: ITEM,
        served_model.BIAS: ITEM_BIAS,
        served_model.USER_ROWS: USER,
    }
    return f"{TABLE}.{tables[name]}" if name in tables else ""


def _check_exportable(model: CompressedModel, method: str) -> None:
    unable = {
        "a list is made in two steps, by codes and by rows, and a program makes it in one": model.num_candidates,
        "activations are rounded where the program runs, which no two runtimes do alike": (
            model.config.model.encoder.products != "float"
        ),
    }
    for why, is_so in unable.items():
        if is_so:
            raise ValueError(f"{method} cannot be exported: {why}; take one of {EXPORTED}.")


def _quality(compressed: Path) -> dict[str, Any]:
    """What was measured of the model, beside the run that it was made of."""
    method, path = compressed.name, compressed.parent / SUMMARY_FILE
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        systems = summary["systems"]
        return {
            "method": method,
            "split": summary["split"],
            "confidence": summary["confidence"],
            "original": systems["original"]["metrics"],
            **systems[method],
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not say how good {method} is ({error!r}); let python -m jaxrec.compress --out={path.parent} "
            "come to its end."
        ) from error
