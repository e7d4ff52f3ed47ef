"""The reader of compiled programs, against small programs whose figures are worked by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxrec.core.mesh import ALL_AXES, make_mesh
from jaxrec.core.partition import sharding
from jaxrec.planning.hlo import Collective, Module, dims, nbytes
from jaxrec.planning.traffic import hbm_bytes


def module(function, *arguments, devices=8):
    return Module(jax.jit(function).lower(*arguments).compile().as_text(), devices)


def test_a_loop_body_counts_as_often_as_it_runs():
    def stacked(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    weights, x = jnp.ones((7, 32, 32)), jnp.ones((16, 32))
    assert module(stacked, weights, x).flops() == 7 * 2 * 16 * 32 * 32
    nested = lambda weights, x: jax.lax.fori_loop(0, 3, lambda _, x: stacked(weights, x), x)  # noqa: E731
    assert module(nested, weights, x).flops() == 3 * 7 * 2 * 16 * 32 * 32


def test_batched_products_count_every_batch():
    product = lambda a, b: jnp.einsum("bik,bkj->bij", a, b)  # noqa: E731
    assert module(product, jnp.ones((5, 8, 16)), jnp.ones((5, 16, 4))).flops() == 2 * 5 * 8 * 16 * 4


def test_collectives_of_a_hand_worked_case():
    mesh = make_mesh((2, 4))
    with jax.set_mesh(mesh):

        def local(x):
            def body(total, _):
                return jax.lax.psum(x + total, "model"), None

            total, _ = jax.lax.scan(body, jnp.zeros_like(x), length=5)
            swapped = jax.lax.all_to_all(x, ALL_AXES, 0, 0, tiled=True)
            return total + swapped, jax.lax.all_gather(x[:1], "data", tiled=True)

        step = jax.shard_map(
            local, in_specs=P(ALL_AXES), out_specs=(P(ALL_AXES), P(ALL_AXES)), check_vma=False
        )
        x = jax.device_put(np.ones((64, 16), np.float32), sharding(mesh, "batch"))
        found = {c.kind: c for c in module(step, x).collectives()}
    shard = 8 * 16 * 4
    assert (found["all-reduce"].result_bytes, found["all-reduce"].count, found["all-reduce"].group) == (
        shard,
        5,
        4,
    )
    assert found["all-reduce"].sent_bytes == 5 * 2 * shard * 3 / 4
    assert (found["all-to-all"].result_bytes, found["all-to-all"].group) == (shard, 8)
    assert found["all-to-all"].sent_bytes == shard * 7 / 8
    assert (found["all-gather"].result_bytes, found["all-gather"].group) == (2 * 16 * 4, 2)


def test_a_loop_that_ends_by_its_data_counts_none_of_its_further_rounds():
    def until(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1.0, lambda x: x @ x, x)

    assert module(until, jnp.ones((8, 8))).flops() == 0


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-reduce", 150),
        ("all-gather", 75),
        ("reduce-scatter", 300),
        ("all-to-all", 75),
        ("collective-permute", 100),
    ],
)
def test_bytes_sent_by_each_kind(kind, sent):
    assert Collective(kind, 100, 1, 4, "").sent_bytes == sent
    assert Collective(kind, 100, 3, 4, "").sent_bytes == 3 * sent


def test_shapes():
    assert dims("bf16[8,256]{1,0:T(8,128)(2,1)}") == [8, 256]
    assert nbytes("(f32[2,3]{1,0}, s32[], bf16[4]{0})") == 24 + 4 + 8
    assert functools.reduce(lambda a, b: a * b, dims("pred[]"), 1) == 1


GPU = """
ENTRY %main (p: f32[4,8]) -> f32[2,16,32] {
  %p = f32[2,64,16]{2,1,0} parameter(0)
  %q = f32[2,64,32]{2,1,0} parameter(1), metadata={op_name="jit(f)/exchange/take"}
  %gemm = (f32[2,16,32]{1,2,0}, s8[64]{0}) custom-call(%p, %q), custom_call_target="__cublas$lt$matmul", DIMS
  %s = ((f32[2,64,32]{2,1,0}), f32[1,64,32]{2,1,0}) reduce-scatter-start(%q), replica_groups={{0,1},{2,3}}
  ROOT %d = f32[1,64,32]{2,1,0} reduce-scatter-done(%s)
}
"""


def test_a_gpus_library_calls_and_asynchronous_collectives():
    dims = (
        '"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"]'
    )
    found = Module(GPU.replace("DIMS", dims), 4)
    assert found.flops() == 2 * (2 * 16 * 32) * 64
    (scatter,) = found.collectives()
    assert (scatter.kind, scatter.result_bytes, scatter.members) == ("reduce-scatter", 64 * 32 * 4, (0, 1))
    assert scatter.source == "jit(f)/exchange/take", "the operand's, where the collective has none"


def test_a_slice_reads_what_it_gives():
    text = """HloModule m

ENTRY %main (p: f32[11,64]) -> f32[1,64] {
  %p = f32[11,64]{1,0} parameter(0)
  %whole = f32[2,64]{1,0} slice(%p), slice={[0:2], [0:64]}
  %start = ((f32[11,64]{1,0}), f32[1,64]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) slice-start(%p), slice={[0:1], [0:64]}
  ROOT %done = f32[1,64]{1,0:T(8,128)S(1)} slice-done(%start)
}
"""
    # The second lands in fast memory: it is read alone.
    assert hbm_bytes(Module(text, 1)) == {"slice": 2 * 2 * 64 * 4 + 64 * 4}
