"""What goes over the wire: requests with their bounds, answers with their reasons.

Ids are the users' and the catalogue's own: text or whole numbers. Everything that a client sends has a bound, an
unknown field is an error that names it, and nothing is taken for what it is not: "1" and true are no numbers.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StringConstraints

__all__ = [
    "AddItem", "Answer", "BundleRequest", "ErrorAnswer", "ExplainRequest", "FeedbackEvent", "FeedbackRequest", "Filter",
    "HideItem", "Key", "RankRequest", "RecommendRequest", "SearchRequest", "ShownItem", "SimilarRequest",
    "Text",
]  # fmt: skip

MOST_ITEMS, MOST_HISTORY, MOST_IDS, MOST_EVENTS = 100, 1_000, 1_000, 100

Text = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
Key = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | Text
Name = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Count = Annotated[StrictInt, Field(ge=1, le=MOST_ITEMS)]
Finite = Annotated[StrictFloat, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Filter(_Strict):
    """Which items may come.

    Attributes:
      any_of, none_of: categories.
      allow: nothing but these items.
      added_after: seconds since 1970.
      max_per_category: in the list; 0 = no limit.
      min_score: of the model's score.
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
      user_id: whose list; None = a guest.
      k: items; `offset` of them come before, on earlier pages.
      history: items, oldest first, in the place of what is remembered of the user.
      exclude: items that are not to come.
      diversity: 0 = by score alone, 1 = as different as can be.
      calibration: 0 = by score alone, 1 = categories in the shares that they have in the history.
      boosts: category -> what is added to the score.
      explore: whether the list may try what the model is unsure of; None = as the server is set.
      deadline_ms: after which nobody waits any more.
      version: of the model; "" = as the server deals them.
    """

    user_id: Key | None = None
    k: Count = 10
    offset: StrictInt = Field(default=0, ge=0, le=10_000)
    history: tuple[Key, ...] | None = Field(default=None, max_length=MOST_HISTORY)
    exclude: tuple[Key, ...] = Field(default=(), max_length=MOST_IDS)
    filter: Filter = Filter()
    diversity: StrictFloat = Field(default=0.0, ge=0.0, le=1.0)
    calibration: StrictFloat = Field(default=0.0, ge=0.0, le=1.0)
    boosts: dict[Name, Finite] = Field(default_factory=dict, max_length=50)
    explore: StrictBool | None = None
    deadline_ms: StrictInt | None = Field(default=None, ge=1, le=60_000)
    version: str = Field(default="", max_length=64, pattern=r"^[A-Za-z0-9._-]*$")


class RankRequest(_Strict):
    """Scores of given items for a user."""

    user_id: Key | None = None
    items: tuple[Key, ...] = Field(min_length=1, max_length=MOST_IDS)
    history: tuple[Key, ...] | None = Field(default=None, max_length=MOST_HISTORY)


class SimilarRequest(_Strict):
    """Items like one."""

    item_id: Key
    k: Count = 10
    filter: Filter = Filter()


class SearchRequest(_Strict):
    """Items by text."""

    query: Text
    user_id: Key | None = None
    k: Count = 10
    filter: Filter = Filter()


class BundleRequest(_Strict):
    """A set of items that go together."""

    user_id: Key | None = None
    history: tuple[Key, ...] | None = Field(default=None, max_length=MOST_HISTORY)
    size: StrictInt = Field(default=5, ge=2, le=20)
    diversity: StrictFloat = Field(default=0.5, ge=0.0, le=1.0)
    filter: Filter = Filter()


class ExplainRequest(_Strict):
    """Why an item."""

    user_id: Key | None = None
    item_id: Key
    history: tuple[Key, ...] | None = Field(default=None, max_length=MOST_HISTORY)


class FeedbackEvent(_Strict):
    """Something that a user did.

    Attributes:
      event_id: the client's name of the event, so that a retry counts once; None = the server makes one.
      seconds: since 1970; None = now.
      version, propensity: of the answer that had shown the item.
    """

    user_id: Key
    item_id: Key
    behaviour: Annotated[str, StringConstraints(max_length=64)] = ""
    value: Finite | None = None
    event_id: Text | None = None
    seconds: StrictInt | None = Field(default=None, ge=0, lt=2**40)
    version: str = Field(default="", max_length=64)
    propensity: StrictFloat | None = Field(default=None, gt=0.0, le=1.0)


class FeedbackRequest(_Strict):
    """Events, in their order."""

    events: tuple[FeedbackEvent, ...] = Field(min_length=1, max_length=MOST_EVENTS)


class AddItem(_Strict):
    """An item that the model has never seen."""

    item_id: Key
    title: Text
    text: str = Field(default="", max_length=5_000)
    categories: tuple[Name, ...] = Field(default=(), max_length=50)


class HideItem(_Strict):
    """Hides an item, or shows it again."""

    item_id: Key
    hidden: StrictBool = True


class ShownItem(BaseModel):
    """An item of an answer.

    Attributes:
      score: of the model; what was added by boosts is in it.
      source: where the candidate came from.
      reasons: sentences for a person.
      propensity: of the choice, where the list explores.
    """

    item_id: Key
    title: str
    score: float | None
    source: Literal["model", "item_knn", "ease", "ials", "content", "popular", "trending", "recent", "given"]
    reasons: list[str] = Field(default_factory=list)
    propensity: float | None = None
    explored: bool = False


class Answer(BaseModel):
    """A list.

    Attributes:
      degraded: something was left out to be in time; `notes` say what.
      known_user: whether the model was asked with a history.
    """

    items: list[ShownItem]
    model_version: str
    degraded: bool = False
    known_user: bool = True
    notes: list[str] = Field(default_factory=list)
    request_id: str = ""


class ErrorAnswer(BaseModel):
    """What is wrong, and what to do."""

    error: str
