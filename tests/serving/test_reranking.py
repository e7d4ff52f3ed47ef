"""Greedy orders: permutations whose beginnings do not depend on their length, and what their weights are for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.serving.reranking import OWN, calibrated, dpp, mmr

SIZE, CATEGORIES = 12, 3


def a_pool(seed):
    rng = np.random.default_rng(seed)
    scores = np.sort(rng.normal(size=SIZE))[::-1]
    unit = rng.normal(size=(SIZE, 4))
    return scores, unit / np.linalg.norm(unit, axis=1, keepdims=True), rng.random((SIZE, CATEGORIES)) < 0.5


def orders(seed, weight, most):
    scores, unit, membership = a_pool(seed)
    wanted = np.random.default_rng(seed + 1).dirichlet(np.ones(CATEGORIES))
    return (
        mmr(scores, unit, weight, most),
        dpp(scores, unit, weight, most),
        calibrated(scores, membership, wanted, weight, most),
    )


@given(seed=st.integers(0, 99), weight=st.floats(0, 1), most=st.integers(1, 15))
def test_an_order_has_every_place_once_and_begins_as_a_shorter_one(seed, weight, most):
    for short, long in zip(orders(seed, weight, most), orders(seed, weight, 15), strict=True):
        assert sorted(short.tolist()) == list(range(SIZE))
        assert short[:most].tolist() == long[:most].tolist()


@given(seed=st.integers(0, 99))
def test_no_weight_leaves_the_order_alone(seed):
    for order in orders(seed, 0.0, 10):
        assert order.tolist() == list(range(SIZE))


@given(seed=st.integers(0, 99), weight=st.sampled_from([0.2, 0.5, 1.0]))
def test_each_place_of_a_dpp_adds_the_most_volume(seed, weight):
    scores, unit, _ = a_pool(seed)
    relevance = (scores - scores.min()) / np.ptp(scores)
    pull = np.exp((1 - weight) / (2 * weight) * relevance)
    kernel = np.outer(pull, pull) * ((1 - OWN) * unit @ unit.T + OWN * np.eye(SIZE))
    order = dpp(scores, unit, weight, SIZE).tolist()
    for place in range(SIZE):  # more places than vectors have dimensions
        volumes = [
            np.linalg.slogdet(kernel[np.ix_([*order[:place], item], [*order[:place], item])])[1]
            for item in order[place:]
        ]
        assert volumes[0] >= max(volumes) - 1e-9


def divergence(places, membership, wanted):
    parts = membership / np.maximum(membership.sum(axis=1, keepdims=True), 1)
    shares = parts[places].sum(axis=0) / max(1, membership[places].any(axis=1).sum())
    return float(np.sum(wanted * np.log(wanted / (0.99 * shares + 0.01 * wanted))))


def test_a_calibrated_list_has_the_shares_of_the_history():
    scores = np.linspace(2, 1, 30)
    membership = np.zeros((30, 2), bool)
    membership[:25, 0] = membership[25:, 1] = True  # the second category scores worst
    wanted = np.array([0.6, 0.4])
    order = calibrated(scores, membership, wanted, 1.0, 30)
    assert membership[order[:10], 1].sum() == 4
    assert divergence(order[:10], membership, wanted) < 0.01 < divergence(np.arange(10), membership, wanted)


@given(seed=st.integers(0, 99), weight=st.sampled_from([0.3, 0.9]))
def test_the_first_places_are_the_best_by_what_is_weighed(seed, weight):
    scores, _, membership = a_pool(seed)
    wanted = np.random.default_rng(seed + 1).dirichlet(np.ones(CATEGORIES))
    relevance = (scores - scores.min()) / np.ptp(scores)
    order = calibrated(scores, membership, wanted, weight, SIZE)
    for length in (1, 2, 3):
        chosen, before = order[length - 1], order[: length - 1].tolist()
        worth = {
            place: (1 - weight) * relevance[place] - weight * divergence([*before, place], membership, wanted)
            for place in range(SIZE)
            if place not in before
        }
        assert worth[chosen] == pytest.approx(max(worth.values()))


def test_nothing_known_and_nothing_there():
    scores, _, membership = a_pool(0)
    assert calibrated(scores, membership, np.zeros(CATEGORIES), 0.9, 5).tolist() == list(range(SIZE))
    assert not len(calibrated(scores[:0], membership[:0], np.ones(CATEGORIES) / 3, 0.5, 5))
    assert not len(mmr(scores[:0], np.zeros((0, 4)), 0.5, 5))
    assert not len(dpp(scores[:0], np.zeros((0, 4)), 0.5, 5))
