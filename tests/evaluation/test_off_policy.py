"""Off-policy estimates: against enumeration, their definitions, and each other."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.evaluation.off_policy import (
    Estimate,
    Log,
    cross_fitted,
    direct,
    doubly_robust,
    ips,
    naive,
    snips,
)

LOGGING, TARGET = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.3, 0.6])
EXPECTED = np.array([0.1, 0.4, 0.8])  # rewards of the actions


def random_log(seed, size=400):
    rng = np.random.default_rng(seed)
    actions = rng.choice(3, size, p=LOGGING)
    return Log(actions, rng.binomial(1, EXPECTED[actions]), LOGGING[actions])


def everywhere(row, size):
    return np.broadcast_to(row, (size, len(row)))


@pytest.mark.parametrize("model", [EXPECTED, np.array([0.5, 0.0, 0.3])])
def test_means_over_every_log_are_the_policys_own(model):
    """All logs of two choices with sure rewards, by their probability: unbiased whatever the model says."""
    by_ips = by_dr = of_log = 0.0
    for actions in itertools.product(range(3), repeat=2):
        chosen = np.array(actions)
        log = Log(chosen, EXPECTED[chosen], LOGGING[chosen])
        chance, policy = LOGGING[chosen].prod(), everywhere(TARGET, 2)
        by_ips += chance * ips(log, policy).value
        by_dr += chance * doubly_robust(log, policy, everywhere(model, 2)).value
        of_log += chance * naive(log).value
    truth = TARGET @ EXPECTED
    assert by_ips == pytest.approx(truth)
    assert by_dr == pytest.approx(truth)
    assert of_log == pytest.approx(LOGGING @ EXPECTED)


def test_a_right_model_leaves_the_residuals_nothing():
    log = random_log(0)
    sure = Log(log.actions, EXPECTED[log.actions], log.propensities)
    policy, model = everywhere(TARGET, len(log.actions)), everywhere(EXPECTED, len(log.actions))
    for estimate in (direct(policy, model), doubly_robust(sure, policy, model)):
        assert estimate.value == pytest.approx(TARGET @ EXPECTED)
        assert estimate.high - estimate.low < 1e-9


@given(seed=st.integers(0, 2**31), size=st.integers(2, 60))
def test_the_logging_policy_is_worth_what_it_earned(seed, size):
    log = random_log(seed, size)
    policy = everywhere(LOGGING, size)
    wanted = naive(log)
    for got in (ips(log, policy), snips(log, policy)):
        np.testing.assert_allclose([got.value, got.low, got.high], [wanted.value, wanted.low, wanted.high])
        assert got.effective_choices == pytest.approx(size)


@given(seed=st.integers(0, 2**31), size=st.integers(2, 60), shift=st.floats(-5, 5))
def test_self_normalised_estimates_stay_among_the_rewards_and_move_with_them(seed, size, shift):
    log = random_log(seed, size)
    policy = everywhere(TARGET, size)
    moved = Log(log.actions, log.rewards + shift, log.propensities)
    one, other = snips(log, policy), snips(moved, policy)
    assert log.rewards.min() - 1e-9 <= one.value <= log.rewards.max() + 1e-9
    assert other.value == pytest.approx(one.value + shift)
    assert 0 < one.effective_choices <= size + 1e-6


def test_intervals_cover_as_often_as_they_say():
    truth, repeats = TARGET @ EXPECTED, 400
    covered = {"ips": 0, "snips": 0, "doubly robust": 0}
    for seed in range(repeats):
        log = random_log(seed)
        policy, model = everywhere(TARGET, 400), everywhere([0.3, 0.3, 0.3], 400)
        estimates: dict[str, Estimate] = {
            "ips": ips(log, policy),
            "snips": snips(log, policy),
            "doubly robust": doubly_robust(log, policy, model),
        }
        for name, estimate in estimates.items():
            covered[name] += estimate.low <= truth <= estimate.high
    for name, count in covered.items():
        assert 0.91 < count / repeats < 0.985, name


def test_no_choice_is_in_the_fit_that_judges_it():
    seen = {}

    def fit(rows):
        def expected(asked):
            for choice in asked:
                seen[int(choice)] = set(rows.tolist())
            return np.repeat(asked[:, None], 2, axis=1).astype(float)

        return expected

    out = cross_fitted(fit, 23, folds=4)
    np.testing.assert_array_equal(out[:, 0], np.arange(23))
    assert set(seen) == set(range(23))
    assert all(choice not in rows and len(rows) >= 17 for choice, rows in seen.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"propensities": np.array([0.5, 0.0])}, r"propensities\[1\]=0.0 must be above 0"),
        ({"rewards": np.array([1.0, np.nan])}, "rewards must be finite"),
        ({"rewards": np.array([1.0])}, "2 actions, 1 rewards"),
    ],
)
def test_logs_that_say_nothing_are_refused(change, message):
    values = {
        "actions": np.array([0, 1]),
        "rewards": np.array([0.0, 1.0]),
        "propensities": np.array([0.5, 0.5]),
    }
    with pytest.raises(ValueError, match=message):
        Log(**(values | change))


def test_policies_that_are_none_are_refused():
    log = random_log(0, 10)
    with pytest.raises(ValueError, match="sum to 1"):
        ips(log, everywhere([0.5, 0.2, 0.1], 10))
    with pytest.raises(ValueError, match=r"policy \(10, 2\) has no probability"):
        ips(log, everywhere([0.5, 0.5], 10))
    chosen_never = Log(np.zeros(10, int), np.ones(10), np.full(10, 0.5))
    with pytest.raises(ValueError, match="none of the log's choices"):
        snips(chosen_never, everywhere([0.0, 1.0, 0.0], 10))
    with pytest.raises(ValueError, match="folds=1"):
        cross_fitted(lambda rows: lambda asked: np.zeros((len(asked), 1)), 5, folds=1)
