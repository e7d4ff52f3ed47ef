"""The planner's choices, and that they are what its model says."""

import dataclasses
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from jaxrec.embedding.placement import Columns, Replicated, Rows
from jaxrec.embedding.placement_planner import Machine, plan_placements
from jaxrec.embedding.row_optimizer import Adam, RowAdagrad, Sgd
from jaxrec.embedding.table import TableSpec

MACHINE = Machine(devices=64, hbm_bytes=16 * 2**30, transport="ragged")


def plan(table, ids=4096, optimizer=Adam(), machine=MACHINE, **options):
    return plan_placements({"t": table}, {"item": ids}, optimizer, machine, **options).choices["t"]


def placed(*arguments, **options):
    return plan(*arguments, **options).table.placement


def test_a_small_and_busy_table_is_replicated():
    assert placed(TableSpec(num_rows=50, dim=16)) == Replicated()
    # All-reducing it would be more than what a few ids exchange.
    assert placed(TableSpec(num_rows=5000, dim=16), ids=64) == Rows()


def test_a_large_table_lies_by_rows():
    assert placed(TableSpec(num_rows=10_000_000, dim=128)) == Rows()


def test_a_small_memory_keeps_a_table_from_being_replicated():
    table = TableSpec(num_rows=50, dim=16)
    assert placed(table, machine=dataclasses.replace(MACHINE, hbm_bytes=2**17)) == Rows()


def test_few_wide_rows_are_cut_where_the_optimizer_allows_it():
    table = TableSpec(num_rows=70, dim=65_536)  # two rows on six devices, one on the others
    choice = plan(table, ids=64)
    parts = choice.table.placement.num_parts
    assert isinstance(choice.table.placement, Columns)
    assert 65_536 % parts == 0
    assert "Rows would send" in choice.reason
    assert choice.held_bytes < plan(table, ids=64, given={"t": Rows()}).held_bytes
    assert placed(table, ids=64, optimizer=RowAdagrad()) == Rows()


def test_what_is_kept_or_given_is_not_asked_about():
    small = TableSpec(num_rows=50, dim=16)
    kept = plan(small, kept={"t": "a full softmax reads it whole"})
    assert (kept.table.placement, kept.reason) == (Rows(), "a full softmax reads it whole")
    chosen = plan(small, given={"t": Columns(parts=4)})
    assert (chosen.table.placement, chosen.reason) == (Columns(parts=4), "the config says so")
    with pytest.raises(ValueError, match="does not divide dim=16"):
        plan(small, given={"t": Columns(parts=3)})


def test_a_narrow_table_rides_with_a_wide_one_of_the_same_ids():
    tables = {"bias": TableSpec(num_rows=30_000, dim=1), "item": TableSpec(num_rows=30_000, dim=64)}
    found = plan_placements(tables, {"item": 4096}, Adam(), MACHINE)
    alone = plan_placements({"bias": tables["bias"]}, {"item": 4096}, Adam(), MACHINE)
    assert list(found.choices) == ["bias", "item"]
    assert found.choices["bias"].sent_bytes < alone.choices["bias"].sent_bytes


@given(
    num_rows=st.integers(2, 10**7),
    dim=st.integers(1, 4096),
    ids=st.integers(1, 10**5),
    devices=st.sampled_from([1, 2, 8, 48, 1024]),
    transport=st.sampled_from(["padded", "ragged"]),
    optimizer=st.sampled_from([Sgd(), Adam(), RowAdagrad()]),
)
def test_the_choice_sends_no_more_than_rows_and_holds_what_it_says(
    num_rows, dim, ids, devices, transport, optimizer
):
    machine = Machine(devices=devices, hbm_bytes=2**34, transport=transport)
    table = TableSpec(num_rows=num_rows, dim=dim)
    found = plan(table, ids, optimizer, machine)
    rows = plan(table, ids, optimizer, machine, given={"t": Rows()})
    assert found.sent_bytes <= rows.sent_bytes
    floats = {"Sgd": dim, "Adam": 3 * dim + 1, "RowAdagrad": dim + 1}[type(optimizer).__name__]
    assert rows.held_bytes == -(-num_rows // devices) * floats * 4
    if devices == 1:
        assert found.table.placement == Rows()
    if isinstance(found.table.placement, Replicated):
        assert found.held_bytes == num_rows * floats * 4 <= 0.01 * 2**34
    if isinstance(found.table.placement, Columns):
        assert not isinstance(optimizer, RowAdagrad)
        assert found.held_bytes < rows.held_bytes


def test_it_prints_as_a_table():
    tables = {
        "item": TableSpec(num_rows=5, dim=16),
        "user": TableSpec(num_rows=10**8, dim=64, keyed_by="user"),
    }
    found = plan_placements(tables, {"item": 4096, "user": 512}, Adam(), MACHINE)
    text = str(found)
    assert "Tables on 64 devices of 16.0 GiB" in text
    assert "Replicated" in text
    assert "100,000,000 x 64" in text
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(found)
    assert "Rows would send" in console.export_text()
