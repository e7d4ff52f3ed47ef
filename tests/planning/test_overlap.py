"""What a schedule hides, on schedules written by hand: 1,024 x 1,024 floats over the four chips of a v5p:2x2x1."""

import types

import pytest

from jaxrec.planning.hlo import Module
from jaxrec.planning.overlap import measure_overlap
from jaxrec.planning.topology import parse_topology

SQUARE = "f32[1024,1024]{1,0}"
START = f"({SQUARE}, {SQUARE}) all-to-all-start(%p), replica_groups={{{{0,1,2,3}}}}"
DOT = f"{SQUARE} dot(%p, %p), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"
IN_EXCHANGE = 'metadata={op_name="jit(f)/exchange/all_to_all"}'
SENT = 4 * 2**20 * 3 / 4
# Six links of 100 GB/s; half of the bytes cross the middle of a side of two: 400 GB/s.
SHARE = (2 * 1024**3 / 459e12) / (SENT / 400e9)


def overlap(*lines, before=""):
    body = "\n".join(f"  {line}" for line in (f"%p = {SQUARE} parameter(0)", *lines))
    text = f"{before}\nENTRY %main (p: {SQUARE}) -> {SQUARE} {{\n{body}\n}}\n"
    config = types.SimpleNamespace(mesh_shape=(4, 1))
    case = types.SimpleNamespace(topology=parse_topology("v5p:2x2x1"), config=config)
    return measure_overlap(types.SimpleNamespace(module=Module(text, 4), case=case))


def test_a_product_hides_what_it_lasts():
    found = overlap(
        f"%s = {START}, {IN_EXCHANGE}",
        f"%dot = {DOT}",
        f"%d = {SQUARE} all-to-all-done(%s)",
        f"ROOT %r = {SQUARE} all-reduce(%d), replica_groups={{{{0,1,2,3}}}}",
    )
    assert found["exchange"].sent == found["exchange"].asynchronous == SENT
    assert found["exchange"].behind_products == pytest.approx(SENT * SHARE)
    assert found["exchange"].behind_kernels == pytest.approx(SENT * SHARE), "it is bound by its operations"
    assert (
        found["dense"].sent == 2 * SENT and found["dense"].behind_kernels == found["dense"].asynchronous == 0
    )


def test_what_has_arrived_before_the_product_is_not_hidden_by_it():
    found = overlap(f"%s = {START}", f"%d = {SQUARE} all-to-all-done(%s)", f"ROOT %dot = {DOT}")["dense"]
    assert found.asynchronous == SENT and found.behind_kernels == 0


def test_no_product_is_counted_twice_and_the_oldest_goes_first():
    lines = [f"%s{i} = {START}" for i in range(3)]
    dots = [f"%dot{i} = {DOT}" for i in range(2)]
    done = [f"%d{i} = {SQUARE} all-to-all-done(%s{i})" for i in range(3)]
    one = overlap(lines[0], *dots, done[0])["dense"]
    assert one.behind_products == SENT, "two products last longer than one collective"
    assert overlap(*lines, *dots, *done)["dense"].behind_products == pytest.approx(2 * SHARE * SENT)


def test_a_loops_rounds_count_and_what_its_data_end_does_not():
    body = f"""
%body (q: {SQUARE}) -> {SQUARE} {{
  %p = {SQUARE} parameter(0)
  %s = {START}
  %dot = {DOT}
  ROOT %d = {SQUARE} all-to-all-done(%s)
}}
"""
    loop = f"{SQUARE} while(%p), condition=%c, body=%body"
    known = 'backend_config={"known_trip_count":{"n":"5"}}'
    inside = overlap(f"ROOT %w = {loop}, {known}", before=body)["dense"]
    assert (inside.sent, inside.behind_products) == (5 * SENT, pytest.approx(5 * SENT * SHARE))
    around = overlap(
        f"%s = {START}", f"%w = {loop}, {known}", f"%d = {SQUARE} all-to-all-done(%s)", before=body
    )
    assert around["dense"].behind_products == pytest.approx(SENT + 5 * SENT * SHARE)
    assert overlap(f"ROOT %w = {loop}", before=body) == {}


def test_a_wrapped_collective_is_matched_through_its_update():
    wrapped = f"""
%wrapped (q: {SQUARE}) -> {SQUARE} {{
  %p = {SQUARE} parameter(0)
  ROOT %a = {SQUARE} all-to-all(%p), replica_groups={{{{0,1,2,3}}}}, {IN_EXCHANGE}
}}
"""
    kind = f"(({SQUARE}), {SQUARE}, u32[])"
    found = overlap(
        f"%s = {kind} async-start(%p), calls=%wrapped",
        f"%u = {kind} async-update(%s)",
        f"%dot = {DOT}",
        f"ROOT %d = {SQUARE} async-done(%u)",
        before=wrapped,
    )["exchange"]
    assert found.sent == SENT and found.behind_products == pytest.approx(SENT * SHARE)


def test_a_machine_without_published_peaks_has_no_figure():
    case = types.SimpleNamespace(topology=parse_topology("cpu:8"))
    assert measure_overlap(types.SimpleNamespace(case=case)) is None
