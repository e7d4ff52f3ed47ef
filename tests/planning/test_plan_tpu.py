"""The planner with XLA's own compiler for TPUs: one small step, compiled once for four chips that are not there."""

import dataclasses

import jax
import pytest

from jaxrec.config import load_config
from jaxrec.core.chips import CHIPS
from jaxrec.losses.samplers import UniformSampler
from jaxrec.planning.document import make_plan
from jaxrec.planning.memory import measure_memory
from jaxrec.planning.overlap import measure_overlap
from jaxrec.planning.program import Case, compile_step, make_case, plan_facts
from jaxrec.planning.roofline import bound, measure_work
from jaxrec.planning.topology import parse_topology
from jaxrec.tasks.candidates import SampledSoftmax
from jaxrec.tasks.next_item import NextItem

REPOSITORY_CONFIG = "configs/web_scale_cpu.py"


def small_case(repository) -> Case:
    base = load_config(str(repository / REPOSITORY_CONFIG))
    encoder = dataclasses.replace(base.model.encoder, embed_dim=128, mlp_dim=256, num_heads=2, num_layers=1)
    sampler = UniformSampler(num_samples=128)
    config = dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, history_length=32),
        model=dataclasses.replace(base.model, encoder=encoder, item_dim=128, user_dim=64),
        tasks={"next_item": NextItem(candidates=SampledSoftmax(sampler=sampler))},
    )
    return make_case(config, parse_topology("v5p:2x2x1"), plan_facts(config), 4)


@pytest.fixture(scope="module")
def program(repository):
    return compile_step(small_case(repository))


def test_memory_adds_up_and_no_temporary_has_the_size_of_a_table(program):
    memory = measure_memory(program)
    assert sum(memory.by_kind.values()) == pytest.approx(memory.total, rel=1e-6)
    assert memory.by_kind["table item"] == 250_001 * 128 * 4
    assert memory.by_kind["exchange buffers"] > 0
    assert memory.capacity == CHIPS["v5p"].hbm_bytes and 0 < memory.share < 0.01
    assert 0 < memory.replayed < 1.5, (
        "the compiler reserves some megabytes, which are most of so small a step"
    )
    assert memory.by_kind["table user"] == 500_001 * 64 * 4
    # Left to itself, the compiler would keep rows of 64 entries as columns and turn them round twice a step.
    assert max(buffer.num_bytes for buffer in memory.largest) < memory.by_kind["table item"] / 10
    assert program.temporary_bytes < memory.by_kind["table item"] / 4


def test_operations_bytes_and_the_bound(program):
    work = measure_work(program)
    assert work.compiled_flops == pytest.approx(work.formula_flops, rel=0.03)
    kinds = {link.collective.kind for link in work.links if link.part == "exchange"}
    assert "ragged-all-to-all" in kinds, "a TPU exchanges the rows that there are"
    assert 0.8 < work.sent("exchange") / work.exchange_rows_bytes < 2
    assert work.sent("dense") > 0
    limit = bound(program, work)
    assert limit.seconds == max(limit.compute, limit.hbm, limit.interconnect) > 0
    assert limit.mfu == pytest.approx(work.model_flops / limit.seconds / (4 * 459e12))


def test_rows_travel_while_other_kernels_run(program):
    work, overlap = measure_work(program), measure_overlap(program)
    for part, hidden in overlap.items():
        assert hidden.sent == pytest.approx(work.sent(part))
        assert 0 <= hidden.behind_products <= hidden.behind_kernels <= hidden.asynchronous <= hidden.sent
    exchange = overlap["exchange"]
    assert exchange.asynchronous > 0.8 * exchange.sent, "all but the counts, which are needed at once"
    assert exchange.behind_kernels > 0


def test_tables_that_are_too_large_are_an_answer_with_the_largest_that_fit(repository):
    """More than the chips hold is refused before the compiler is asked; what fits was compiled."""
    case = small_case(repository)
    facts = dataclasses.replace(case.facts, num_items=2_000_000_000)
    plan = make_plan(dataclasses.replace(case, facts=facts), search=False)
    assert not plan["fits"] and plan["needed_bytes"] > plan["capacity_bytes"] == CHIPS["v5p"].hbm_bytes
    largest = plan["largest"]["tables"]
    assert 0.85 < largest["share"] < 1 and largest["num_items"] < 2_000_000_000
    assert f"{largest['num_items']:,} items" in plan["remedy"]


def test_the_tests_still_run_on_the_cpu(program):
    assert jax.default_backend() == "cpu"
