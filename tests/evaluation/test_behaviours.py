"""What is measured of behaviours where one of them depends on another, or a user has many events."""

import numpy as np
import pyarrow.parquet as pq

from jaxrec.evaluation.behaviours import asked_labels, behaviour_metrics, funnel_counts, write_predictions
from jaxrec.evaluation.user_ranking import BehaviourPredictions, evaluation_rows, predict_behaviours
from jaxrec.tasks.behaviour import Behaviour
from jaxrec.tasks.funnel import Funnel

NAMES = ("like", "finish")
FUNNEL = {"funnel": Funnel(first="like", second="finish")}


def predictions(num=60, seed=0):
    """Labels of which some are unknown and some impossible; the second logit is never above the first."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num, 2)).astype(np.float32)
    logits[:, 1] = np.minimum(logits[:, 1], logits[:, 0])
    labels = (rng.random((num, 2)) < 0.5).astype(np.int8)
    labels[:5, 0] = -1
    users = np.repeat(np.arange(num // 3), 3)
    return BehaviourPredictions(
        user_indices=users, targets=np.ones(num, np.int32), logits=logits, labels=labels
    )


def test_a_funnel_counts_what_it_holds_to_be_impossible():
    found = predictions()
    measured = behaviour_metrics(NAMES, found, None, NAMES)
    counts = funnel_counts(FUNNEL, NAMES, found, measured)["finish"]
    impossible = (found.labels[:, 0] == 0) & (found.labels[:, 1] == 1)
    assert counts == {
        "first": "like", "num_events": 55, "labels": int(impossible.sum()), "predicted": 0, "calibrated": 0,
    }  # fmt: skip
    measured["like"]["calibration"]["bias"] = -9.0
    assert funnel_counts(FUNNEL, NAMES, found, measured)["finish"]["calibrated"] == 60
    assert funnel_counts({"behaviour": Behaviour()}, NAMES, found, measured) == {}


def test_a_second_stage_is_judged_where_the_first_one_was():
    labels = predictions().labels
    asked = asked_labels({"second": Behaviour(behaviours=("finish",), given="like")}, NAMES, labels)
    np.testing.assert_array_equal(asked[:, 0], labels[:, 0])
    np.testing.assert_array_equal(asked[:, 1], np.where(labels[:, 0] == 1, labels[:, 1], -1))
    np.testing.assert_array_equal(asked_labels({"all": Behaviour()}, NAMES, labels), labels)


def test_every_event_of_a_split_is_judged(make_last_item_run, tmp_path):
    run = make_last_item_run(with_behaviours=True)
    dataset = run.dataset
    dataset.train_end[:], dataset.validation_end[:] = dataset.lengths // 3, dataset.lengths // 2
    rows = evaluation_rows(run, "test", rows_per_batch=8, every_event=True)
    predicted = predict_behaviours(run, rows)
    expected = [
        max(0, n - max(cut, 1)) for n, cut in zip(dataset.lengths, dataset.validation_end, strict=True)
    ]
    np.testing.assert_array_equal(np.bincount(predicted.user_indices, minlength=len(expected)), expected)
    write_predictions(tmp_path, dataset, predicted, ["finish"])
    table = pq.read_table(tmp_path / "behaviours.parquet")
    assert table.column_names == ["user_id", "item_id", "finish", "finish_logit"]
    assert table["item_id"].to_pylist() == dataset.item_keys[predicted.targets - 1].tolist()
    np.testing.assert_array_equal(table["finish_logit"], predicted.logits[:, 1])
