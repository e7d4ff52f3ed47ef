import hypothesis
import numpy as np
import pytest
import scipy.special
from hypothesis import strategies as st

from jaxrec.metrics import binary

LABELS = np.array([1, 0, 1, 0, -1, 1])
PROBABILITIES = np.array([0.9, 0.1, 0.4, 0.4, 0.99, 0.8])

predictions = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]), st.sampled_from([-1, 0, 1])),
    min_size=1,
    max_size=30,
).filter(lambda rows: any(label >= 0 for _, label in rows))


def columns(rows):
    return np.array([p for p, _ in rows]), np.array([label for _, label in rows])


def test_known_values_with_an_unknown_label_left_out():
    # Of 3 x 2 pairs: 5 in order, one tie.
    assert binary.auc(PROBABILITIES, LABELS) == pytest.approx(5.5 / 6)
    expected = -np.mean(np.log([0.9, 0.9, 0.4, 0.6, 0.8]))
    assert binary.log_loss(PROBABILITIES, LABELS) == pytest.approx(expected)
    at_half = binary.threshold_metrics(PROBABILITIES, LABELS, 0.5)
    assert at_half == pytest.approx({"accuracy": 0.8, "precision": 1.0, "recall": 2 / 3, "f1": 0.8})
    # Two bins: .1, .4, .4 hold one positive; .9, .8 two.
    gap = (abs(0.9 / 3 - 1 / 3) * 3 + abs(1.7 / 2 - 1) * 2) / 5
    assert binary.expected_calibration_error(PROBABILITIES, LABELS, 2) == pytest.approx(gap)


@hypothesis.given(predictions)
def test_auc_equals_the_pairwise_definition(rows):
    p, y = columns(rows)
    pairs = [(a > b) + 0.5 * (a == b) for a in p[y == 1] for b in p[y == 0]]
    value = binary.auc(p, y)
    assert np.isnan(value) if not pairs else value == pytest.approx(np.mean(pairs))


@hypothesis.given(predictions)
def test_all_metrics_are_in_range_and_json_ready(rows):
    p, y = columns(rows)
    metrics = binary.binary_metrics(p, y, alpha=0.3)
    assert metrics["num_labels"] == np.count_nonzero(y >= 0)
    assert not any(isinstance(value, float) and np.isnan(value) for value in metrics.values())
    bounded = {k: v for k, v in metrics.items() if v is not None and k not in ("num_labels", "log_loss")}
    assert all(-1e-12 <= value <= 1.0 + 1e-12 for value in bounded.values())


def test_without_a_known_label_every_metric_is_none():
    metrics = binary.binary_metrics(PROBABILITIES, np.full(6, -1), 0.5)
    assert metrics.pop("num_labels") == 0
    assert set(metrics.values()) == {None}
    assert set(metrics) | {"num_labels"} == set(binary.binary_metrics(PROBABILITIES, LABELS, 0.5))


@pytest.mark.parametrize("criterion", ["f1", "accuracy"])
@hypothesis.given(rows=predictions)
def test_the_threshold_is_the_best_there_is(criterion, rows):
    p, y = columns(rows)
    alpha = binary.choose_threshold(p, y, criterion)
    candidates = [-1.0, *np.unique(p)]  # every way to part the predictions
    values = [np.nan_to_num(binary.threshold_metrics(p, y, a)[criterion]) for a in candidates]
    chosen = np.nan_to_num(binary.threshold_metrics(p, y, alpha)[criterion])
    assert chosen == pytest.approx(max(values))


def test_the_threshold_parts_neighbouring_floats():
    p = np.array([0.5, np.nextafter(0.5, 1.0)])
    alpha = binary.choose_threshold(p, np.array([0, 1]))
    assert ((p > alpha) == [False, True]).all()


@pytest.mark.parametrize(("scale", "bias"), [(0.3, -1.0), (2.0, 0.5)])
def test_platt_recovers_the_scale_and_bias_that_made_the_labels(scale, bias):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=20_000) * 3.0
    labels = (rng.random(20_000) < scipy.special.expit(scale * logits + bias)).astype(int)
    fitted = binary.fit_platt(logits, labels)
    assert (fitted.scale, fitted.bias) == pytest.approx((scale, bias), rel=0.1)
    raw, calibrated = scipy.special.expit(logits), fitted.probabilities(logits)
    assert binary.log_loss(calibrated, labels) < binary.log_loss(raw, labels)
    assert binary.expected_calibration_error(calibrated, labels) < 0.02
    assert binary.auc(calibrated, labels) == pytest.approx(binary.auc(logits, labels))


def test_temperature_recovers_an_overconfident_model():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=20_000)
    labels = (rng.random(20_000) < scipy.special.expit(logits)).astype(int)
    fitted = binary.fit_temperature(4.0 * logits, labels)
    assert (fitted.scale, fitted.bias) == (pytest.approx(0.25, rel=0.1), 0.0)


@pytest.mark.parametrize("fit", [binary.fit_platt, binary.fit_temperature])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_separable_constant_and_reversed_data_stay_finite_and_keep_the_order(fit, size):
    logits = np.linspace(-1.0, 1.0, 40) * size
    rising = (logits > 0).astype(int)
    for labels in (rising, 1 - rising, np.ones(40, int), np.zeros(40, int)):
        fitted = fit(logits, labels)
        assert np.isfinite([fitted.scale, fitted.bias]).all()
        assert (np.diff(fitted.probabilities(logits)) >= 0.0).all()
    assert np.isfinite(fit(np.zeros(40), rising).scale)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="not probabilities"):
        binary.log_loss(np.array([1.5]), np.array([1]))
    with pytest.raises(ValueError, match="none of the 2 labels"):
        binary.auc(np.array([0.1, 0.2]), np.array([-1, -1]))
    with pytest.raises(ValueError, match="NaN"):
        binary.auc(np.array([np.nan]), np.array([1]))
    with pytest.raises(ValueError, match="num_bins=0"):
        binary.reliability_curve(np.array([0.1]), np.array([1]), 0)
    with pytest.raises(ValueError, match="criterion='auc'"):
        binary.choose_threshold(np.array([0.1]), np.array([1]), "auc")


events = st.lists(
    st.tuples(st.sampled_from([0.1, 0.25, 0.5, 0.9]), st.sampled_from([-1, 0, 1]), st.integers(3, 6)),
    min_size=2,
    max_size=30,
).filter(lambda rows: {0, 1} <= {label for _, label, _ in rows})


@hypothesis.given(events)
def test_values_by_user_have_the_auc_as_their_mean(rows):
    scores, labels, users = (np.array(column) for column in zip(*rows, strict=True))
    values = binary.auc_by_user(scores, labels, users)
    assert len(values) == len(np.unique(users[labels >= 0]))
    assert values.mean() == pytest.approx(binary.auc(scores, labels))
    own = [binary.auc(scores[users == user], labels[users == user]) for user in np.unique(users)
           if {0, 1} <= set(labels[users == user])]  # fmt: skip
    np.testing.assert_allclose(binary.user_auc(scores, labels, users), own)


def test_values_by_user_spread_as_the_auc_does():
    """Their standard error is that of the AUC over worlds in which the users are drawn anew."""
    rng = np.random.default_rng(0)

    def world():
        users = np.repeat(np.arange(80), rng.integers(1, 9, 80))
        taste = rng.normal(size=80)[users]
        labels = (rng.random(len(users)) < scipy.special.expit(taste)).astype(np.int8)
        return taste + rng.normal(size=len(users)), labels, users

    worlds = [world() for _ in range(200)]
    spread = np.std([binary.auc(scores, labels) for scores, labels, _ in worlds])
    errors = [np.std(binary.auc_by_user(*one)) / np.sqrt(80) for one in worlds]
    assert np.mean(errors) == pytest.approx(spread, rel=0.2)


def test_one_class_has_no_values_by_user():
    with pytest.raises(ValueError, match="all of one class"):
        binary.auc_by_user(PROBABILITIES, np.ones(6, np.int8), np.arange(6))
