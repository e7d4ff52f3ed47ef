"""Devices of machines that are not there: `v5p:8x8x16`, `2*v6e:16x16`, `h100:1x32x8`, `cpu:8`."""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterator

from jax.experimental import topologies
from jax.sharding import Mesh

from jaxrec.core.chips import CHIPS, Chip
from jaxrec.core.mesh import device_count, make_mesh
from jaxrec.planning.gpu_targets import TARGETS, target_config

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

    @property
    def domain_devices(self) -> int:
        """Devices that the fast interconnect joins: those of a slice, or of an NVLink domain."""
        if self.chip and self.chip.is_gpu:
            return min(self.num_devices, self.chip.domain)
        return self.num_devices // self.slices


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
    if family in CHIPS and CHIPS[family].is_gpu and (len(shape) != 3 or slices):
        raise ValueError(
            f"topology {text!r}: GPUs are named by slices x hosts x GPUs of a host, such as {family}:1x32x8."
        )
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
    return make_mesh(mesh_shape, _devices(topology))


def _devices(topology: Topology) -> list:
    chip = topology.chip
    assert chip is not None, "the form was checked"
    sizes = "x".join(str(size) for size in topology.shape)
    try:
        if chip.is_gpu:
            config = target_config(TARGETS[topology.family])
            found = topologies.get_topology_desc(platform="cuda", target_config=config, topology=sizes)
        else:
            slices = {"num_slices": topology.slices} if topology.slices > 1 else {}
            with _environment(_NO_TPU_HERE):
                found = topologies.get_topology_desc(
                    platform="tpu", topology_name=f"{topology.family}:{sizes}", **slices
                )
    except (ImportError, NotImplementedError) as error:
        raise ValueError(_no_compiler(topology, chip, error)) from error
    except RuntimeError as error:
        missing = "not found" in str(error).lower() and "plugin" in str(error).lower()
        if missing or "Unable to initialize backend" in str(error):
            raise ValueError(_no_compiler(topology, chip, error)) from error
        raise ValueError(f"{topology.text}: the compiler does not know it ({_first_line(error)}).") from error
    by_slice = lambda device: (getattr(device, "slice_index", 0) or 0, device.id)  # noqa: E731
    return sorted(found.devices, key=by_slice)


def _no_compiler(topology: Topology, chip: Chip, error: Exception) -> str:
    extra = "plan-cuda" if chip.is_gpu else "plan-tpu"
    return (
        f"{topology.text}: no compiler for it is installed ({_first_line(error)}); "
        f"pip install 'jaxrec[{extra}]', or make install EXTRAS={extra}."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


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
