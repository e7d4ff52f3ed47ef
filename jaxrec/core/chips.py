"""Published peaks of accelerators: the one table that utilisation and the planner's bounds are computed from.

Rates are of one chip (one GPU); a TPU7x chip has two devices. Interconnect rates are what a chip sends, all its links
together, in one direction, which is half of the "bidirectional" figure that Google prints; the network is what leaves
a slice or an NVLink domain.
"""

import dataclasses

GIB, GIGA, TERA = 2**30, 1e9, 1e12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator.

    Attributes:
      kind: how JAX names its devices.
      devices: JAX devices of a chip.
      flops: dense bfloat16 operations a second.
      hbm_bytes: capacity.
      hbm_rate: bytes a second.
      link_rate: bytes a second that the chip sends inside of a slice or of an NVLink domain.
      network_rate: bytes a second that the chip sends beyond it.
      domain: chips of one such domain; 0 = the slice, whatever its size.
      source: where the numbers are published.
    """

    kind: str
    devices: int = 1
    flops: float
    hbm_bytes: float
    hbm_rate: float
    link_rate: float
    network_rate: float
    domain: int = 0
    source: str

    @property
    def is_gpu(self) -> bool:
        """Whether it is planned for with the compiler for GPUs."""
        return self.kind.startswith("NVIDIA")

    @property
    def device_flops(self) -> float:
        """Of one JAX device."""
        return self.flops / self.devices

    @property
    def device_hbm_bytes(self) -> float:
        """Of one JAX device."""
        return self.hbm_bytes / self.devices


# The network of a pod over its chips where the page gives the pod's (v5e: 6.4 Tbit/s of 256, v6e: 25.6). The page of v4
# gives none, so it has v5e's; its links are those of Jouppi et al., ISCA 2023: six of 50 GB/s.
CHIPS: dict[str, Chip] = {
    "v4": Chip(
        kind="TPU v4", flops=275 * TERA, hbm_bytes=32 * GIB, hbm_rate=1200 * GIGA, link_rate=300 * GIGA,
        network_rate=3.1 * GIGA, source="https://docs.cloud.google.com/tpu/docs/v4",
    ),
    "v5e": Chip(
        kind="TPU v5 lite", flops=197 * TERA, hbm_bytes=16 * GIB, hbm_rate=819 * GIGA, link_rate=200 * GIGA,
        network_rate=3.1 * GIGA, source="https://docs.cloud.google.com/tpu/docs/v5e",
    ),
    "v5p": Chip(
        kind="TPU v5", flops=459 * TERA, hbm_bytes=95 * GIB, hbm_rate=2765 * GIGA, link_rate=600 * GIGA,
        network_rate=6.25 * GIGA, source="https://docs.cloud.google.com/tpu/docs/v5p",
    ),
    "v6e": Chip(
        kind="TPU v6 lite", flops=918 * TERA, hbm_bytes=32 * GIB, hbm_rate=1600 * GIGA, link_rate=400 * GIGA,
        network_rate=12.5 * GIGA, source="https://docs.cloud.google.com/tpu/docs/v6e",
    ),
    "tpu7x": Chip(
        kind="TPU7x", devices=2, flops=2307 * TERA, hbm_bytes=192 * GIB, hbm_rate=7380 * GIGA,
        link_rate=600 * GIGA, network_rate=12.5 * GIGA, source="https://docs.cloud.google.com/tpu/docs/tpu7x",
    ),
    "a100": Chip(
        kind="NVIDIA A100", flops=312 * TERA, hbm_bytes=80 * GIGA, hbm_rate=2039 * GIGA, link_rate=300 * GIGA,
        network_rate=25 * GIGA, domain=8, source="https://www.nvidia.com/en-us/data-center/a100/",
    ),
    "h100": Chip(
        kind="NVIDIA H100", flops=989 * TERA, hbm_bytes=80 * GIGA, hbm_rate=3350 * GIGA, link_rate=450 * GIGA,
        network_rate=50 * GIGA, domain=8, source="https://www.nvidia.com/en-us/data-center/h100/",
    ),
    "h200": Chip(
        kind="NVIDIA H200", flops=989 * TERA, hbm_bytes=141 * GIGA, hbm_rate=4800 * GIGA, link_rate=450 * GIGA,
        network_rate=50 * GIGA, domain=8, source="https://www.nvidia.com/en-us/data-center/h200/",
    ),
}  # fmt: skip


def chip_of(device_kind: str) -> Chip | None:
    """The chip whose devices JAX calls so, or None for one that the table lacks (a CPU)."""
    for chip in sorted(CHIPS.values(), key=lambda chip: -len(chip.kind)):
        if device_kind.startswith(chip.kind):
            return chip
    return None
