"""Devices of machines that are not there: `v5p:8x8x16`, `2*v6e:16x16`, `h100:1x32x8`, `cpu:8`."""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterator

import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from jaxrec.core.mesh import ALL_AXES, device_count, make_mesh, resolve_shape
from jaxrec.planning.chips import CHIPS, Chip

_FORM = re.compile(r"^(?:(\d+)\*)?([a-z][a-z0-9]*):(\d+(?:x\d+)*)$")
# XLA's TPU compiler asks the environment for a host; these answer for one that has no TPU, and keep it quiet.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """A machine, by name.

    Attributes:
      text: as it was given.
      family: a key of `chips.CHIPS`, or "cpu".
      shape: chips along each axis of a slice; for GPUs (slices, hosts, GPUs of a host).
      slices: how many of them.
    """

    text: str
    family: str
    shape: tuple[int, ...]
    slices: int

    @property
    def chip(self) -> Chip | None:
        """Its peaks; None for a CPU, which has no published ones."""
        return CHIPS.get(self.family)

    @property
    def num_chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def num_devices(self) -> int:
        """JAX devices of all slices."""
        return self.num_chips * (self.chip.devices if self.chip else 1)


def parse_topology(text: str) -> Topology:
    """Reads a topology's name.

    Raises:
      ValueError: not of the form, or a chip that the table of peaks lacks.
    """
    found = _FORM.match(text.strip().lower())
    if not found:
        raise ValueError(
            f"topology {text!r} is not of the form [SLICES*]CHIP:AxBxC, such as v5p:8x8x16, 2*v6e:16x16, h100:1x32x8 "
            "or cpu:8."
        )
    slices, family, sizes = found.groups()
    if family != "cpu" and family not in CHIPS:
        raise ValueError(f"topology {text!r}: the chip {family!r} is not one of {', '.join(CHIPS)}, cpu.")
    shape = tuple(int(size) for size in sizes.split("x"))
    if 0 in shape:
        raise ValueError(f"topology {text!r}: every size must be at least 1.")
    if family == "cpu" and len(shape) > 1:
        raise ValueError(f"topology {text!r}: a CPU has one size, its virtual devices, such as cpu:8.")
    return Topology(text=text, family=family, shape=shape, slices=int(slices or 1))


def topology_mesh(topology: Topology, mesh_shape: tuple[int, int]) -> Mesh:
    """The `(data, model)` mesh over the devices of a machine that need not be there.

    Raises:
      ValueError: the compiler for it is not installed, or does not know the shape.
    """
    if topology.family == "cpu":
        if device_count() != topology.num_devices:
            raise ValueError(
                f"{topology.text}: this process has {device_count()} CPU devices; start it with "
                f"JAXREC_CPU_DEVICES={topology.num_devices}."
            )
        return make_mesh(mesh_shape)
    devices = _devices(topology)
    shape = resolve_shape(mesh_shape, len(devices))
    return Mesh(np.array(devices).reshape(shape), ALL_AXES, axis_types=(AxisType.Auto,) * 2)


def _devices(topology: Topology) -> list:
    chip = topology.chip
    assert chip is not None, "the form was checked"
    tpu = not chip.kind.startswith("NVIDIA")
    sizes = "x".join(str(size) for size in topology.shape)
    slices = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        with _environment(_NO_TPU_HERE if tpu else {}):
            if not tpu:
                raise ValueError(f"{topology.text}: GPUs cannot be planned for yet; name a TPU or cpu:N.")
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{topology.family}:{sizes}", **slices
            )
    except ImportError as error:
        raise ValueError(
            f"{topology.text}: no compiler for it is installed ({error}); pip install 'jaxrec[plan-tpu]'."
        ) from error
    except RuntimeError as error:
        raise ValueError(f"{topology.text}: the compiler does not know it ({error}).") from error
    return list(found.devices)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: value for name, value in values.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
