"""The column maps of public data sets: what their columns mean, and the traps that their files hold.

A directory that bears one of these names, and has the columns, is read by its map; fields that the user sets win.
To add a data set, add a line here; docs/data.md shows one.
"""

from collections.abc import Mapping
from dataclasses import replace

from jaxrec.data.columns import ABSENT, ColumnMap, ValueLabel

__all__ = ["COLUMN_MAPS"]

_LIKE = ValueLabel(column="rating", name="like", at_least=4.0)

# Events with a place in the history, and no labels.
_PLAIN = ColumnMap(
    user="user_id",
    item="item_id",
    timestamp="timestamp",
    order="order",
    value=ValueLabel(column=ABSENT),
    flags=(ABSENT,),
    behaviour=ABSENT,
    filter_seen=True,
)
# The numbers in `timestamp` are positions in the history: there is no clock to split by.
_RANKED = replace(_PLAIN, timestamps_are_ranks=True)
# Neither time nor order: the order of the file stands.
_UNTIMED = replace(_PLAIN, timestamp=ABSENT, order=ABSENT)
_MOVIELENS = replace(_PLAIN, value=_LIKE, category_separator="|", text=("title", "genres"))

COLUMN_MAPS: Mapping[str, ColumnMap] = {
    "amazon14-beauty": replace(_RANKED, categories="attribute_ids", text=("keywords",)),
    "amazon14-sports": replace(_RANKED, categories="attribute_ids", text=("keywords",)),
    "amazon14-beauty-bert4rec": _RANKED,
    "amazon18-industrial": replace(_RANKED, text=("title", "brand", "description")),
    # Self-selected ratings come first in the file, the random ones last: leave-one-out asks for random ones.
    "coat": replace(_UNTIMED, value=_LIKE),
    "kuairand-kcore15": replace(
        _PLAIN,
        flags=(
            "is_click",
            "is_follow",
            "is_comment",
            "is_forward",
            "long_view",
            "is_profile_enter",
            "is_like_vs_hate",
        ),
    ),
    # 260 plays is the median: half of the events are `listen_often`.
    "lastfm-2k": replace(
        _UNTIMED, value=ValueLabel(column="listen_count", name="listen_often", at_least=260.0)
    ),
    "ml-100k": replace(_MOVIELENS, category_separator=" "),
    # 46 % of the times are null, which is legal beside an order. The 598 events of rare items have no order; 335 of
    # them have a time and slot in by it, 263 have neither and cannot be placed. `timestamp_est` is an estimate and
    # never used unless asked for.
    "ml-1m": replace(_MOVIELENS, text=("title", "genres", "abstract")),
    # Titles and genres are those of ml-1m, whose item ids this set keeps.
    "ml-1m-sasrec": replace(
        _MOVIELENS,
        timestamp=ABSENT,
        value=ValueLabel(column=ABSENT),
        items="../ml-1m/items.parquet",
        text=("title", "genres", "abstract"),
    ),
    "ml-latest-small": _MOVIELENS,
    # Sessions of clicks: the same item comes again and again, so a seen item is a good answer.
    "rsc15-100k": replace(_PLAIN, filter_seen=False),
    "yelp-khgt": replace(_PLAIN, behaviour="behaviour"),
}
