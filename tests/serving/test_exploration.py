"""Drawn lists: each item once, with the propensities that they were drawn with."""

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.serving.exploration import EpsilonGreedy, LastLayer, Thompson, exploration_of

SCORES = np.array([2.0, 1.0, 0.5, -np.inf, 1.5])
VECTORS = np.random.default_rng(0).normal(size=(5, 3))


def policies():
    return [
        EpsilonGreedy(epsilon=0.3),
        EpsilonGreedy(epsilon=1.0),
        Thompson(scale=0.7, last_layer=LastLayer.empty(3), num_samples=500),
    ]


@given(seed=st.integers(0, 999), size=st.integers(1, 7), which=st.integers(0, 2))
def test_a_list_has_each_candidate_once_and_never_what_is_ruled_out(seed, size, which):
    drawn = policies()[which].draw(np.random.default_rng(seed), SCORES, VECTORS, size)
    assert len(drawn.places) == min(size, 4) == len(set(drawn.places.tolist()))
    assert 3 not in drawn.places
    assert ((drawn.propensities > 0) & (drawn.propensities <= 1)).all()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_propensities_are_how_often_a_choice_is_made(which):
    rng, policy, lists = np.random.default_rng(1), policies()[which], 3_000
    first: collections.Counter = collections.Counter()
    said: dict[int, list[float]] = collections.defaultdict(list)
    for _ in range(lists):
        drawn = policy.draw(rng, SCORES, VECTORS, 1)
        first[int(drawn.places[0])] += 1
        said[int(drawn.places[0])].append(float(drawn.propensities[0]))
    assert len(first) >= 3
    for place, count in first.items():
        assert np.mean(said[place]) == pytest.approx(count / lists, abs=0.03)


def test_nothing_is_explored_where_nothing_may_be():
    for policy in (EpsilonGreedy(epsilon=0.0), Thompson(scale=0.0, last_layer=LastLayer.empty(3))):
        drawn = policy.draw(np.random.default_rng(0), SCORES, VECTORS, 4)
        assert drawn.places.tolist() == [0, 4, 1, 2]
        assert not drawn.explored.any()
        assert drawn.propensities == pytest.approx(np.ones(4))


def test_what_has_been_shown_often_is_no_longer_in_doubt():
    rng, layer = np.random.default_rng(0), LastLayer.empty(3)
    doubt = np.std(layer.noise(rng, 4_000) @ VECTORS[0])
    layer.add(np.repeat(VECTORS[:1], 400, axis=0))
    known, other = (np.std(layer.noise(rng, 4_000) @ VECTORS[place]) for place in (0, 1))
    assert known < doubt / 10
    assert other > 3 * known


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"exploration.epsilon=1.5 must lie in \[0, 1\]"):
        EpsilonGreedy(epsilon=1.5)
    with pytest.raises(ValueError, match="exploration.scale=-1"):
        Thompson(scale=-1.0, last_layer=LastLayer.empty(2))


def test_a_list_that_was_shown_moves_less():
    policy = Thompson(scale=1.0)
    policy.draw(np.random.default_rng(0), SCORES, VECTORS, 2)
    before = policy.last_layer.precision.copy()
    policy.shown(VECTORS[:2])
    np.testing.assert_allclose(policy.last_layer.precision - before, VECTORS[:2].T @ VECTORS[:2])
    policy.draw(np.random.default_rng(0), SCORES, np.ones((5, 7)), 2)
    assert policy.last_layer.precision.shape == (7, 7), "a version of another dim starts anew"


def test_what_the_command_line_says():
    assert exploration_of("0.05") == exploration_of("epsilon:0.05") == EpsilonGreedy(epsilon=0.05)
    assert exploration_of("thompson:0.2") == Thompson(scale=0.2)
    assert exploration_of("0") is exploration_of("thompson:0") is None
    for text in ("", "x", "ucb:1", "thompson:", "thompson:-1", "nan", "inf"):
        with pytest.raises(ValueError, match="say a chance such as 0.05, or thompson:SCALE"):
            exploration_of(text)
    with pytest.raises(ValueError, match="must lie in"):
        exploration_of("1.5")
