"""The column map: usual names are found, what is declared wins, and what is missing is named."""

import pytest

from jaxrec.config import apply_overrides
from jaxrec.data.columns import (
    ColumnMap,
    ValueLabel,
    direct_behaviours,
    fill_from,
    find_item_column,
    flag_behaviour,
    resolve_events,
    text_columns,
)
from jaxrec.data.config import DataConfig, GlobalTime

NAMES = ("user_id", "item_id", "timestamp", "order", "rating", "is_click", "long_view", "behaviour", "extra")


def test_usual_names_are_found():
    found = resolve_events(ColumnMap(), NAMES, "here")
    assert (found.user, found.item, found.timestamp, found.order) == (
        "user_id",
        "item_id",
        "timestamp",
        "order",
    )
    assert found.value == ValueLabel(column="rating", name="like", at_least=4.0)
    assert found.flags == ("is_click", "long_view")
    assert found.behaviour == "behaviour"
    assert direct_behaviours(found) == ("like", "click", "long_view")
    bare = resolve_events(ColumnMap(), ("userId", "movieId"), "here")
    assert (bare.user, bare.item, bare.timestamp, bare.order, bare.value.column) == (
        "userId",
        "movieId",
        "-",
        "-",
        "-",
    )
    assert (bare.flags, bare.behaviour) == ((), "-")


def test_what_is_declared_wins():
    wanted = ColumnMap(
        user="extra", timestamp="-", value=ValueLabel(column="extra"), flags=("long_view",), behaviour="-"
    )
    found = resolve_events(wanted, NAMES, "here")
    assert (found.user, found.timestamp, found.flags, found.behaviour) == ("extra", "-", ("long_view",), "-")
    assert found.value == ValueLabel(column="extra", name="extra", at_least=1.0)
    assert resolve_events(ColumnMap(value=ValueLabel(column="-")), NAMES, "here").value.column == "-"


@pytest.mark.parametrize(
    "wanted",
    [
        ColumnMap(user="who"),
        ColumnMap(timestamp="who"),
        ColumnMap(flags=("who",)),
        ColumnMap(value=ValueLabel(column="who")),
    ],
)
def test_a_declared_column_must_exist(wanted):
    with pytest.raises(ValueError, match="'who', but here has the columns user_id, item_id"):
        resolve_events(wanted, NAMES, "here")


def test_a_missing_user_or_item_is_named():
    with pytest.raises(ValueError, match=r"here has no user column.*item_id.*columns.user"):
        resolve_events(ColumnMap(), ("item_id",), "here")
    with pytest.raises(ValueError, match="no item column"):
        resolve_events(ColumnMap(item="-"), NAMES, "here")


def test_a_flag_keeps_its_whole_name_where_the_short_one_is_taken():
    found = resolve_events(ColumnMap(), ("user_id", "item_id", "rating", "is_like"), "here")
    assert direct_behaviours(found) == ("like", "is_like")
    assert [flag_behaviour(name) for name in ("is_click", "click", "is_")] == ["click", "click", "is_"]
    with pytest.raises(ValueError, match="not distinct"):
        direct_behaviours(resolve_events(ColumnMap(flags=("long_view", "long_view")), NAMES, "here"))


def test_a_known_map_fills_what_the_user_left_open():
    label = ValueLabel(column="r", name="like", at_least=4.0)
    known = ColumnMap(user="u", text=("title",), filter_seen=False, value=label)
    assert fill_from(ColumnMap(), known) == known
    mine = fill_from(ColumnMap(user="me", value=ValueLabel(at_least=3.0)), known)
    assert (mine.user, mine.text) == ("me", ("title",))
    assert mine.value == ValueLabel(column="r", name="like", at_least=3.0)
    other = fill_from(ColumnMap(value=ValueLabel(column="count")), known)
    assert (other.value.column, other.value.name) == ("count", "")


def test_item_columns_and_text_columns():
    names = ("movieId", "title", "genres", "abstract")
    assert find_item_column(ColumnMap(item="item_id"), "item", names, "here") == "movieId"
    assert find_item_column(ColumnMap(), "categories", names, "here") == "genres"
    assert text_columns(ColumnMap(), names, "here") == ("title", "genres", "abstract")
    assert text_columns(ColumnMap(text=("abstract",)), names, "here") == ("abstract",)
    assert text_columns(ColumnMap(text=("-",)), names, "here") == ()
    assert text_columns(ColumnMap(title="abstract"), names, "here") == ("abstract", "title", "genres")
    with pytest.raises(ValueError, match="columns.text='plot'"):
        text_columns(ColumnMap(text=("plot",)), names, "here")


def test_settings_are_checked():
    with pytest.raises(ValueError, match="timestamp_unit='h'"):
        ColumnMap(timestamp_unit="h")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="id_type='int'"):
        ColumnMap(id_type="int")  # type: ignore[arg-type]
    for fields, words in (
        ({"history_length": 0}, "history_length=0"),
        ({"duplicates": "x"}, "duplicates='x'"),
        ({"windows": "x"}, "windows='x'"),
    ):
        with pytest.raises(ValueError, match=words):
            DataConfig(**fields)


def test_dotted_overrides_reach_every_field():
    overrides = [
        "--data.path=somewhere",
        "--data.columns.user=u",
        "--data.columns.value.at_least=3.5",
        '--data.columns.flags=["a", "b"]',
        "--data.split=GlobalTime",
        "--data.split.test_quantile=0.95",
        "--data.text.max_tokens=48",
    ]
    config = apply_overrides(DataConfig(), overrides, prefix="data")
    assert (config.path, config.columns.user, config.columns.value.at_least) == ("somewhere", "u", 3.5)
    assert config.columns.flags == ("a", "b")
    assert config.split == GlobalTime(test_quantile=0.95)
    assert config.text.max_tokens == 48
    with pytest.raises(ValueError, match="user"):
        apply_overrides(DataConfig(), ["--data.columns.usr=u"], prefix="data")
