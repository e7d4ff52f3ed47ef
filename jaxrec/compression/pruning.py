"""Structured pruning: whole heads and whole layers go, and what is left is a smaller model that a config describes.

A part matters as much as the queries move when it is left out, over histories of the training part. What goes is not
trained again here: the pruned model is also written as a run, which `init_from` starts from.

Source: Michel, Levy and Neubig, NeurIPS 2019 (heads by what their absence changes); Fan, Grave and Joulin, ICLR 2020
(layers that are left out).
"""

import dataclasses
import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.compression.codes import Plain
from jaxrec.compression.files import CompressedModel
from jaxrec.compression.methods import Method, MethodRefusedError, Source, with_encoder
from jaxrec.compression.parameters import DENSE, serving_setup, state_of
from jaxrec.config import TrainConfig, write_run_config
from jaxrec.data.evaluation_batches import EvaluationBatch, EvaluationRows
from jaxrec.training.checkpoint import Checkpoints
from jaxrec.training.inference import Inference
from jaxrec.training.rates import by_path
from jaxrec.training.setup import Setup
from jaxrec.training.state import to_checkpoint

logger = logging.getLogger(__name__)

BLOCK = re.compile(rf"{DENSE}\.encoder\.blocks\.(\d+)\.(.+)")
RUN_DIRECTORY = "run"
HEADS = "heads"  # the logical axis
Named = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruning(Method):
    """Base of the two.

    Attributes:
      keep: share of the parts that stay, rounded up.
      num_users: whose histories are asked.
      seed: of the choice of the users.
    """

    keep: float = 0.5
    num_users: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.keep < 1.0 or self.num_users < 1:
            raise ValueError(
                f"keep={self.keep}, num_users={self.num_users}: say 0 < keep < 1, and at least 1 user."
            )

    def finish(self, directory: Path, source: Source, model: CompressedModel) -> None:
        """Writes the model as a run of no steps, for others to start from."""
        arrays = {name: np.asarray(code.decode()) for name, code in model.codes.items()}
        write_run(directory / RUN_DIRECTORY, source, model.config, arrays)

    def kept(self, count: int, what: str) -> int:
        """How many of `count` parts stay.

        Raises:
          MethodRefusedError: all of them would.
        """
        if (kept := math.ceil(self.keep * count)) == count:
            raise MethodRefusedError(
                f"the encoder has {count} {what}, and keep={self.keep} leaves all; nothing is pruned."
            )
        return kept

    def batches(self, source: Source) -> list[EvaluationBatch]:
        """Histories of the training part, whatever comes after it.

        Raises:
          MethodRefusedError: there is none.
        """
        dataset, generator = source.dataset, np.random.default_rng(self.seed)
        users = np.flatnonzero(dataset.train_end > 0)
        chosen = np.sort(generator.permutation(users)[: self.num_users])
        if not len(chosen):
            raise MethodRefusedError("no user has an event in the training part; there is no history to ask.")
        devices = source.setup.mesh.size
        rows = EvaluationRows.make(
            dataset,
            "train",
            rows_per_batch=-(-source.config.evaluation.rows_per_batch // devices) * devices,
            history_length=source.config.data.history_length,
            user_indices=chosen,
            append_slot=source.setup.ranking_task.query_mode == "masked",
            with_seen=False,
        )
        return [rows.build(index, 0, 1) for index in range(rows.num_batches)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrunedHeads(Pruning):
    """The heads of each layer that move the queries least go, as many in every layer."""

    def compress(self, source: Source) -> CompressedModel:
        """See `Method`."""
        encoder = source.config.model.encoder
        if encoder.block != "transformer":
            raise MethodRefusedError(
                f"block={encoder.block!r}: heads can be pruned of block='transformer' alone."
            )
        kept = self.kept(encoder.num_heads, "heads")
        axes = head_axes(source.setup)
        inference = Inference(source.setup, source.state)
        names = list(by_path(inference.dense))
        batches = self.batches(source)
        before = _queries(inference, batches, inference.dense)
        chosen: dict[int, list[int]] = {}
        for layer in range(encoder.num_layers):
            moved = []
            for head in range(encoder.num_heads):
                name = f"encoder.blocks.{layer}.attention.out_kernel"
                leaves = jax.tree.leaves(inference.dense)
                place = names.index(name)
                leaves[place] = leaves[place].at[head].set(0.0)
                without = jax.tree.unflatten(jax.tree.structure(inference.dense), leaves)
                moved.append(_distance(before, _queries(inference, batches, without)))
            chosen[layer] = sorted(np.argsort(moved)[::-1][:kept].tolist())
            logger.info("layer %d: heads move the queries by %s", layer, " ".join(f"{m:.4f}" for m in moved))
        arrays = {}
        for name, array in source.arrays.items():
            found = BLOCK.fullmatch(name)
            heads = chosen[int(found[1])] if found and name in axes else None
            arrays[name] = array if heads is None else np.take(array, heads, axis=axes[name])
        smaller = with_encoder(source.config, num_heads=kept, head_dim=encoder.head_width)
        return _pruned(source, smaller, arrays)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrunedLayers(Pruning):
    """One layer after the other goes, each time the one whose absence moves the queries least."""

    def compress(self, source: Source) -> CompressedModel:
        """See `Method`."""
        encoder = source.config.model.encoder
        kept, batches = self.kept(encoder.num_layers, "layers"), self.batches(source)
        inference = Inference(source.setup, source.state)
        before = _queries(inference, batches, inference.dense)
        layers, arrays = list(range(encoder.num_layers)), source.arrays
        while len(layers) > kept:
            smaller = with_encoder(source.config, num_layers=len(layers) - 1)
            setup = serving_setup(smaller, source.dataset, source.setup.mesh)
            tried = [without_layer(arrays, layer) for layer in range(len(layers))]
            asked = Inference(setup, state_of(setup, tried[0], source.step))
            dense = [state_of(setup, one, source.step).dense for one in tried]
            moved = [_distance(before, _queries(asked, batches, one)) for one in dense]
            least = int(np.argmin(moved))
            logger.info("layer %d goes: it moves the queries by %.4f", layers[least], moved[least])
            arrays, layers = tried[least], layers[:least] + layers[least + 1 :]
        return _pruned(source, with_encoder(source.config, num_layers=kept), arrays)


def head_axes(setup: Setup) -> dict[str, int]:
    """Of the parameters of the blocks that are cut by heads, the dim that counts them."""
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    variables = jax.tree.leaves(setup.step.abstract, is_leaf=is_variable)
    names = by_path(nnx.to_pure_dict(setup.step.abstract))
    axes = {}
    for name, variable in zip(names, variables, strict=True):
        logical = variable.get_metadata()["logical_axes"]
        if HEADS in logical and BLOCK.fullmatch(f"{DENSE}.{name}"):
            axes[f"{DENSE}.{name}"] = logical.index(HEADS)
    return axes


def without_layer(arrays: Mapping[str, Any], layer: int) -> Named:
    """The arrays of a model that lacks a layer; those above it move down."""
    left = {}
    for name, array in arrays.items():
        found = BLOCK.fullmatch(name)
        number = int(found[1]) if found else -1
        if found is None or number < layer:
            left[name] = array
        elif number > layer:
            left[f"{DENSE}.encoder.blocks.{number - 1}.{found[2]}"] = array
    return left


def write_run(workdir: Path, source: Source, config: TrainConfig, arrays: Mapping[str, np.ndarray]) -> None:
    """A workdir with a config and a checkpoint at step 0, which `init_from` takes."""
    setup = serving_setup(config, source.dataset, source.setup.mesh)
    fresh, placed = setup.init_state(), state_of(setup, arrays, 0)
    ema = fresh.ema
    if ema:
        ema = {"dense": placed.dense, "tables": {name: placed.tables[name] for name in fresh.ema["tables"]}}
    state = dataclasses.replace(
        fresh, dense=placed.dense, tables=placed.tables, memory=placed.memory, ema=jax.tree.map(jnp.copy, ema)
    )
    config = dataclasses.replace(config, cache_rows={}, init_from="", init_without=())
    write_run_config(workdir, config, data_fingerprint=source.dataset.metadata.fingerprint)
    with Checkpoints(str(workdir / "checkpoints"), keep=1, save_every_steps=1) as checkpoints:
        checkpoints.save(0, to_checkpoint(state, setup.tables, setup.mesh), force=True)


def _pruned(source: Source, config: TrainConfig, arrays: Mapping[str, np.ndarray]) -> CompressedModel:
    whole = dataclasses.replace(source, config=config)
    return whole.model({name: Plain.of(array) for name, array in arrays.items()})


def _queries(inference: Inference, batches: Iterable[EvaluationBatch], dense: Any) -> np.ndarray:
    parts = [
        np.asarray(inference.queries(batch, dense=dense)[0])[np.asarray(batch.user_indices) >= 0]
        for batch in batches
    ]
    return np.concatenate(parts)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean square of the change, relative to that of the queries."""
    return float(np.square(a - b).sum() / max(float(np.square(a).sum()), 1e-12))
