"""Properties of GPUs in the form in which XLA's compiler for them is told of a GPU that is not there.

The figures are facts of the devices, read from openxla/xla (Apache-2.0), xla/backends/gpu/target_config/specs:
`a100_sxm_80.txtpb`, `h100_sxm.txtpb`, `h200.txtpb`; the form is its `GpuTargetConfigProto`.
"""

import dataclasses

DNN = (9, 10, 0)  # what XLA's own files say of cuDNN
BLOCK_LIMITS = {"block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535}
THREAD_LIMITS = {"thread_dim_limit_x": 1024, "thread_dim_limit_y": 1024, "thread_dim_limit_z": 64}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuTarget:
    """One GPU.

    Attributes:
      capability: compute capability (major, minor).
      accelerated: whether code for exactly this architecture may be made (sm_90a).
      cores: streaming multiprocessors; `core_shared_bytes` is the shared memory of one, `block_shared_bytes` what a
        block may ask for.
      memory_rate: bytes a second.
    """

    name: str
    capability: tuple[int, int]
    accelerated: bool
    cores: int
    units_per_core: int
    clock_ghz: float
    memory_bytes: int
    memory_rate: int
    cache_bytes: int
    core_shared_bytes: int
    block_shared_bytes: int


TARGETS = {
    "a100": GpuTarget(
        name="NVIDIA A100-SXM4-80GB", capability=(8, 0), accelerated=False, cores=108, units_per_core=64,
        clock_ghz=1.41, memory_bytes=85_100_068_864, memory_rate=2_039_040_000_000, cache_bytes=41_943_040,
        core_shared_bytes=167_936, block_shared_bytes=166_912,
    ),
    "h100": GpuTarget(
        name="NVIDIA H100 80GB HBM3", capability=(9, 0), accelerated=True, cores=132, units_per_core=128,
        clock_ghz=1.98, memory_bytes=84_942_979_072, memory_rate=3_352_320_000_000, cache_bytes=52_428_800,
        core_shared_bytes=233_472, block_shared_bytes=232_448,
    ),
    "h200": GpuTarget(
        name="NVIDIA H200 141GB HBM3e", capability=(9, 0), accelerated=True, cores=132, units_per_core=128,
        clock_ghz=1.98, memory_bytes=151_397_597_184, memory_rate=4_800_000_000_000, cache_bytes=52_428_800,
        core_shared_bytes=233_472, block_shared_bytes=232_448,
    ),
}  # fmt: skip


def target_config(target: GpuTarget) -> str:
    """The text of XLA's `GpuTargetConfigProto` for a GPU."""
    major, minor = target.capability
    device: dict[str, object] = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": target.core_shared_bytes,
        "threads_per_core_limit": 2048,
        "core_count": target.cores,
        "fpus_per_core": target.units_per_core,
        **BLOCK_LIMITS,
        "memory_bandwidth": target.memory_rate,
        "l2_cache_size": target.cache_bytes,
        "clock_rate_ghz": target.clock_ghz,
        "device_memory_size": target.memory_bytes,
        "shared_memory_per_block_optin": target.block_shared_bytes,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        **THREAD_LIMITS,
    }
    lines = [f"  {name}: {value}" for name, value in device.items()]
    feature = "    feature_extension: ACCELERATED_FEATURES\n" if target.accelerated else ""
    capability = f"  cuda_compute_capability {{\n    major: {major}\n    minor: {minor}\n{feature}  }}"
    dnn = "".join(
        f"  {part}: {value}\n" for part, value in zip(("major", "minor", "patch"), DNN, strict=True)
    )
    return (
        "gpu_device_info {\n" + "\n".join([*lines, capability]) + "\n}\n"
        'platform_name: "CUDA"\n'
        f"dnn_version_info {{\n{dnn}}}\n"
        f'device_description_str: "{target.name}"\n'
    )
