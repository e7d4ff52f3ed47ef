"""The run's data and the log as one data set."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.data.columns import ColumnMap
from jaxrec.data.config import DataConfig
from jaxrec.data.dataset import UNKNOWN_TIME, PreparedDataset
from jaxrec.data.prepare import prepare
from jaxrec.export.events import EventLabels
from jaxrec.export.histories import label_facts
from jaxrec.serving.store import AddedItem, Feedback
from jaxrec.updating.grown_data import grown_config
from jaxrec.updating.snapshot import Plan, write_snapshot

PLAN = Plan(since=100, cut=102, number=2, last=3, new=2, held_out=1)


def grown(tmp_path, events, log, *, items=(), config=None):
    """A data set of `events` and then of `log`: (user, item, behaviour, value) at seconds 100, 101, ..."""
    source = tmp_path / "source"
    source.mkdir()
    pq.write_table(pa.table(events), source / "events.parquet")
    config = config or DataConfig(path=str(source))
    config = dataclasses.replace(config, path=str(source))
    prepare(config, tmp_path / "base")
    rows = [
        (number, Feedback(event_id=str(number), user_id=user, item_id=item, behaviour=behaviour, value=value))
        for number, (user, item, behaviour, value) in enumerate(log, 1)
    ]
    write_snapshot(
        tmp_path / "snapshot",
        PLAN,
        rows,
        np.arange(100, 100 + len(rows)),
        {item.item_id: item for item in items},
    )
    base = PreparedDataset.open(tmp_path / "base")
    prepare(grown_config(config, base, tmp_path / "snapshot", PLAN.cut), tmp_path / "grown")
    return PreparedDataset.open(tmp_path / "grown")


def histories(dataset):
    """User -> (item, seconds) of each event, in own ids."""
    found = dataset.histories(np.arange(dataset.metadata.num_users))
    return {
        str(user): [
            (str(dataset.item_keys[item - 1]), None if at == UNKNOWN_TIME else int(at))
            for item, at in zip(found.item_ids[begin:end], found.timestamps[begin:end], strict=True)
        ]
        for user, begin, end in zip(dataset.user_keys, found.offsets[:-1], found.offsets[1:], strict=True)
    }


EVENTS = {
    "user_id": [1, 1, 2, 1],
    "item_id": [10, 11, 10, 12],
    "timestamp": [5, 6, 7, 8],
    "rating": [5, 1, None, 4],
    "is_click": [1, 0, 1, None],
}
LOG = [("1", "13", "click", 2.0), ("3", "10", "", 5.0), ("2", "13", "unheard of", None)]


def test_histories_go_on_with_the_log(tmp_path):
    new = AddedItem(item_id="13", title="thirteen", text="words", categories=("a",))
    dataset = grown(tmp_path, EVENTS, LOG, items=[new])
    assert histories(dataset) == {
        "1": [("10", 5), ("11", 6), ("12", 8), ("13", 100)],
        "2": [("10", 7), ("13", 102)],
        "3": [("10", 101)],
    }
    assert dataset.train_end.tolist() == dataset.validation_end.tolist() == [4, 1, 1]
    assert dataset.user_keys.dtype == dataset.item_keys.dtype == np.int64
    assert dataset.metadata.behaviours == ("like", "click")
    assert dataset.metadata.num_events == len(EVENTS["user_id"]) + len(LOG)
    events = dataset.histories(np.array([0, 1, 2]))
    labels = dict(zip(["1"] * 4 + ["2"] * 2 + ["3"], events.labels.tolist(), strict=False))
    assert events.labels.tolist() == [[1, 1], [0, 0], [1, -1], [0, 1], [-1, 1], [-1, -1], [1, -1]]
    assert labels["3"] == [1, -1]
    number = dataset.item_keys.tolist().index(13)
    assert dataset.titles(np.array([number + 1])) == ["thirteen"]
    assert dataset.item_categories[number] == ("a",)


def test_a_name_says_that_the_others_are_not_meant(tmp_path):
    events = {k: v for k, v in EVENTS.items() if k in ("user_id", "item_id", "timestamp")}
    events["behaviour"] = ["view", "buy", "view", "view"]
    dataset = grown(
        tmp_path, events, [("1", "10", "buy", None), ("1", "10", "", None), ("9", "10", "view", None)]
    )
    assert dataset.metadata.behaviours == ("buy", "view")
    labels = dataset.histories(np.arange(3)).labels.tolist()
    assert labels[3:5] == [[1, 0], [-1, -1]] and labels[-1] == [0, 1]


def served_labels(tmp_path, log):
    """As a server labels what it is told, whose model was trained on the run's data."""
    base = PreparedDataset.open(tmp_path / "base")
    labels = EventLabels(behaviours=base.metadata.behaviours, **label_facts(base))
    return labels.labels([(behaviour, value) for _, _, behaviour, value in log]).tolist()


def test_a_server_labels_events_as_training_does(tmp_path):
    (tmp_path / "flags").mkdir()
    grown(tmp_path / "flags", EVENTS, LOG)
    assert served_labels(tmp_path / "flags", LOG) == [[0, 1], [1, -1], [-1, -1]]
    assert served_labels(tmp_path / "flags", [("1", "13", "like", None)]) == [[1, -1]], "at its word"
    (tmp_path / "names").mkdir()
    events = {k: v for k, v in EVENTS.items() if k in ("user_id", "item_id", "timestamp")}
    events["behaviour"] = ["view", "buy", "view", "view"]
    log = [("1", "10", "buy", None), ("1", "10", "", None), ("9", "10", "view", None), ("1", "10", "?", 1.0)]
    dataset = grown(tmp_path / "names", events, log)
    found = served_labels(tmp_path / "names", log)
    assert found == [[1, 0], [-1, -1], [0, 1], [0, 0]]
    trained = dataset.histories(np.arange(3)).labels.tolist()
    assert [trained[3], trained[4], trained[-1], trained[5]] == found


def test_ids_that_are_no_numbers_make_text_of_all(tmp_path):
    dataset = grown(
        tmp_path, EVENTS, [("guest-1", "10", "", None), ("07", "11", "", None), ("1", "11", "", None)]
    )
    assert sorted(histories(dataset)) == ["07", "1", "2", "guest-1"]
    assert dataset.item_keys.dtype == np.int64
    assert histories(dataset)["1"][-1] == ("11", 102)


def test_data_without_times_go_on_by_their_order(tmp_path):
    events = {"user_id": [1, 1, 2], "item_id": [10, 11, 10], "order": [0, 1, 0]}
    dataset = grown(tmp_path, events, LOG)
    assert histories(dataset)["1"] == [("10", None), ("11", None), ("13", 100)]
    assert dataset.train_end.tolist() == [3, 1, 1]


def test_context_is_refused(tmp_path):
    config = DataConfig(columns=ColumnMap(context=("device",)))
    events = EVENTS | {"device": ["a", "b", "a", "b"]}
    with pytest.raises(
        ValueError, match=r"the run has data.columns.context, and the server's log has nothing"
    ):
        grown(tmp_path, events, LOG, config=config)
