"""Simple models of behaviours against what they should find in made-up clicks."""

import dataclasses

import numpy as np
import pytest

from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.histories import Histories
from jaxrec.evaluation.baselines.behaviour_rates import ItemRate, LogisticRegression
from jaxrec.evaluation.behaviour_baselines import compare_behaviours
from jaxrec.evaluation.behaviours import behaviour_metrics
from jaxrec.evaluation.user_ranking import BehaviourPredictions

NUM_EVENTS = 4000


@pytest.fixture(scope="module")
def clicks():
    """Items 1 to 5 and one context column of three values; the chance is a sum of both in logits."""
    rng = np.random.default_rng(0)
    features = np.stack([rng.integers(1, 6, NUM_EVENTS), rng.integers(101, 104, NUM_EVENTS)], axis=1)
    logits = -2.0 + 0.5 * (features[:, 0] - 3) + 1.0 * (features[:, 1] - 102)
    labels = (rng.random(NUM_EVENTS) < 1 / (1 + np.exp(-logits))).astype(np.int8)
    return features.astype(np.int32), labels, logits


def test_an_items_rate_is_drawn_to_the_common_one(clicks):
    features, labels, _ = clicks
    fitted = ItemRate(prior_events=50).fit(features, labels)
    common = (labels.sum() + 1) / (NUM_EVENTS + 2)
    own = features[:, 0] == 4
    rate = (labels[own].sum() + 50 * common) / (own.sum() + 50)
    found = 1 / (1 + np.exp(-fitted.logits(np.array([[4, 101], [99, 101], [0, 101]], np.int32))))
    np.testing.assert_allclose(found, [rate, common, common])


def test_logistic_regression_finds_the_weights(clicks):
    features, labels, logits = clicks
    found = LogisticRegression(l2=0.1).fit(features, labels).logits(features)
    assert np.abs(found - logits).max() < 0.35
    unseen = LogisticRegression(l2=0.1).fit(features, labels).logits(np.array([[77, 3]], np.int32))
    assert np.isfinite(unseen).all()


def test_the_comparison_knows_who_is_better(clicks):
    features, labels, logits = clicks
    offsets = np.arange(0, NUM_EVENTS + 1, 4, dtype=np.int64)
    histories = Histories(
        offsets, features[:, 0], np.arange(NUM_EVENTS), labels[:, None], context=features[:, 1:].copy()
    )
    cut = np.full(len(offsets) - 1, 2)
    dataset = PreparedDataset.from_histories(
        histories, train_end=cut, validation_end=cut + 1, behaviours=["click"], name="clicks"
    )

    def predicted(place):
        rows = offsets[:-1] + place
        return BehaviourPredictions(
            user_indices=np.arange(len(rows)),
            targets=features[rows, 0],
            logits=logits[rows, None].astype(np.float32),
            labels=labels[rows, None],
            context=features[rows, 1:],
        )

    test, validation = predicted(3), predicted(2)
    measured = behaviour_metrics(["click"], test, validation, ["click"])
    names = ("item_rate", "logistic_regression")
    compare = {"num_samples": 100, "seed": 0}
    found = compare_behaviours(dataset, test, validation, measured, names, **compare)["click"]
    assert found["model"]["auc"] == pytest.approx(measured["click"]["auc"])
    assert found["model"]["auc"] > found["item_rate"]["auc"] > 0.5
    assert found["item_rate"]["auc_gain"][0] > 0, "the truth is better than counting by item alone"
    low, high = found["logistic_regression"]["auc_gain"]
    assert low < 0.02
    assert high > -0.02
    for values in found.values():
        low, high = values["auc_interval"]
        assert low < values["auc"] < high
    unknown = dataclasses.replace(test, labels=np.full_like(test.labels, -1))
    measured_of_none = behaviour_metrics(["click"], unknown, validation, ["click"])
    of_none = compare_behaviours(dataset, unknown, validation, measured_of_none, names, **compare)["click"]
    assert of_none == {system: dict.fromkeys(values) for system, values in found.items()}
    without = dataclasses.replace(test, context=None), dataclasses.replace(validation, context=None)
    histories_without = dataclasses.replace(histories, context=None)
    plain = PreparedDataset.from_histories(
        histories_without, train_end=cut, validation_end=cut + 1, behaviours=["click"], name="plain"
    )
    found = compare_behaviours(plain, *without, measured, names[:1], **compare)["click"]
    assert set(found) == {"model", "item_rate"}
