"""Several directories as one data set: no id means two things, and no domain loses what it says."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec.config import TrainConfig, apply_overrides, from_json, to_json
from jaxrec.data.config import DataConfig
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.domains import Domains
from jaxrec.data.prepare import prepare
from jaxrec.tasks.next_item import NextItem

SHOP = {"user_id": [1, 1, 1, 2, 2, 2], "item_id": [1, 2, 3, 3, 2, 1], "order": [0, 1, 2, 0, 1, 2]}
VIDEO = {
    "userId": ["1", "1", "1", None], "movieId": ["2", "1", "2", "1"], "order": [5, 3, 4, 0],
    "timestamp": [50, 30, 40, 60], "is_click": [1, 0, None, 1],
}  # fmt: skip
SHOP_ITEMS = {"item_id": [1, 2, 9], "title": ["Soap", "Comb", "Hat"], "categories": ["a|b", "b", "c"]}
VIDEO_ITEMS = {"movieId": ["1", "2"], "title": ["Heat", "Up"], "genres": [["a"], ["d", "e"]]}


@pytest.fixture
def paths(tmp_path):
    """A shop and a video app whose users and items have the same ids."""
    for name, events, items in (("shop", SHOP, SHOP_ITEMS), ("video", VIDEO, VIDEO_ITEMS)):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table(events), tmp_path / name / "events.parquet")
        pq.write_table(pa.table(items), tmp_path / name / "items.parquet")
    return {name: str(tmp_path / name) for name in ("shop", "video")}


def prepared(paths, out):
    prepare(DataConfig(source=Domains(paths=paths)), out)
    return PreparedDataset.open(out)


def test_the_same_id_in_two_domains_is_two_items_and_two_users(paths, tmp_path):
    dataset = prepared(paths, tmp_path / "out")
    assert dataset.metadata.domains == ("shop", "video")
    assert dataset.user_keys.tolist() == ["shop:1", "shop:2", "video:1"]
    assert dataset.user_domains.tolist() == [1, 1, 2]
    keys = dataset.item_keys.tolist()
    assert sorted(keys) == ["shop:1", "shop:2", "shop:3", "video:1", "video:2"]
    assert dataset.item_domains.tolist() == [0] + [1 if key.startswith("shop") else 2 for key in keys]
    events = dataset.histories(np.array([0, 2]))
    found = [keys[item - 1] for item in events.item_ids]
    assert found == ["shop:1", "shop:2", "shop:3", "video:1", "video:2", "video:2"], "each in its own order"
    assert events.labels[:, 0].tolist() == [-1, -1, -1, 0, -1, 1], "what the shop has no word for is unknown"


def test_titles_and_text_are_kept_and_categories_say_whose_they_are(paths, tmp_path):
    dataset = prepared(paths, tmp_path / "out")
    of = dict(zip(dataset.item_keys, range(1, 6), strict=True))
    titles = dict(zip(of, dataset.titles(np.array(list(of.values()))), strict=True))
    assert (titles["shop:1"], titles["video:1"], titles["shop:3"]) == ("Soap", "Heat", "")
    categories = dict(zip(of, dataset.item_categories, strict=True))
    assert categories["shop:1"] == ("shop:a", "shop:b")
    assert categories["video:1"] == ("video:a",)
    text = pq.read_table(tmp_path / "out" / "items.parquet")
    words = dict(zip(text["item_id"].to_pylist(), text["text"].to_pylist(), strict=True))
    assert (words["shop:1"], words["video:2"]) == ("Soap. a, b", "Up. d, e")


def test_what_cannot_be_used_is_set_aside_with_its_domain_and_row(paths, tmp_path):
    prepared(paths, tmp_path / "out")
    (row,) = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert (row["source"], row["row"]) == ("events:video/events.parquet", 3)
    assert row["reason"] == "user_id is null"
    statistics = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert (statistics["rows"]["read"], statistics["rows"]["kept"]) == (10, 9)
    assert statistics["items"]["never_seen"] == 1


def test_csv_and_parquet_join_and_a_broken_line_is_told(paths, tmp_path):
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "events.csv").write_text("user,item,order\n1,1,0\n1,2\n1,2,1\n")
    with pytest.raises(ValueError, match=r"the column 'order' is int64 in shop, binary in csv"):
        prepared({"shop": paths["shop"], "csv": str(tmp_path / "csv")}, tmp_path / "out")
    dataset = prepared({"csv": str(tmp_path / "csv")}, tmp_path / "out")
    assert dataset.metadata.domains == ("csv",)
    assert not dataset.metadata.has_domains
    (row,) = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert (row["source"], row["row"]) == ("events:csv/events.csv", 1)


def test_the_fingerprint_follows_names_and_contents(paths, tmp_path):
    first = prepared(paths, tmp_path / "a").metadata.fingerprint
    other_name = {"shop": paths["shop"], "films": paths["video"]}
    assert prepared(other_name, tmp_path / "b").metadata.fingerprint != first
    moved = tmp_path / "elsewhere"
    (tmp_path / "video").rename(moved)
    assert prepared(paths | {"video": str(moved)}, tmp_path / "c").metadata.fingerprint == first


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"timestamp": [1, 2, 3]}, r"no common column .* \(shop an order, other a time\)"),
        ({"order": ["a", "b", "c"]}, "'order' is int64 in shop, string in other"),
    ],
)
def test_domains_that_cannot_be_joined_are_refused(paths, tmp_path, columns, message):
    (tmp_path / "other").mkdir()
    events = {"user_id": [1, 1, 1], "item_id": [1, 2, 3]} | columns
    pq.write_table(pa.table(events), tmp_path / "other" / "events.parquet")
    with pytest.raises(ValueError, match=message):
        prepared({"shop": paths["shop"], "other": str(tmp_path / "other")}, tmp_path / "out")


def test_two_scales_of_value_are_refused(paths, tmp_path):
    for name, column in (("films", "rating"), ("music", "play_count")):
        (tmp_path / name).mkdir()
        events = {"user_id": [1, 1, 1], "item_id": [1, 2, 3], "order": [0, 1, 2], column: [1, 2, 3]}
        pq.write_table(pa.table(events), tmp_path / name / "events.parquet")
    both = {name: str(tmp_path / name) for name in ("films", "music")}
    with pytest.raises(ValueError, match="columns.value differs between the domains .* train these domains"):
        prepared(both, tmp_path / "out")
    dataset = prepared(paths | {"films": both["films"]}, tmp_path / "out")
    assert dataset.metadata.behaviours == ("like", "click")


def test_names_and_places_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"'a:b' cannot be a domain's name"):
        Domains(paths={"a:b": ""})
    with pytest.raises(ValueError, match="source.paths is empty"):
        Domains(paths={})
    with pytest.raises(ValueError, match=r"source.paths.shop: .*nowhere"):
        prepare(DataConfig(source=Domains(paths={"shop": str(tmp_path / "nowhere")})), tmp_path / "out")


def test_a_config_holds_the_paths():
    config = TrainConfig(
        name="x", data=DataConfig(source=Domains(paths={"a": "A"})), tasks={"n": NextItem()},
        num_train_steps=1, global_batch_size=8,
    )  # fmt: skip
    changed = apply_overrides(config, ["--config.data.source.paths.b=B", "--config.data.source.paths.a=C"])
    assert changed.data.source == Domains(paths={"a": "C", "b": "B"})
    assert from_json(to_json(changed), TrainConfig) == changed


@pytest.mark.shared_data
def test_two_shops_keep_every_user_and_item(shared_data, tmp_path):
    """The counts are those that their README.md say, and none is lost or merged."""
    folders = {"beauty": "amazon14-beauty", "industrial": "amazon18-industrial"}
    dataset = prepared(
        {name: str(shared_data / folder) for name, folder in folders.items()}, tmp_path / "out"
    )
    assert np.bincount(dataset.user_domains).tolist() == [0, 22363, 3285]
    assert np.bincount(dataset.item_domains).tolist() == [1, 12101, 3541]
    assert dataset.metadata.num_events == 198502 + 22743
