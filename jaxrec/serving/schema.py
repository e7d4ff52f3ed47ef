"""What goes over the wire: requests with their bounds, answers with their reasons.

Ids are the users' and the catalogue's own: text or whole numbers. Everything that a client sends has a bound, an
unknown field is an error that names it, and nothing is taken for what it is not: "1" and true are no numbers.

What the docstrings say is what /openapi.json and /docs say; `examples` are in the requests that /docs shows.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StringConstraints
from typing_extensions import TypeAliasType  # typing's own from Python 3.12 on

from jaxrec.export.manifest import LONGEST_NAME

__all__ = [
    "AddItem", "Answer", "BundleRequest", "ErrorAnswer", "ExplainAnswer", "ExplainRequest", "FeedbackEvent",
    "FeedbackRequest", "Filter", "HideItem", "Key", "RankRequest", "RecommendRequest", "ScoredBy", "SearchRequest",
    "ShownItem", "SimilarRequest", "Text", "Told",
]  # fmt: skip

MOST_ITEMS, MOST_HISTORY, MOST_IDS, MOST_EVENTS = 100, 1_000, 1_000, 100

Text = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
# An alias with a name is told once, and referred to.
Key = TypeAliasType(
    "Key",
    Annotated[
        Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | Text,
        Field(description="Your own id of a user or an item: a whole number, or text.", examples=[1]),
    ],
)
Name = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Count = Annotated[StrictInt, Field(ge=1, le=MOST_ITEMS)]
ScoredBy = Literal["model", "formula", "popularity", "likeness", "words"]
VersionName = Annotated[str, StringConstraints(max_length=LONGEST_NAME, pattern=r"^[A-Za-z0-9._-]*$")]
Finite = Annotated[StrictFloat, Field(allow_inf_nan=False)]
Boost = Annotated[
    StrictFloat, Field(ge=-1e6, le=1e6)
]  # sums of them are finite, and a score is not lost in them


def _tell_fields(schema: dict[str, Any]) -> None:
    """Takes what the docstring says of the fields to the fields."""
    text, _, attributes = schema["description"].partition("\n\nAttributes:\n")
    schema["description"] = text
    for names, told in re.findall(r"^  ([\w, ]+): (.*(?:\n    .*)*)", attributes, flags=re.M):
        for name in names.split(", "):
            schema["properties"][name]["description"] = " ".join(told.split())


class Told(BaseModel):
    """Its fields are described as its docstring describes them."""

    model_config = ConfigDict(json_schema_extra=_tell_fields)


class _Strict(Told):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Filter(_Strict):
    """Which items may come.

    Attributes:
      any_of: categories; an item must be in one of them.
      none_of: categories; an item must be in none of them.
      allow: nothing but these items; null = any.
      added_after: seconds since 1970; items that came in earlier do not come.
      max_per_category: in the list; 0 = no limit.
      min_score: of the model; null = any.
    """

    any_of: tuple[Name, ...] = Field(default=(), max_length=50)
    none_of: tuple[Name, ...] = Field(default=(), max_length=50)
    allow: tuple[Key, ...] | None = Field(default=None, max_length=MOST_IDS)
    added_after: StrictInt = Field(default=0, ge=0, lt=2**40)
    max_per_category: StrictInt = Field(default=0, ge=0, le=MOST_ITEMS)
    min_score: Finite | None = None


class RecommendRequest(_Strict):
    """A list for a user.

    Attributes:
      user_id: whose list; null = a guest.
      k: items of the list.
      offset: items that come before it, on earlier pages.
      history: items, oldest first, in the place of what is remembered of the user.
      exclude: items that are not to come.
      filter: which items may come.
      diversity: 0 = by score alone, 1 = as different as can be.
      diversity_by: maximal marginal relevance, or a determinantal point process.
      calibration: 0 = by score alone, 1 = categories in the shares that they have in the history.
      boosts: category -> what is added to the score.
      explore: whether the list may try what the model is unsure of; null = as the server is set.
      explore_seed: of a guest's earlier answer, so that the next page belongs to it; "" = a guest gets a new one.
      deadline_ms: after which nobody waits any more; null = as the server is set.
      version: of the model; "" = as the server deals them.
    """

    user_id: Key | None = Field(default=None, examples=[1])
    k: Count = Field(default=10, examples=[5])
    offset: StrictInt = Field(default=0, ge=0, le=10_000)
    history: tuple[Key, ...] | None = Field(default=None, max_length=MOST_HISTORY)
    exclude: tuple[Key, ...] = Field(default=(), max_length=MOST_IDS)
    filter: Filter = Filter()
    diversity: StrictFloat = Field(default=0.0, ge=0.0, le=1.0)
    diversity_by: Literal["mmr", "dpp"] = "mmr"
    calibration: StrictFloat = Field(default=0.0, ge=0.0, le=1.0)
    boosts: dict[Name, Boost] = Field(default_factory=dict, max_length=50)
    explore: StrictBool | None = None
    explore_seed: str = Field(default="", max_length=64, pattern=r"^[A-Za-z0-9._-]*$")
    deadline_ms: StrictInt | None = Field(default=None, ge=1, le=60_000)
    version: VersionName = ""


class RankRequest(_Strict):
    """Scores of given items for a user: the model's, or the formula's where it names task heads.


    Attributes:
      user_id: whose scores; null = a guest.
      items: what is scored.
      history: items, oldest first, in the place of what is remembered of the user.
    """

    user_id: Key | None = Field(default=None, examples=[1])
    items: tuple[Key, ...] = Field(min_length=1, max_length=MOST_IDS)
    history: tuple[Key, ...] | None = Field(default=None, max_length=MOST_HISTORY)


class SimilarRequest(_Strict):
    """Items like one.

    Attributes:
      item_id: what they are like.
      k: items of the list.
      filter: which items may come.
    """

    item_id: Key
    k: Count = 10
    filter: Filter = Filter()


class SearchRequest(_Strict):
    """Items by text.

    Attributes:
      query: words.
      user_id: whose version of the model answers; null = a guest.
      k: items of the list.
      filter: which items may come.
    """

    query: Text = Field(examples=["toy story"])
    user_id: Key | None = None
    k: Count = 10
    filter: Filter = Filter()


class BundleRequest(_Strict):
    """A set of items that go together.

    Attributes:
      user_id: whose set; null = a guest.
      history: items, oldest first, in the place of what is remembered of the user.
      size: items of the set.
      diversity: 0 = by score alone, 1 = as different as can be.
      filter: which items may come.
    """

    user_id: Key | None = Field(default=None, examples=[1])
    history: tuple[Key, ...] | None = Field(default=None, max_length=MOST_HISTORY)
    size: StrictInt = Field(default=5, ge=2, le=20)
    diversity: StrictFloat = Field(default=0.5, ge=0.0, le=1.0)
    filter: Filter = Filter()


class ExplainRequest(_Strict):
    """Why an item.

    Attributes:
      user_id: for whom; null = a guest.
      item_id: which item.
      history: items, oldest first, in the place of what is remembered of the user.
      version: of the model; "" = as the server deals them.
    """

    user_id: Key | None = Field(default=None, examples=[1])
    item_id: Key
    history: tuple[Key, ...] | None = Field(default=None, max_length=MOST_HISTORY)
    version: VersionName = ""


class FeedbackEvent(_Strict):
    """Something that a user did.

    Attributes:
      user_id: who did it.
      item_id: with which item.
      behaviour: what it was; one that the data have by this name is told to a model that reads behaviours.
      value: how much of it, such as a rating.
      event_id: the client's name of the event, so that a retry counts once; null = the server makes one.
      seconds: since 1970; null = now.
      version, propensity: of the answer that had shown the item.
    """

    user_id: Key
    item_id: Key
    behaviour: Annotated[str, StringConstraints(max_length=64)] = ""
    value: Finite | None = None
    event_id: Text | None = None
    seconds: StrictInt | None = Field(default=None, ge=0, lt=2**40)
    version: str = Field(default="", max_length=LONGEST_NAME)
    propensity: StrictFloat | None = Field(default=None, gt=0.0, le=1.0)


class FeedbackRequest(_Strict):
    """Events, in their order.

    Attributes:
      events: what users did.
    """

    events: tuple[FeedbackEvent, ...] = Field(min_length=1, max_length=MOST_EVENTS)


class AddItem(_Strict):
    """An item that the model has never seen.

    Attributes:
      item_id: an id that the catalogue does not have.
      title: its name.
      text: what else there is to say of it.
      categories: which it is in; new ones too.
    """

    item_id: Key = Field(examples=["new"])
    title: Text = Field(examples=["Toy Story 12"])
    text: str = Field(default="", max_length=5_000)
    categories: tuple[Name, ...] = Field(default=(), max_length=50)


class HideItem(_Strict):
    """Hides an item, or shows it again.

    Attributes:
      item_id: which item.
      hidden: false = it is shown again.
    """

    item_id: Key
    hidden: StrictBool = Field(default=True, examples=[False])


class ShownItem(Told):
    """An item of an answer.

    Attributes:
      item_id: which item.
      title: "" = it has none.
      score: what the answer's `scored_by` says; what was added by boosts is in the model's.
      source: where the candidate came from.
      reasons: sentences for a person.
      propensity: of the choice, where the list explores.
      explored: another item would have stood there.
    """

    item_id: Key
    title: str
    score: float | None
    source: Literal["model", "item_knn", "ease", "ials", "content", "popular", "trending", "recent", "given"]
    reasons: list[str] = Field(default_factory=list)
    propensity: float | None = None
    explored: bool = False


class Answer(Told):
    """A list.

    Attributes:
      items: the list.
      model_version: which version of the model answered.
      scored_by: what the scores are: the model's, the formula's (and behind the candidates that it orders the
        model's), the logarithm of 1 + training events, a cosine of vectors, or one of words.
      degraded: something was left out to be in time; `notes` say what.
      known_user: whether the model was asked with a history.
      notes: sentences for a person.
      explore_seed: what the list's draws were made with; "" = it does not explore.
    """

    items: list[ShownItem]
    model_version: str
    scored_by: ScoredBy = "model"
    degraded: bool = False
    known_user: bool = True
    notes: list[str] = Field(default_factory=list)
    explore_seed: str = ""


class ExplainAnswer(Told):
    """Why an item.

    Attributes:
      item_id: which item.
      title: "" = it has none.
      reasons: sentences for a person.
      model_version: which version of the model answered.
      degraded: something was left out to be in time; `notes` say what.
      notes: sentences for a person.
    """

    item_id: Key
    title: str
    reasons: list[str]
    model_version: str
    degraded: bool = False
    notes: list[str] = Field(default_factory=list)


class ErrorAnswer(Told):
    """What went wrong.

    Attributes:
      error: what is wrong, and what to do.
    """

    error: str
