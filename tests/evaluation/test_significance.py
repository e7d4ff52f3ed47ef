import hypothesis
import numpy as np
import pytest
import scipy.stats
from hypothesis import strategies as st

from jaxrec.evaluation import significance


def test_bootstrap_interval_is_that_of_the_normal_approximation_for_many_users():
    values = np.random.default_rng(0).gamma(2.0, size=4000)
    interval = significance.bootstrap_intervals({"m": values}, num_samples=2000)["m"]
    half_width = 1.96 * values.std() / np.sqrt(len(values))
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half_width, abs=0.1 * half_width)
    assert interval.high == pytest.approx(values.mean() + half_width, abs=0.1 * half_width)


def test_bootstrap_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    draws = {str(i): (rng.random(400) < 0.2).astype(float) for i in range(300)}
    intervals = significance.bootstrap_intervals(draws, num_samples=400, confidence=0.9)
    covered = np.mean([one.low <= 0.2 <= one.high for one in intervals.values()])
    assert 0.85 < covered < 0.95


def test_the_same_input_gives_the_same_answer_whatever_the_memory_bound(monkeypatch):
    values = {"a": np.random.default_rng(2).random(50)}
    other = {"a": np.random.default_rng(3).random(50)}
    first = significance.bootstrap_intervals(values), significance.compare(values, other, num_samples=200)
    assert significance.bootstrap_intervals(values, seed=1) != first[0]
    monkeypatch.setattr(significance, "CHUNK", 1 << 30)
    assert (
        significance.bootstrap_intervals(values),
        significance.compare(values, other, num_samples=200),
    ) == first


def test_the_p_value_equals_that_of_every_sign_pattern():
    differences = np.array([0.3, 0.1, -0.2, 0.5, 0.4, 0.0, 0.25, 0.6])
    signs = 1 - 2 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(int)
    exact = np.mean(np.abs(signs @ differences) >= differences.sum() - 1e-9)
    result = significance.paired_comparison(np.zeros(8), differences, num_samples=50_000)
    assert result.p_value == pytest.approx(exact, abs=0.005)
    assert (result.better, result.worse, result.num_users) == (6, 1, 8)
    assert result.low <= result.difference <= result.high
    assert result.difference == pytest.approx(differences.mean())


def test_p_values_are_uniform_without_a_difference_and_small_with_one():
    rng = np.random.default_rng(4)
    null = {str(i): rng.normal(size=100) for i in range(200)}
    zeros = {name: np.zeros(100) for name in null}
    p_values = [c.p_value for c in significance.compare(zeros, null, num_samples=999).values()]
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 0.01
    shifted = significance.paired_comparison(np.zeros(100), null["0"] + 0.5, num_samples=999)
    assert shifted.p_value == pytest.approx(0.001)
    assert shifted.low > 0.0


def test_equal_runs_have_no_difference():
    values = np.random.default_rng(5).random(30)
    same = significance.paired_comparison(values, values)
    assert (same.difference, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_swapping_the_runs_swaps_the_signs():
    rng = np.random.default_rng(6)
    a, b = rng.random(60), rng.random(60)
    ab, ba = significance.paired_comparison(a, b), significance.paired_comparison(b, a)
    assert (ab.difference, ab.p_value, ab.better) == (-ba.difference, ba.p_value, ba.worse)


def test_holm_on_a_worked_example():
    adjusted = significance.holm(np.array([0.01, 0.04, 0.03, 0.005]))
    np.testing.assert_allclose(adjusted, [0.03, 0.06, 0.06, 0.02])


@hypothesis.given(st.lists(st.floats(0.0, 1.0), max_size=8))
def test_holm_only_raises_keeps_the_order_and_is_at_most_bonferroni(p_values):
    p = np.array(p_values)
    adjusted = significance.holm(p)
    assert (adjusted >= p).all() and (adjusted <= np.minimum(len(p) * p, 1.0) + 1e-12).all()
    assert (np.diff(adjusted[np.argsort(p)]) >= 0.0).all()


def test_comparison_corrects_over_its_metrics():
    rng = np.random.default_rng(7)
    a = {name: rng.normal(size=50) for name in "xyz"}
    b = {"z": a["z"] + rng.normal(0.3, 1.0, 50), "y": a["y"] + 0.1, "x": a["x"] + rng.normal(size=50)}
    result = significance.compare(a, b, num_samples=500)
    assert list(result) == list(a)
    expected = significance.holm(np.array([c.p_value for c in result.values()]))
    np.testing.assert_array_equal([c.adjusted_p_value for c in result.values()], expected)
    assert result["y"].better == 50


def test_users_are_aligned_by_their_ids():
    users_a, users_b = np.array([5, 3, 9]), np.array([9, 5, 3])
    at_a, at_b = significance.align_users(users_a, users_b)
    np.testing.assert_array_equal(users_a[at_a], users_b[at_b])
    names_a, names_b = np.array(["b", "a"], object), np.array(["a", "b"], object)
    at_a, at_b = significance.align_users(names_a, names_b)
    np.testing.assert_array_equal(names_a[at_a], names_b[at_b])
    with pytest.raises(ValueError, match="2 are in both"):
        significance.align_users(users_a, np.array([9, 5, 4]))
    with pytest.raises(ValueError, match="run A has users such as 5, run B such as 'b', of another type"):
        significance.align_users(users_a, names_a)
    with pytest.raises(ValueError, match="run B names a user twice"):
        significance.align_users(users_a, np.array([9, 5, 5]))


def test_bad_input_is_named():
    assert significance.bootstrap_intervals({}) == {}
    ones = np.ones(3)
    with pytest.raises(ValueError, match="different numbers of users"):
        significance.bootstrap_intervals({"a": ones, "b": np.ones(2)})
    with pytest.raises(ValueError, match="0 users"):
        significance.bootstrap_intervals({"a": np.zeros(0)})
    with pytest.raises(ValueError, match="'b' has a value that is not finite"):
        significance.bootstrap_intervals({"a": ones, "b": np.array([1.0, np.nan, 0.0])})
    with pytest.raises(ValueError, match="confidence=95"):
        significance.bootstrap_intervals({"a": ones}, confidence=95.0)
    with pytest.raises(ValueError, match="3 users, run B 2"):
        significance.paired_comparison(ones, np.ones(2))
    with pytest.raises(ValueError, match=r"\['a'\], run B \['b'\]"):
        significance.compare({"a": ones}, {"b": ones})
