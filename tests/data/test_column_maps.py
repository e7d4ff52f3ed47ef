"""The committed column maps, each on the data set it is for: its counts, its labels and its traps."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.data.column_maps import COLUMN_MAPS
from jaxrec.data.columns import ABSENT, ColumnMap
from jaxrec.data.config import DataConfig, GlobalTime, TextConfig
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.prepare import embedded_path, prepare

pytestmark = pytest.mark.shared_data

# name: events, users, items, behaviours, has times, filter_seen
EXPECTED = {
    "amazon14-beauty": (198_502, 22_363, 12_101, (), False, True),
    "amazon14-beauty-bert4rec": (353_962, 40_226, 54_542, (), False, True),
    "amazon14-sports": (296_337, 35_598, 18_357, (), False, True),
    "amazon18-industrial": (22_743, 3_285, 3_541, (), False, True),
    "coat": (11_600, 290, 300, ("like",), False, True),
    "kuairand-kcore15": (
        41_828, 664, 9_359,
        ("click", "follow", "comment", "forward", "long_view", "profile_enter", "like_vs_hate"), True, True,
    ),
    "lastfm-2k": (92_834, 1_892, 17_632, ("listen_often",), False, True),
    "ml-100k": (100_000, 943, 1_682, ("like",), True, True),
    "ml-1m": (999_946, 6_040, 3_631, ("like",), True, True),
    "ml-1m-sasrec": (999_611, 6_040, 3_416, (), False, True),
    "ml-latest-small": (100_836, 610, 9_724, ("like",), True, True),
    "rsc15-100k": (83_846, 21_210, 2_933, (), True, False),
    "yelp-khgt": (722_659, 19_800, 22_734, ("dislike", "neutral", "tip"), True, True),
}  # fmt: skip
RANKED = ("amazon14-beauty", "amazon14-beauty-bert4rec", "amazon14-sports", "amazon18-industrial")
UNTIMED = ("coat", "lastfm-2k", "ml-1m-sasrec")


@pytest.fixture(scope="module")
def tiny_vocabulary(tmp_path_factory):
    place = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    place.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    return TextConfig(vocabulary=str(place), max_tokens=4)


def test_every_map_is_tested():
    assert set(EXPECTED) == set(COLUMN_MAPS)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_set_is_read_by_its_map(name, shared_data, tmp_path, tiny_vocabulary):
    prepare(DataConfig(path=str(shared_data / name), text=tiny_vocabulary), tmp_path / "out")
    dataset = PreparedDataset.open(tmp_path / "out")
    found = dataset.metadata
    assert (
        found.num_events, found.num_users, found.num_items, found.behaviours, found.has_timestamps, found.filter_seen,
    ) == EXPECTED[name]  # fmt: skip
    assert found.name == name
    statistics = json.loads((tmp_path / "out" / "statistics.json").read_text(encoding="utf-8"))
    assert statistics["rows"]["quarantined"] == (263 if name == "ml-1m" else 0)
    assert statistics["times"]["are_ranks"] == (name in RANKED)
    assert statistics["rows"]["order_against_timestamp"] == 0
    if name.startswith("ml-1m"):
        assert dataset.titles(np.array([1])) == ["American Beauty (1999)"]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_directory_without_a_map_is_found_out_alike(name, shared_data, tmp_path, tiny_vocabulary):
    """Under another name the columns alone decide; they must say the same, thresholds of counts apart."""
    (tmp_path / "set").mkdir()
    events = pq.read_table(shared_data / name / "events.parquet")
    pq.write_table(events.slice(0, 20_000), tmp_path / "set" / "events.parquet")
    prepare(DataConfig(path=str(tmp_path / "set"), text=tiny_vocabulary), tmp_path / "out")
    found = PreparedDataset.open(tmp_path / "out").metadata
    *_, behaviours, has_times, filter_seen = EXPECTED[name]
    assert (found.behaviours, found.has_timestamps, found.filter_seen) == (behaviours, has_times, filter_seen)


@pytest.mark.parametrize("name", [*RANKED, *UNTIMED])
def test_global_time_is_refused_where_there_is_no_time(name, shared_data, tmp_path):
    words = "ranks" if name in RANKED else "no timestamp column"
    with pytest.raises(ValueError, match=words):
        prepare(DataConfig(path=str(shared_data / name), split=GlobalTime()), tmp_path / "out")


def test_ranks_are_found_out_without_a_map(shared_data, tmp_path):
    (tmp_path / "set").mkdir()
    table = pq.read_table(shared_data / "amazon18-industrial" / "events.parquet")
    pq.write_table(table, tmp_path / "set" / "events.parquet")
    with pytest.raises(ValueError, match="ranks"):
        prepare(DataConfig(path=str(tmp_path / "set"), split=GlobalTime()), tmp_path / "out")


def test_ml_1m_splits_by_time_with_its_estimated_times_only(shared_data, tmp_path, tiny_vocabulary):
    config = DataConfig(path=str(shared_data / "ml-1m"), split=GlobalTime(), text=tiny_vocabulary)
    with pytest.raises(ValueError, match="460877 of 999946 events have a null timestamp"):
        prepare(config, tmp_path / "out")
    (tmp_path / "ml-1m").mkdir()
    events = pq.read_table(shared_data / "ml-1m" / "events.parquet").slice(600_000, 50_000)
    pq.write_table(events, tmp_path / "ml-1m" / "events.parquet")
    columns = ColumnMap(timestamp="timestamp_est")
    prepare(replace(config, path=str(tmp_path / "ml-1m"), columns=columns), tmp_path / "out")
    assert PreparedDataset.open(tmp_path / "out").metadata.split == "global_time"


@pytest.mark.parametrize(
    ("name", "words"), [("goodbooks-10k", "has no events"), ("open-bandit", "holds impressions")]
)
def test_sets_without_events_are_refused_in_words(name, words, shared_data, tmp_path):
    with pytest.raises(ValueError, match=words):
        prepare(DataConfig(path=str(shared_data / name)), tmp_path / "out")


def test_a_directory_that_bears_a_known_name_but_other_columns_is_read_by_its_columns(tmp_path, caplog):
    (tmp_path / "ml-1m").mkdir()
    pq.write_table(pa.table({"uid": [1, 1], "iid": [5, 6]}), tmp_path / "ml-1m" / "events.parquet")
    prepare(DataConfig(path=str(tmp_path / "ml-1m")), tmp_path / "out")
    assert PreparedDataset.open(tmp_path / "out").metadata.num_items == 2
    assert "does not fit its column map" in caplog.text


def test_ml_1m_sasrec_does_without_its_neighbour(shared_data, tmp_path, tiny_vocabulary, caplog):
    (tmp_path / "ml-1m-sasrec").mkdir()
    table = pq.read_table(shared_data / "ml-1m-sasrec" / "events.parquet").slice(0, 1000)
    pq.write_table(table, tmp_path / "ml-1m-sasrec" / "events.parquet")
    prepare(DataConfig(path=str(tmp_path / "ml-1m-sasrec"), text=tiny_vocabulary), tmp_path / "out")
    assert PreparedDataset.open(tmp_path / "out").titles(np.array([1])) == [""]
    assert "no titles" in caplog.text


def test_the_embedded_set_is_the_shared_one(shared_data):
    shared = shared_data / "ml-latest-small"
    for table, columns in (("events", None), ("items", ["item_id", "title", "genres", "year"])):
        ours = pq.read_table(embedded_path() / f"{table}.parquet")
        theirs = pq.read_table(shared / f"{table}.parquet", columns=columns)
        assert ours.to_pylist() == theirs.select(ours.column_names).to_pylist()
    text = (shared / "LICENSE-README.txt").read_bytes()
    assert (embedded_path() / "LICENSE-README.txt").read_bytes() == text


def test_maps_without_a_label_declare_them_absent():
    """A map is whole: nothing is left to guessing, so that a later column cannot change its meaning."""
    for columns in COLUMN_MAPS.values():
        assert columns.user and columns.item and columns.timestamp and columns.order
        assert columns.value.column
        assert columns.behaviour
        assert columns.flags
        assert columns.filter_seen is not None
        assert columns.value.column == ABSENT or columns.value.at_least
