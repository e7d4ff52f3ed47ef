"""The real train step, compiled for a machine that need not be there.

B = packed rows of the global batch, L = positions of a row, K = behaviours.
"""

import dataclasses
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrec.config import TrainConfig, validate
from jaxrec.config.setup import setup_of
from jaxrec.core.batch import Batch
from jaxrec.core.mesh import resolve_shape
from jaxrec.core.partition import LAYOUTS, sharding
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.prepare import is_prepared, prepare
from jaxrec.data.synthetic import SyntheticEvents
from jaxrec.planning.hlo import Module
from jaxrec.planning.topology import Topology, topology_mesh
from jaxrec.tasks.base import DataFacts
from jaxrec.training.setup import Setup, dataset_facts
from jaxrec.training.state import TrainState
from jaxrec.training.step import make_train_step

# What a program may take of a GPU's memory: the driver, the CUDA context and NCCL's buffers take the rest. A TPU's
# compiler knows its own reserve and refuses what does not fit.
GPU_USABLE = 0.94
MAX_ID = 2**31 - 2  # ids of a batch are int32
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class OutOfMemoryError(Exception):
    """The step does not fit.

    Attributes:
      needed, capacity: bytes of one device; `needed` may leave out what the compiler never came to.
    """

    def __init__(self, needed: float, capacity: float):
        super().__init__(f"needs {needed / 2**30:.2f} GiB of {capacity / 2**30:.2f} GiB a device")
        self.needed, self.capacity = needed, capacity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is to be compiled.

    Attributes:
      config: its `mesh_shape` and `global_batch_size` fit the topology.
    """

    config: TrainConfig
    topology: Topology
    facts: DataFacts

    @property
    def rows_per_chip(self) -> float:
        """Packed rows of the batch on one chip."""
        return self.config.global_batch_size / self.topology.num_chips

    def with_rows(self, rows_per_chip: int) -> "Case":
        """The case with another batch."""
        rows = rows_per_chip * self.topology.num_chips
        return dataclasses.replace(self, config=dataclasses.replace(self.config, global_batch_size=rows))

    def with_tables(self, scale: float) -> "Case":
        """The case with `scale` times the items and users."""
        items, users = (max(1, int(n * scale)) for n in (self.facts.num_items, self.facts.num_users))
        facts = dataclasses.replace(self.facts, num_items=items, num_users=users, item_counts=None)
        return dataclasses.replace(self, facts=facts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled step.

    Attributes:
      module: its text, read.
      argument_bytes, temporary_bytes, other_bytes: of one device; `other` is code and outputs that take no argument's
        place.
      seconds: that lowering and compiling took.
    """

    case: Case
    setup: Setup
    state: TrainState
    batch: Batch
    module: Module
    argument_bytes: int
    temporary_bytes: int
    other_bytes: int
    seconds: float

    @property
    def total_bytes(self) -> int:
        """Of one device."""
        return self.argument_bytes + self.temporary_bytes + self.other_bytes


def plan_facts(config: TrainConfig, given: str = "") -> DataFacts:
    """What the step has to know of the data, without reading them where that can be helped.

    Args:
      given: a prepared dataset's directory, or a JSON file with `num_items`, `num_users` and maybe `behaviours` and
        `domains`.

    Raises:
      ValueError: neither the config nor `given` tells.
    """
    source = config.data.source
    if given:
        path = Path(given)
        if is_prepared(path):
            return dataset_facts(PreparedDataset.open(path))
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return DataFacts(
                name=path.stem, num_items=int(found["num_items"]), num_users=int(found["num_users"]),
                behaviours=tuple(found.get("behaviours", ())), item_counts=None,
                num_text_tokens=config.data.text.max_tokens, domains=tuple(found.get("domains", ())),
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--facts={given} is neither a prepared dataset nor a JSON file with num_items and num_users "
                f"({type(error).__name__}: {error})."
            ) from error
    if isinstance(source, SyntheticEvents):
        return DataFacts(
            name=source.name, num_items=source.num_items, num_users=source.num_users, behaviours=(),
            item_counts=None, num_text_tokens=config.data.text.max_tokens,
        )  # fmt: skip
    if config.data.path and is_prepared(Path(config.data.path)):
        return dataset_facts(PreparedDataset.open(Path(config.data.path)))
    if source is None and not config.data.path:  # the data set in this package: seconds
        with tempfile.TemporaryDirectory(prefix="jaxrec-plan-") as directory:
            prepare(config.data, Path(directory))
            return dataset_facts(PreparedDataset.open(Path(directory)))
    raise ValueError(
        f"the config does not tell how many items and users its data have (data.path={config.data.path!r}); "
        "prepare them (python -m jaxrec.prepare) and give the directory with --facts=DIR, or give a JSON file with "
        "num_items and num_users."
    )


def make_case(
    config: TrainConfig, topology: Topology, facts: DataFacts, rows_per_chip: int | None = None
) -> Case:
    """Fits the config to the machine: the batch by `rows_per_chip`, the mesh where FSDP would not divide.

    Raises:
      ValueError: config and machine do not go together; says the value, the constraint and the remedy.
    """
    devices = topology.num_devices
    if rows_per_chip is not None:
        if rows_per_chip * topology.num_chips % devices or rows_per_chip < 1:
            raise ValueError(
                f"--rows-per-chip={rows_per_chip} must be a positive multiple of the {devices // topology.num_chips} "
                f"devices of a chip of {topology.text}."
            )
        config = dataclasses.replace(config, global_batch_size=rows_per_chip * topology.num_chips)
    config = dataclasses.replace(config, mesh_shape=fitting_mesh(config, devices))
    if config.global_batch_size % devices and rows_per_chip is None:
        raise ValueError(
            f"global_batch_size={config.global_batch_size} does not divide over the {devices} devices of "
            f"{topology.text}; give --rows-per-chip=N, which sets it to N x {topology.num_chips}."
        )
    validate(config, devices)
    return Case(config=config, topology=topology, facts=facts)


def fitting_mesh(config: TrainConfig, devices: int) -> tuple[int, int]:
    """The config's mesh; under FSDP, as many devices along `data` as divide the width, the others along `model`."""
    shape, width = config.mesh_shape, config.model.encoder.embed_dim
    if -1 not in shape or LAYOUTS[config.model.encoder.layout]["embed"] is None:
        return shape
    data, model = resolve_shape(shape, devices)
    if width % data == 0:
        return data, model
    data = max(size for size in range(1, devices + 1) if devices % size == 0 and width % size == 0)
    return data, devices // data


def compile_step(case: Case) -> Program:
    """Compiles the case's train step.

    Raises:
      ValueError: config, data and machine do not go together, or no compiler for the machine is installed.
      OutOfMemoryError: it does not fit.
    """
    started = time.perf_counter()
    mesh = topology_mesh(case.topology, case.config.mesh_shape)
    setup = setup_of(case.config, case.facts, mesh)
    state, batch = setup.abstract_state(), abstract_batch(case, mesh)
    chip = case.topology.chip
    capacity = chip.device_hbm_bytes * (GPU_USABLE if chip.is_gpu else 1.0) if chip else float("inf")
    arguments = sum(device_argument_bytes(leaf) for leaf in jax.tree.leaves((state, batch)))
    if arguments > capacity:  # no need to ask the compiler
        raise OutOfMemoryError(arguments, capacity)
    step: Any = make_train_step(setup.step, state, mesh)
    with jax.set_mesh(mesh):
        lowered = step.lower(state, batch)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            raise _out_of_memory(error, capacity) from error
    memory = compiled.memory_analysis()
    program = Program(
        case=case,
        setup=setup,
        state=state,
        batch=batch,
        module=Module(compiled.as_text(), mesh.size),
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        other_bytes=max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
        + memory.generated_code_size_in_bytes,
        seconds=time.perf_counter() - started,
    )
    if program.total_bytes > capacity:
        raise OutOfMemoryError(program.total_bytes, capacity)
    return program


def abstract_batch(case: Case, mesh: Mesh) -> Batch:
    """Shapes and shardings of a global batch."""
    rows, length = case.config.global_batch_size, case.config.data.history_length
    return case.facts.abstract_batch(rows, length, sharding(mesh, "batch"))


def device_argument_bytes(leaf: Any) -> int:
    """Bytes of an abstract array on one device, without padding."""
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize


def _out_of_memory(error: Exception, capacity: float) -> Exception:
    """The compiler's refusal as ours, or the error itself where it is another."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        return error
    found = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?)", text)
    if not found:
        return OutOfMemoryError(float("nan"), capacity)
    used, used_unit, limit, limit_unit = found.groups()
    return OutOfMemoryError(float(used) * _UNITS[used_unit], float(limit) * _UNITS[limit_unit])
