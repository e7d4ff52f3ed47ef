"""Domains are mixed by their shares, in an order that is a pure function; one domain is as if there were none."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.data.dataset import UNKNOWN_TIME, Histories, PreparedDataset
from jaxrec.data.mixing import Mixing
from jaxrec.data.packing import pack, random_stream
from jaxrec.data.pipeline import TrainingRows, build_batch, stream_batches

NAMES = ("small", "middle", "large")


def make_dataset(users_by_domain, seed=0):
    """So many users of each domain, of three to nine events; a domain's items are the ones after the last one's."""
    rng = np.random.default_rng(seed)
    owners = rng.permutation(np.repeat(np.arange(len(users_by_domain)), users_by_domain))
    lengths = rng.integers(3, 10, len(owners))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    item_ids = np.repeat(owners * 10, lengths) + rng.integers(1, 11, offsets[-1])
    names = NAMES[: len(users_by_domain)]
    return PreparedDataset.from_histories(
        Histories(
            offsets,
            item_ids.astype(np.int32),
            np.full(offsets[-1], UNKNOWN_TIME),
            np.zeros((offsets[-1], 0), np.int8),
        ),
        num_items=10 * len(names),
        domains=names,
        user_keys=[f"{names[owner]}:{index}" for index, owner in enumerate(owners)],
        item_keys=[f"{name}:{item}" for name in names for item in range(10)],
    )


some_sizes = st.lists(st.integers(1, 300), min_size=1, max_size=5)
temperatures = st.one_of(st.floats(1.0, 100.0), st.just(float("inf")))


@given(some_sizes, temperatures, st.integers(0, 5), st.integers(0, 3))
def test_every_cycle_has_the_shares_of_the_formula(sizes, temperature, seed, cycle):
    sizes = np.array(sizes)
    mixing = Mixing.make(sizes, temperature, seed)
    places = sum(mixing.turns)
    rows = mixing.rows_at(np.arange(places) + cycle * places)
    domains = np.searchsorted(np.cumsum(sizes), rows, side="right")
    counts = np.bincount(domains, minlength=len(sizes))
    weights = sizes ** (1.0 / temperature)
    wanted = sizes.sum() * weights / weights.sum()
    assert (np.abs(counts - wanted) <= 0.5 + 1e-9).sum() + (counts == 1).sum() >= len(sizes)
    assert counts.min() >= 1
    if temperature == 1.0:
        assert sorted(rows.tolist()) == list(range(sizes.sum())), "each row once"


@given(some_sizes, temperatures, st.integers(0, 5), st.data())
def test_the_order_is_a_pure_function_of_the_position(sizes, temperature, seed, data):
    mixing = Mixing.make(np.array(sizes), temperature, seed)
    whole = mixing.rows_at(np.arange(3 * sum(mixing.turns)))
    asked = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=20)))
    again = Mixing.make(np.array(sizes), temperature, seed)
    np.testing.assert_array_equal(again.rows_at(asked), whole[asked])


@given(some_sizes, temperatures, st.integers(0, 5))
def test_a_domain_takes_each_of_its_rows_once_in_each_of_its_epochs(sizes, temperature, seed):
    mixing = Mixing.make(np.array(sizes), temperature, seed)
    rows = mixing.rows_at(np.arange(4 * sum(mixing.turns)))
    for first, size in zip(np.cumsum(sizes) - sizes, sizes, strict=True):
        own = rows[(rows >= first) & (rows < first + size)] - first
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))


@given(st.integers(1, 60), st.integers(0, 2**32), temperatures)
def test_one_domain_keeps_its_order_to_the_bit(num_users, seed, temperature):
    dataset = make_dataset([num_users])
    rows = TrainingRows.make(dataset, history_length=8, domain_temperature=temperature, seed=seed)
    plan = pack(rows.windows.lengths, 8, seed)
    for name in ("row_offsets", "segments", "columns"):
        np.testing.assert_array_equal(getattr(rows.plan, name), getattr(plan, name))
    wanted = [random_stream(seed, epoch + 1).permutation(plan.num_rows) for epoch in range(3)]
    np.testing.assert_array_equal(rows.rows_at(np.arange(3 * plan.num_rows)), np.concatenate(wanted))
    assert build_batch(rows, 0, global_batch_size=4).domain_ids is None


def test_a_row_is_of_one_domain_and_the_batch_says_of_which():
    dataset = make_dataset([4, 40, 90])
    rows = TrainingRows.make(dataset, history_length=16, domain_temperature=5.0, seed=3)
    for step, batch in enumerate(stream_batches(rows, global_batch_size=8, stop_step=6)):
        whole = build_batch(rows, step, global_batch_size=8)
        np.testing.assert_array_equal(batch.domain_ids, whole.domain_ids)
        real = batch.item_ids > 0
        np.testing.assert_array_equal(batch.domain_ids, np.where(real, (batch.item_ids - 1) // 10 + 1, 0))
        for row in batch.domain_ids:
            assert len(set(row[row > 0])) == 1
        halves = [
            build_batch(rows, step, global_batch_size=8, process_index=i, process_count=2) for i in (0, 1)
        ]
        np.testing.assert_array_equal(np.concatenate([half.domain_ids for half in halves]), whole.domain_ids)


def test_domains_need_keys_that_name_them():
    histories = Histories(
        np.array([0, 1]), np.ones(1, np.int32), np.zeros(1, np.int64), np.zeros((1, 0), np.int8)
    )
    with pytest.raises(ValueError, match="need user_keys and item_keys"):
        PreparedDataset.from_histories(histories, domains=("a", "b"))
    foreign = PreparedDataset.from_histories(
        histories, domains=("a", "b"), user_keys=["c:1"], item_keys=["a:1"]
    )
    with pytest.raises(ValueError, match="'c:1' is of none of the domains a, b"):
        _ = foreign.user_domains
