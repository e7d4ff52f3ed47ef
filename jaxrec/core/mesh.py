"""The device mesh: the only room that asks JAX which devices there are.

Axes: `data` and `model`. The encoder is data-parallel over both; table rows lie over both.
"""

import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

DATA, MODEL = "data", "model"
ALL_AXES = (DATA, MODEL)
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def make_mesh(shape: tuple[int, int] = (-1, 1), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the `(data, model)` mesh.

    Args:
      shape: devices along each axis; one of the two may be -1 and is inferred.
      devices: taken in this order; None = all of all processes, in the order that suits their links.

    Raises:
      ValueError: the shape does not cover the devices.
    """
    axis_types = (AxisType.Auto,) * len(ALL_AXES)
    if devices is None:
        return jax.make_mesh(resolve_shape(shape, jax.device_count()), ALL_AXES, axis_types=axis_types)
    array = np.array(devices).reshape(resolve_shape(shape, len(devices)))
    return Mesh(array, ALL_AXES, axis_types=axis_types)


def resolve_shape(shape: tuple[int, int], num_devices: int) -> tuple[int, int]:
    """Replaces the -1 of `shape` by what `num_devices` leaves for it."""
    if len(shape) != 2 or shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise ValueError(
            f"mesh_shape={shape} must be two positive sizes (data, model), one of which may be -1."
        )
    data, model = shape
    if data == -1:
        data = num_devices // model
    if model == -1:
        model = num_devices // data
    if data * model != num_devices:
        raise ValueError(
            f"mesh_shape={shape} does not cover the {num_devices} devices; "
            f"use (-1, {model if num_devices % model == 0 else 1}), which always fits."
        )
    return data, model


def device_kind() -> str:
    """Name of the accelerator, e.g. `cpu`, `TPU v5p`, `NVIDIA H100`."""
    return jax.devices()[0].device_kind


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: of the mesh in use, which need not be of this machine (the planner's is not)."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.devices()[0].platform


def repeats_bits() -> bool:
    """Whether a program gives the same bits each time here; a GPU's does where `DETERMINISTIC` is set."""
    return platform() != "gpu" or DETERMINISTIC in os.environ.get("XLA_FLAGS", "").split()


def device_count() -> int:
    """Devices of all processes."""
    return jax.device_count()


def peak_memory_bytes() -> int | None:
    """Peak bytes in use on the first local device, or None where the platform does not say (CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    return None if not stats else stats.get("peak_bytes_in_use")


def initialize_platform() -> None:
    """Starts `jax.distributed` where it was asked for or where the launcher shows that it is needed.

    Asked for: `JAXREC_COORDINATOR=host:port`, `JAXREC_NUM_PROCESSES` and `JAXREC_PROCESS_ID`, or
    `JAXREC_DISTRIBUTED=1` (JAX finds the rest: Cloud TPU, Slurm, MPI). Detected: a Cloud TPU VM whose slice
    has several workers. `JAXREC_CPU_DEVICES=n` splits the host into `n` virtual CPU devices.
    """
    if cpu_devices := os.environ.get("JAXREC_CPU_DEVICES"):
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", _positive_int("JAXREC_CPU_DEVICES", cpu_devices))
    coordinator = os.environ.get("JAXREC_COORDINATOR")
    if coordinator:
        names = ("JAXREC_NUM_PROCESSES", "JAXREC_PROCESS_ID")
        missing = [name for name in names if name not in os.environ]
        if missing:
            raise ValueError(
                f"JAXREC_COORDINATOR={coordinator} is set, so {' and '.join(missing)} must be set too."
            )
        if os.environ.get("JAXREC_CPU_DEVICES"):
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            coordinator,
            num_processes=_positive_int(names[0], os.environ[names[0]]),
            process_id=int(os.environ[names[1]]),
        )
    elif os.environ.get("JAXREC_DISTRIBUTED") == "1" or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()


def _positive_int(name: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{name}={text!r} must be a positive whole number.")
    return int(text)
