"""From a trained state to the weights of the served model, in the order of the ids, and what is stored of them.

A weight is a code, which a program takes as arrays and reads back inside. One that is kept as it is, is one array of
its own name; of others each array has the weight's name and its own: `items/vectors.values`, `items/vectors.scales`.

N = items, D = item dim, U = users.
"""

import dataclasses
from collections.abc import Mapping

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from jaxrec.compression.codes import Code, Plain
from jaxrec.data.dataset import PreparedDataset
from jaxrec.export.served_model import (
    BIAS,
    DOMAINS,
    EVENTS,
    MEMORY,
    USER_ROWS,
    VECTORS,
    ServedModel,
    Weights,
    flatten_dense,
    serving_config,
)
from jaxrec.models.two_tower import ITEM, USER, TwoTowerConfig
from jaxrec.training.inference import Inference
from jaxrec.training.setup import Setup, evaluation_parameters
from jaxrec.training.state import TrainState, in_id_order, logical_rows

HostWeights = dict[str, np.ndarray]

# Of the stored weights; programs compute in float32 whatever it is.
DTYPES: Mapping[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def served_model(setup: Setup, dataset: PreparedDataset, history_length: int) -> ServedModel:
    """How the run is asked.

    Raises:
      ValueError: no task of the run ranks items, or the model does what no program here does.
    """
    _check_exportable(setup.model, dataset)
    task = setup.ranking_task
    return ServedModel(
        config=serving_config(setup.model),
        outputs=setup.outputs,
        facts=setup.step.facts,
        tasks=setup.step.tasks,
        masked=task.query_mode == "masked",
        temperature=task.temperature,
        max_events=history_length,
        has_domains=dataset.metadata.has_domains,
    )


def _check_exportable(model: TwoTowerConfig, dataset: PreparedDataset) -> None:
    unable = {
        "model.mixture": (model.mixture is not None, "programs score by one product"),
        "model.encoder.compression": (
            model.encoder.compression is not None,
            "programs see every event of a history singly",
        ),
        "kinds of items": (bool(dataset.metadata.kinds), "a list of a program is of the whole catalogue"),
    }
    for name, (asked, why) in unable.items():
        if asked:
            raise ValueError(
                f"{name}: a run with it cannot be exported yet, since {why}; use python -m jaxrec.recommend."
            )


def gather_weights(setup: Setup, state: TrainState, dataset: PreparedDataset) -> HostWeights:
    """Every weight that a program may read, on the host; call it under `jax.set_mesh(setup.mesh)`.

    Raises:
      ValueError: a weight is not finite.
    """
    inference = Inference(setup, state)
    vectors, bias = inference.catalogue()
    found = {VECTORS: _of_items(setup, vectors), BIAS: _of_items(setup, bias)}
    if setup.model.output_table or setup.model.cosine is not None:
        found[EVENTS] = _of_items(setup, inference.event_vectors())
    if dataset.metadata.has_domains:
        found[DOMAINS] = np.asarray(dataset.item_domains, np.int32)
    for name, rows in inference.memory.items():
        found[MEMORY + name] = _of_items(setup, rows)
    if USER in setup.tables:
        _, tables = evaluation_parameters(state)
        found[USER_ROWS] = logical_rows(setup.tables[USER], tables[USER])
    found |= {name: np.asarray(leaf) for name, leaf in flatten_dense(inference.dense).items()}
    found = {
        name: array if array.dtype.kind in "iu" else array.astype(np.float32) for name, array in found.items()
    }
    for name, array in found.items():
        if not np.isfinite(array).all():
            raise ValueError(
                f"{name} holds NaN or infinity at step {int(state.step)}; the run diverged: export an older "
                "checkpoint, or train again with a lower learning rate."
            )
    return found


def stored(weights: HostWeights, dtype: str) -> dict[str, Code]:
    """The weights as they are written: matrices in `dtype`, biases, norms and counts as they are.

    Raises:
      ValueError: a value is too large for the dtype.
    """
    found: dict[str, Code] = {}
    for name, array in weights.items():
        wide = array.dtype.kind != "f" or array.ndim < 2 or name.startswith(MEMORY)
        try:
            found[name] = Plain.of(array, None if wide else DTYPES[dtype].name)
        except ValueError as error:
            raise ValueError(
                f"{name} holds values that {dtype} cannot; use --dtype=bfloat16 or float32."
            ) from error
    return found


def arrays_of(weights: Weights) -> HostWeights:
    """What is stored of them."""
    return {
        _name_of(name, code, field): np.asarray(array)
        for name, code in weights.items()
        for field, array in code.arrays.items()
    }


def of_arrays(weights: Weights, arrays: Mapping[str, jax.Array]) -> dict[str, Code]:
    """The weights with these arrays in the place of their own; without those that lack one, which nothing reads."""
    found = {}
    for name, code in weights.items():
        names = {field: _name_of(name, code, field) for field in code.arrays}
        if arrays.keys() >= set(names.values()):
            found[name] = dataclasses.replace(code, **{field: arrays[key] for field, key in names.items()})
    return found


def _name_of(name: str, code: Code, field: str) -> str:
    return name if isinstance(code, Plain) else f"{name}.{field}"


def _of_items(setup: Setup, rows: jax.Array) -> Shaped[np.ndarray, "n_plus_1 *d"]:
    """Rows that lie as those of a table of items under `Rows`; row 0 is zeros."""
    ordered = np.array(in_id_order(rows, setup.tables[ITEM].num_rows))
    ordered[0] = 0
    return ordered
