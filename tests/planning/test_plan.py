"""The planner on the eight CPU devices of the tests, and its arithmetic against figures worked by hand."""

import dataclasses
import json
import math
import os

import jax
import pytest

from jaxrec import plan
from jaxrec.config import load_config
from jaxrec.config.setup import setup_of
from jaxrec.core.chips import CHIPS
from jaxrec.core.mesh import make_mesh
from jaxrec.embedding.engine import Exchange
from jaxrec.embedding.exchange import round_capacity
from jaxrec.planning.gpu_targets import TARGETS, target_config
from jaxrec.planning.hlo import Collective, device_bytes
from jaxrec.planning.liveness import peak
from jaxrec.planning.program import (
    MAX_ID,
    OutOfMemoryError,
    compile_step,
    fitting_mesh,
    make_case,
    plan_facts,
)
from jaxrec.planning.roofline import EXCHANGE, all_to_all_rate, axis_of, make_link, measure_work
from jaxrec.planning.search import largest_batch, largest_tables, smaller_batch
from jaxrec.planning.topology import parse_topology

ROWS, LENGTH = 2, 16
SMALL = [
    "--config.model.encoder.num_layers=3", "--config.model.encoder.embed_dim=32", "--config.model.encoder.mlp_dim=64",
    "--config.model.encoder.num_heads=2", f"--config.data.history_length={LENGTH}", f"--rows-per-chip={ROWS}",
    "--config.model.item_dim=32",
]  # fmt: skip


@pytest.fixture
def config(repository, monkeypatch):
    monkeypatch.chdir(repository)
    base = load_config("configs/web_scale_cpu.py")
    encoder = dataclasses.replace(base.model.encoder, num_layers=3, embed_dim=32, mlp_dim=64, num_heads=2)
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, history_length=LENGTH),
        model=dataclasses.replace(base.model, encoder=encoder, item_dim=32, user_dim=16),
    )


def case_of(config, topology="cpu:8", rows=ROWS):
    return make_case(config, parse_topology(topology), plan_facts(config), rows)


def test_the_abstract_state_is_the_state(config, mesh):
    """Shapes, types and places: the planner compiles what the run compiles."""
    small = dataclasses.replace(plan_facts(config), num_items=999, num_users=500)
    for layout in ("replicated", "fsdp"):
        encoder = dataclasses.replace(config.model.encoder, layout=layout)
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, encoder=encoder))
        case = dataclasses.replace(case_of(changed), facts=small)
        setup = setup_of(case.config, case.facts, mesh)
        real, abstract = setup.init_state(), setup.abstract_state()
        assert jax.tree.structure(real) == jax.tree.structure(abstract)
        for one, other in zip(jax.tree.leaves(real), jax.tree.leaves(abstract), strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


def test_exchange_bytes_of_a_step_are_those_worked_by_hand(config, monkeypatch):
    # As users compile it: without emitters (tests/conftest.py) a scatter is a loop, which the replay takes for copies.
    flag = "xla_cpu_use_fusion_emitters"
    options = {flag: True} if flag in os.environ["XLA_FLAGS"] else None
    monkeypatch.setattr(Exchange, "compiler_options", lambda exchange, platform: options)
    program = compile_step(case_of(config))
    work = measure_work(program)
    swapped = sum(
        link.device_bytes
        for link in work.links
        if link.part == EXCHANGE and link.collective.kind == "all-to-all"
    )
    by_hand = 0
    events, negatives, devices = ROWS * LENGTH, 512 // 8, 8
    # Items are looked up as events, as targets and as shared negatives, users as events; dims 32 and 16.
    for ids, dim in ((2 * events + negatives, 32), (events, 16)):
        cells = devices * round_capacity_on(devices, ids)
        # Ids to their owners and rows back, ids and gradients to the owners; a block in eight stays at home.
        by_hand += 2 * (4 * cells + 4 * dim * cells) * (devices - 1) // devices
    assert swapped == by_hand
    assert work.sent(axis="data") == work.sent()
    assert work.compiled_flops == pytest.approx(work.formula_flops, rel=0.03)
    assert work.compiled_flops > work.model_flops
    replayed = sum(buffer.num_bytes for buffer in peak(program.module))
    assert 0.5 < replayed / program.temporary_bytes < 1.5


def round_capacity_on(devices, ids):
    return round_capacity(ids, devices)


def test_the_entry_writes_what_it_prints(repository, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(repository)
    arguments = [
        "--config=configs/web_scale_cpu.py",
        "--topology=cpu:8",
        "--scaling",
        "cpu:8",
        *SMALL,
        f"--out={tmp_path}",
    ]
    assert plan.main(arguments) == 0
    assert "memory a chip" in capsys.readouterr().out
    values = json.loads((tmp_path / "plan.json").read_text())
    (found,) = values["plans"]
    assert found["fits"] and found["global_batch_size"] == 8 * ROWS
    assert sum(found["memory"]["bytes_by_kind"].values()) == pytest.approx(found["memory"]["total_bytes"])
    assert found["memory"]["bytes_by_kind"]["table item"] == 125_001 * 32 * 4
    assert found["bound"] is None, "a CPU has no published peaks"
    assert values["scaling"][0]["topology"] == "cpu:8"
    page = (tmp_path / "plan.html").read_text()
    assert page.count("<svg") == page.count("</svg>") >= 2 and "web_scale_cpu" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v9:4x4"], "the chip 'v9' is not one of v4"),
        ([], "--topology=CHIP:SHAPE is missing"),
        (["--topology=cpu:8", "--speed=3"], "unknown argument '--speed=3'"),
    ],
)
def test_a_wrong_command_line_ends_with_two(repository, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(repository)
    with pytest.raises(SystemExit) as ended:
        plan.main(["--config=configs/web_scale_cpu.py", *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=cpu:4"], "this process has 8 CPU devices"),
        (["--topology=cpu:8", "--rows-per-chip=0"], "--rows-per-chip=0 must be a positive multiple"),
        (["--topology=cpu:8", "--facts=nowhere"], "--facts=nowhere is neither a prepared dataset"),
        (
            ["--topology=cpu:8", "--config.global_batch_size=9"],
            "give --rows-per-chip=N, which sets it to N x 8",
        ),
    ],
)
def test_what_does_not_go_together_is_told_with_its_remedy(
    repository, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(repository)
    assert plan.main(["--config=configs/web_scale_cpu.py", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_fsdp_takes_as_many_devices_as_divide_the_width(config):
    encoder = dataclasses.replace(config.model.encoder, layout="fsdp", embed_dim=768)
    wide = dataclasses.replace(config, model=dataclasses.replace(config.model, encoder=encoder))
    assert fitting_mesh(wide, 64) == (64, 1)
    assert fitting_mesh(wide, 1024) == (256, 4)
    assert fitting_mesh(config, 1024) == (-1, 1), "a whole encoder lies on any number"


def test_axes_of_replica_groups():
    assert axis_of((0, 1, 2, 3), (2, 4)) == "model"
    assert axis_of((1, 5), (2, 4)) == "data"
    assert axis_of(tuple(range(8)), (2, 4)) == "data+model"


def test_what_leaves_a_domain():
    gpus = parse_topology("h100:1x2x8")
    everyone = tuple(range(16))
    swap = make_link(Collective("all-to-all", 160.0, 1, 16, "", everyone), gpus, (16, 1))
    assert swap.device_bytes == 150 and swap.outside == pytest.approx(8 / 15)
    # 16 bytes gathered: a domain of eight takes in the other's 8, one byte through each of its links.
    gather = make_link(Collective("all-gather", 16.0, 1, 16, "", everyone), gpus, (16, 1))
    assert gather.device_bytes * gather.outside == pytest.approx(1.0)
    inside = make_link(Collective("all-gather", 16.0, 1, 8, "", tuple(range(8))), gpus, (16, 1))
    assert inside.outside == 0


def test_all_to_all_on_a_torus_is_bound_by_its_middle():
    v5p = CHIPS["v5p"]
    assert all_to_all_rate(parse_topology("v5p:4x4x4"), v5p) == 8 * 100e9 / 4
    assert all_to_all_rate(parse_topology("v5p:8x8x16"), v5p) == 8 * 100e9 / 16


def test_tiles_take_memory_and_fast_memory_takes_none():
    assert device_bytes("f32[10,64]{1,0:T(8,128)}") == 16 * 128 * 4
    assert device_bytes("f32[10,64]{0,1:T(8,128)}") == 64 * 128 * 4
    assert device_bytes("(f32[8,128]{1,0:T(8,128)S(1)}, s32[])") == 4


class FakeProgram:
    """A step whose temporaries are linear in its batch, on a device of 1,000 bytes."""

    capacity = 1000

    def __init__(self, case, tables=300):
        scale = case.facts.num_items / 1_000_000
        self.case, self.temporary_bytes, self.other_bytes = case, 20 + 10 * case.rows_per_chip, 0
        self.total_bytes = tables * scale + self.temporary_bytes
        if self.total_bytes > self.capacity:
            raise OutOfMemoryError(self.total_bytes, self.capacity)


def test_the_largest_batch_fills_the_memory_and_was_compiled(config):
    case = case_of(config)
    found = largest_batch(FakeProgram(case), 1000, compile_case=FakeProgram)
    assert 870 <= found.program.total_bytes <= 1000 and 1 <= found.compiles <= 3
    assert smaller_batch(case.with_rows(300), compile_case=FakeProgram).program.case.rows_per_chip == 37
    assert (
        smaller_batch(case.with_rows(300), compile_case=lambda case: FakeProgram(case, tables=2000)) is None
    )


def test_the_largest_tables_end_with_the_memory_or_the_ids(config):
    case = case_of(config)
    item_bytes, user_bytes = 125_001 * (32 * 4 + 4), 250_001 * (16 * 4 + 4)
    room = 10 * (item_bytes + user_bytes)
    found = largest_tables(case, room, 0, compile_case=lambda case: FakeProgram(case, tables=1))
    assert found.limited_by == "memory"
    assert found.program.case.facts.num_items == pytest.approx(9.3e6, rel=0.02)
    found = largest_tables(case, 1e6 * room, 0, compile_case=lambda case: FakeProgram(case, tables=0))
    assert found.limited_by == "ids of 32 bits"
    assert found.program.case.facts.num_users == pytest.approx(MAX_ID, abs=2)


def test_a_gpu_is_told_in_the_compilers_form():
    text = target_config(TARGETS["h100"])
    assert text.count("{") == text.count("}") and "core_count: 132" in text and "major: 9" in text
    assert math.isclose(TARGETS["h100"].memory_rate, CHIPS["h100"].hbm_rate, rel_tol=0.01)


def test_meshes_of_the_tests_are_untouched():
    assert make_mesh((8, 1)).size == 8 and jax.default_backend() == "cpu"
