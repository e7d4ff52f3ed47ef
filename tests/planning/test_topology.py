"""Names of machines: what they mean, and what is told of those that mean nothing."""

import pytest

from jaxrec.core.chips import CHIPS, chip_of
from jaxrec.planning.topology import parse_topology, topology_mesh


@pytest.mark.parametrize(
    ("text", "chips", "devices"),
    [
        ("v5p:8x8x16", 1024, 1024),
        ("2*v6e:16x16", 512, 512),
        ("tpu7x:4x4x4", 64, 128),
        ("h100:1x32x8", 256, 256),
        ("cpu:8", 8, 8),
    ],
)
def test_a_name_says_how_many(text, chips, devices):
    topology = parse_topology(text)
    assert (topology.num_chips, topology.num_devices) == (chips, devices)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5p", r"'v5p' is not of the form \[SLICES\*\]CHIP:AxBxC"),
        ("v9:4x4", "the chip 'v9' is not one of v4, v5e"),
        ("v5e:0x4", "every size must be at least 1"),
        ("cpu:2x4", "a CPU has one size"),
    ],
)
def test_what_is_no_machine_is_told_so(text, message):
    with pytest.raises(ValueError, match=message):
        parse_topology(text)


def test_a_cpu_is_the_mesh_of_this_process():
    assert topology_mesh(parse_topology("cpu:8"), (2, -1)).shape == {"data": 2, "model": 4}
    with pytest.raises(
        ValueError, match="this process has 8 CPU devices; start it with JAXREC_CPU_DEVICES=4"
    ):
        topology_mesh(parse_topology("cpu:4"), (-1, 1))


def test_every_chip_has_its_peaks_and_their_source():
    for chip in CHIPS.values():
        assert min(chip.flops, chip.hbm_bytes, chip.hbm_rate, chip.link_rate, chip.network_rate) > 0
        assert chip.source.startswith("https://")
        assert chip_of(chip.kind) is chip
    assert chip_of("TPU v5 lite") is CHIPS["v5e"] and chip_of("cpu") is None
