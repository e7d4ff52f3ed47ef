"""Context columns: hashed, kept with the histories, laid into batches, and never a label."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.data.columns import ColumnMap
from jaxrec.data.config import DataConfig
from jaxrec.data.context import context_ids
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.evaluation_batches import evaluation_batches
from jaxrec.data.pipeline import train_batches
from jaxrec.data.prepare import prepare, prepared_fingerprint

EVENTS = {
    "user_id": [1, 1, 1, 1, 2, 2, 2],
    "item_id": [10, 20, 30, 40, 10, 30, 20],
    "order": list(range(7)),
    "click": [0, 1, 0, 1, 1, 0, 1],
    "device": ["phone", "desk", None, "phone", "phone", "desk", "tablet"],
    "place": [1, 2, 3, 1, 2, 3, 1],
}


def prepared(tmp_path, *context):
    source = tmp_path / "source"
    source.mkdir(exist_ok=True)
    pq.write_table(pa.table(EVENTS), source / "events.parquet")
    out = tmp_path / "-".join(["out", *context])
    prepare(DataConfig(path=str(source), columns=ColumnMap(context=context)), out)
    return out


def test_a_value_has_one_number_whatever_the_type_of_its_column():
    words = context_ids(pa.array(["a", None, "b", "a"]), "x")
    assert words[1] == 0
    assert words[0] == words[3] != words[2]
    assert (words[[0, 2]] > 0).all()
    np.testing.assert_array_equal(context_ids(pa.array([3, 4]), "n"), context_ids(pa.array(["3", "4"]), "n"))
    assert context_ids(pa.array(["a"]), "y") != words[0], "the column is part of the feature"
    np.testing.assert_array_equal(context_ids(pa.array([None, None], pa.string()), "x"), [0, 0])
    with pytest.raises(ValueError, match="columns.context names 'affinity', which is of type list"):
        context_ids(pa.array([[1.0]]), "affinity")


@pytest.mark.parametrize("memory_budget_bytes", [1 << 20, 0])
def test_context_goes_with_its_event_into_training_and_evaluation(tmp_path, memory_budget_bytes):
    dataset = PreparedDataset.open(
        prepared(tmp_path, "device", "place"), memory_budget_bytes=memory_budget_bytes
    )
    assert dataset.metadata.context == ("device", "place")
    devices = context_ids(pa.array(EVENTS["device"]), "device")
    places = context_ids(pa.array(EVENTS["place"]), "place")
    expected = np.stack([devices, places], axis=1)
    np.testing.assert_array_equal(dataset.histories(np.arange(2)).context, expected)

    stream = train_batches(dataset, global_batch_size=1, history_length=8, stop_step=1)
    batch = next(stream)
    stream.close()
    for user, events in ((1, slice(0, 2)), (2, slice(4, 5))):  # leave-one-out takes two events of each away
        np.testing.assert_array_equal(batch.context[batch.user_ids == user], expected[events])
    assert not batch.context[batch.segment_ids == 0].any()

    asked = next(evaluation_batches(dataset, "test", rows_per_batch=1, history_length=8))
    order = np.argsort(asked.user_indices[asked.user_mask])
    np.testing.assert_array_equal(asked.target_context[asked.user_mask][order], expected[[3, 6]])


def test_without_context_nothing_changes(tmp_path):
    dataset = PreparedDataset.open(prepared(tmp_path))
    assert dataset.metadata.context == ()
    assert dataset.histories(np.arange(2)).context is None
    assert prepared_fingerprint(tmp_path / "out") != prepared_fingerprint(prepared(tmp_path, "place"))


@pytest.mark.parametrize(
    ("context", "said"),
    [("click", "names 'click', which is a label"), ("nothing", "columns.context='nothing', but ")],
)
def test_a_label_or_a_missing_column_is_refused(tmp_path, context, said):
    with pytest.raises(ValueError, match=said):
        prepared(tmp_path, context)
