"""What an experiment changes of the training events, by what comes out of prepare: nothing else may have moved."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.data.config import ColdItems, DataConfig, GlobalTime, LeaveOneOut, NoisyEvents
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.prepare import prepare

USERS, ITEMS, EVENTS = 40, 60, 1500


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    random = np.random.default_rng(0)
    events = {
        "user_id": random.integers(0, USERS, EVENTS),
        "item_id": 100 + np.minimum(random.geometric(0.05, EVENTS), ITEMS),
        "timestamp": random.integers(0, 10_000, EVENTS),
        "rating": random.integers(1, 6, EVENTS),
    }
    path = tmp_path_factory.mktemp("source")
    pq.write_table(pa.table(events), path / "events.parquet")
    return path


@pytest.fixture
def prepared(source, tmp_path):
    def make(name="out", **fields):
        prepare(DataConfig(path=str(source), **fields), tmp_path / name)
        return PreparedDataset.open(tmp_path / name)

    return make


def parts(dataset):
    """By user id: the items (their own ids) of the training, validation and test part, and all times and labels."""
    found = {}
    for user, key in enumerate(dataset.user_keys):
        one = dataset.histories(np.array([user]))
        items = dataset.item_keys[one.item_ids - 1].tolist()
        first, second = int(dataset.train_end[user]), int(dataset.validation_end[user])
        found[key] = (
            items[:first], items[first:second], items[second:], one.timestamps.tolist(), one.labels.tolist(),
        )  # fmt: skip
    return found


@pytest.mark.parametrize("split", [LeaveOneOut(), GlobalTime()])
def test_cold_items_are_targets_of_the_test_part_alone(prepared, split):
    before, dataset = prepared("whole", split=split), prepared("without", split=split, cold_items=ColdItems())
    trained = set(before.item_keys[before.item_counts[1:] > 0].tolist())
    cold = trained - set(dataset.item_keys[dataset.item_counts[1:] > 0].tolist())
    assert len(cold) == round(0.1 * len(trained))
    was, now = parts(before), parts(dataset)
    for user in was:
        for part in (0, 1):
            assert now[user][part] == [item for item in was[user][part] if item not in cold]
        assert now[user][2] == was[user][2]
    assert cold & {item for user in now.values() for item in user[2]}, "nothing is asked about new items"
    # Items without an event are the last ones: that is how training and evaluation tell them from the others.
    assert not dataset.item_counts[len(trained) - len(cold) + 1 :].any()
    assert dataset.item_counts[1 : len(trained) - len(cold) + 1].all()
    statistics = json.loads((dataset.directory / "statistics.json").read_text())
    assert statistics["rows"]["kept"] == EVENTS
    removed = EVENTS - dataset.metadata.num_events
    assert statistics["changes"] == {
        "cold_items": len(cold), "events_of_cold_items_removed": removed, "events_falsified": 0,
    }  # fmt: skip


def test_a_seed_draws_other_items_and_the_same_ones_again(prepared):
    def cold(name, seed):
        dataset = prepared(name, cold_items=ColdItems(seed=seed))
        return frozenset(dataset.item_keys[dataset.item_counts[1:] == 0].tolist())

    draws = [cold(str(place), seed) for place, seed in enumerate((0, 0, 1, 2))]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3


def test_a_user_may_lose_every_event(tmp_path):
    events = {"user_id": [1, 2, 2, 2], "item_id": [1, 2, 2, 2], "timestamp": [1, 1, 2, 3]}
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table(events), tmp_path / "set" / "events.parquet")
    for seed in range(20):  # one of two items is drawn: sooner or later the first
        config = DataConfig(path=str(tmp_path / "set"), cold_items=ColdItems(share=0.5, seed=seed))
        prepare(config, tmp_path / str(seed))
        dataset = PreparedDataset.open(tmp_path / str(seed))
        if dataset.lengths.tolist() == [0, 3]:
            return
        assert dataset.lengths.tolist() == [1, 1]
    pytest.fail("the first item was never drawn")


def test_noise_changes_items_of_training_events_and_nothing_else(prepared):
    before, dataset = prepared("whole"), prepared("noisy", noisy_events=NoisyEvents(share=0.2))
    was, now = parts(before), parts(dataset)
    changed = [a != b for user in was for a, b in zip(was[user][0], now[user][0], strict=True)]
    assert 0.15 < np.mean(changed) < 0.22  # some draws are the item that was there
    for user in was:
        assert now[user][1:] == was[user][1:]
    statistics = json.loads((dataset.directory / "statistics.json").read_text())
    assert sum(changed) <= statistics["changes"]["events_falsified"] < sum(changed) + 20
    assert dataset.item_counts.sum() == before.item_counts.sum()
    assert dataset.metadata.filter_seen == before.metadata.filter_seen
    drawn = [b for user in was for a, b in zip(was[user][0], now[user][0], strict=True) if a != b]
    rare = np.mean(np.array(drawn) > 120)
    assert rare > 0.5, "the draws follow popularity"


@pytest.mark.parametrize("change", [{"cold_items": ColdItems()}, {"noisy_events": NoisyEvents()}])
def test_changes_depend_neither_on_the_buckets_nor_go_unseen(prepared, monkeypatch, change):
    one, plain = prepared("one", **change), prepared("plain")
    assert one.metadata.fingerprint != plain.metadata.fingerprint
    monkeypatch.setattr("jaxrec.data.spool.ROWS_PER_BUCKET", 300)
    monkeypatch.setattr("jaxrec.data.sources._BATCH_ROWS", 170)
    many = prepared("many", **change)
    assert parts(one) == parts(many)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ColdItems(share=0.0), "cold_items.share=0.0 must lie between 0 and 1"),
        (lambda: NoisyEvents(share=1.0), "noisy_events.share=1.0 must lie between 0 and 1"),
    ],
)
def test_shares_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_share_that_is_no_item_is_refused(prepared):
    with pytest.raises(ValueError, match=r"cold_items.share=0.001 of \d+ items"):
        prepared(cold_items=ColdItems(share=0.001))
