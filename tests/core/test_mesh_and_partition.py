"""The mesh and the logical-axis table."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from jaxrec.core import mesh as mesh_module
from jaxrec.core.mesh import (
    ALL_AXES,
    DETERMINISTIC,
    initialize_platform,
    make_mesh,
    repeats_bits,
    resolve_shape,
)
from jaxrec.core.partition import RULES, sharding, spec
from jaxrec.core.precision import compute_dtype


@pytest.mark.parametrize(
    ("shape", "expected"), [((-1, 1), (8, 1)), ((2, -1), (2, 4)), ((-1, 8), (1, 8)), ((8, 1), (8, 1))]
)
def test_minus_one_takes_what_the_other_axis_leaves(shape, expected):
    assert resolve_shape(shape, 8) == expected
    assert tuple(make_mesh(shape).shape.values()) == expected


@pytest.mark.parametrize("shape", [(-1, -1), (0, 8), (3, -1), (4, 4), (-1, 3)])
def test_a_shape_that_does_not_cover_the_devices_names_itself(shape):
    with pytest.raises(ValueError, match=r"mesh_shape="):
        resolve_shape(shape, 8)


def test_an_unknown_logical_axis_is_an_error_and_never_replicates():
    with pytest.raises(ValueError, match="'rows'"):
        spec("rows")
    assert spec("row", None) == P(ALL_AXES, None)
    assert all(RULES[name] in (ALL_AXES, None) for name in RULES)


def test_batch_and_rows_lie_over_every_device(mesh):
    array = jax.device_put(jax.numpy.zeros((16, 2)), sharding(mesh, "batch", None))
    assert len({shard.device for shard in array.addressable_shards}) == 8
    assert {shard.data.shape for shard in array.addressable_shards} == {(2, 2)}


@pytest.mark.parametrize(
    ("platform", "flags", "repeats"),
    [
        ("cpu", "", True),
        ("tpu", "", True),
        ("gpu", "", False),
        ("gpu", f"--xla_dump_to=/x {DETERMINISTIC}", True),
        ("gpu", DETERMINISTIC.replace("true", "false"), False),
    ],
)
def test_a_gpu_repeats_its_bits_where_the_flag_is_set(monkeypatch, platform, flags, repeats):
    monkeypatch.setattr(mesh_module, "platform", lambda: platform)
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert repeats_bits() is repeats


def test_distributed_start_asks_for_what_is_missing(monkeypatch):
    monkeypatch.setenv("JAXREC_COORDINATOR", "127.0.0.1:1")
    monkeypatch.delenv("JAXREC_NUM_PROCESSES", raising=False)
    with pytest.raises(ValueError, match="JAXREC_NUM_PROCESSES and JAXREC_PROCESS_ID"):
        initialize_platform()


def test_number_of_virtual_devices_must_be_positive(monkeypatch):
    monkeypatch.setenv("JAXREC_CPU_DEVICES", "none")
    with pytest.raises(ValueError, match="JAXREC_CPU_DEVICES='none'"):
        initialize_platform()


def test_float16_activations_are_refused():
    with pytest.raises(ValueError, match="dtype='float16'"):
        compute_dtype("float16")
