"""What to read and how to prepare it: the typed configuration of the data room.

Prepare reads `path`, `columns`, `split`, `cold_items`, `noisy_events`, `filter_seen`, `duplicates`, `text` and
`queries`; a change of one of these makes another prepared dataset (its fingerprint differs). The pipeline reads
`history_length`, `windows`, `train_users`, `train_since`, `replay_share` and `domain_temperature`, which change batches
and not files.
"""

from dataclasses import dataclass, field
from typing import Literal

from jaxrec.data.columns import ColumnMap
from jaxrec.data.own_source import OwnSource


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut:
    """The last event of a user is the test target and the one before it the validation target.

    Attributes:
      min_events: a user with fewer is kept for training alone
      validation: False = no validation target, one event more to train on: for the last training of a setup that was
        chosen before
    """

    min_events: int = 3
    validation: bool = True

    def __post_init__(self) -> None:
        if self.min_events < 3:
            raise ValueError(
                f"split.min_events={self.min_events}, but leave-one-out takes two events away and must leave one "
                "to train on; use 3 or more."
            )


@dataclass(frozen=True, kw_only=True)
class GlobalTime:
    """Everything before one moment is training, everything after another is test, for all users alike.

    No event of the training part is later than any event that is asked for.

    Attributes:
      validation_quantile: share of all events, by time, before the validation part
      test_quantile: share of all events before the test part
      moments: the times in seconds from which on events are of the validation and of the test part, in place of shares;
        the same time twice = no validation part. An event of unknown time is of the part that its order puts it in
    """

    validation_quantile: float = 0.8
    test_quantile: float = 0.9
    moments: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.moments is not None and not self.moments[0] <= self.moments[1]:
            raise ValueError(
                f"split.moments={self.moments} must be two times, the validation part's not after the test part's."
            )
        if not 0.0 < self.validation_quantile < self.test_quantile < 1.0:
            raise ValueError(
                f"split.validation_quantile={self.validation_quantile} and split.test_quantile={self.test_quantile} "
                "must satisfy 0 < validation_quantile < test_quantile < 1; the defaults are 0.8 and 0.9."
            )


def _check_share(name: str, share: float) -> None:
    if not 0.0 < share < 1.0:
        raise ValueError(
            f"{name}.share={share} must lie between 0 and 1, e.g. 0.1; none leaves the data as they are."
        )


@dataclass(frozen=True, kw_only=True)
class ColdItems:
    """Items that training never sees: what a model says of new items can then be measured.

    They are drawn among the items with a training event, each as likely as another. Their events are taken out of the
    training and the validation part of every history, after the split: they stay as targets of the test part alone.

    Attributes:
      share: of the items with a training event
      seed: of the draw
    """

    share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        _check_share("cold_items", self.share)


@dataclass(frozen=True, kw_only=True)
class NoisyEvents:
    """Training events that say nothing of their user: what a model loses by them can then be measured.

    After the split, each event of the training part has the same chance of getting another item, drawn evenly from the
    catalogue; its time and labels stay. Validation and test are untouched.

    Attributes:
      share: the chance
      seed: of the draws
    """

    share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        _check_share("noisy_events", self.share)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How item text becomes token ids.

    Attributes:
      max_tokens: tokens of an item, [CLS] and [SEP] among them
      vocabulary: a vocab.txt, or a BERT checkpoint directory that holds one; "" = MiniLM's, in this package
      lowercase: none = what the checkpoint's tokenizer_config.json says, and true without one
    """

    max_tokens: int = 32
    vocabulary: str = ""
    lowercase: bool | None = None

    def __post_init__(self) -> None:
        if not 3 <= self.max_tokens <= 4096:
            raise ValueError(
                f"text.max_tokens={self.max_tokens} must lie in 3..4096: [CLS], [SEP] and at least one word piece."
            )


@dataclass(frozen=True, kw_only=True)
class QueryConfig:
    """A table of texts and of the items that answer them: searches with what was chosen, or tags.

    Attributes:
      file: Parquet or CSV, beside the events
      text, item: its columns
      held_out_words: share of the words whose queries training does not see, half of it for validation, half for test
      held_out_pairs: share of the pairs of the other queries that training does not see, halved likewise
    """

    file: str
    text: str = "query"
    item: str = "item_id"
    held_out_words: float = 0.1
    held_out_pairs: float = 0.2

    def __post_init__(self) -> None:
        for name in ("held_out_words", "held_out_pairs"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(
                    f"data.queries.{name}={getattr(self, name)} must be at least 0 and below 1: it is a share."
                )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """One data set: where it is, what its columns mean, how it is split and served.

    Attributes:
      path: a directory as docs/data.md says, a file of events, or tfds:movielens/NAME; "" = the set in this package
      name: what the data set is called; "" = the directory's name
      columns: what the columns mean
      split: LeaveOneOut or GlobalTime
      cold_items: items that are taken out of training, for an experiment; none = all stay
      noisy_events: training events that are falsified, for an experiment; none = all are believed
      filter_seen: whether an item that a user has seen is no answer; none = the column map's word, else the data's
      duplicates: what to do with a row that equals another in all columns
      text: how item text becomes tokens
      queries: texts that items are searched by; none = there are none
      source: a subclass of OwnSource, in place of a path
      tfds_data_dir: where TFDS keeps its files; "" = its own default
      history_length: events of a user that a training row holds
      windows: last = the last `history_length` events of each user, all = every such window
      train_users: share of the users whose histories are trained on; the others are evaluated alone
      train_since: a time in seconds: histories with no training event from then on are left out, for a run that goes on
        from another one (docs/updating.md); none = all are trained on
      replay_share: with `train_since`, share of the rows that are histories as they were before that time
      domain_temperature: how the rows of several domains are mixed: 1 = by their numbers, large = evenly
    """

    path: str = ""
    name: str = ""
    columns: ColumnMap = field(default_factory=ColumnMap)
    split: LeaveOneOut | GlobalTime = field(default_factory=LeaveOneOut)
    cold_items: ColdItems | None = None
    noisy_events: NoisyEvents | None = None
    filter_seen: bool | None = None
    duplicates: Literal["keep", "drop"] = "keep"
    text: TextConfig = field(default_factory=TextConfig)
    queries: QueryConfig | None = None
    tfds_data_dir: str = ""
    source: OwnSource | None = None

    history_length: int = 200
    windows: Literal["last", "all"] = "last"
    train_users: float = 1.0
    train_since: int | None = None
    replay_share: float = 0.0
    domain_temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.history_length < 1:
            raise ValueError(f"data.history_length={self.history_length} must be at least 1.")
        if not 0.0 < self.train_users <= 1.0:
            raise ValueError(f"data.train_users={self.train_users} must lie above 0 and at most at 1.")
        if not 0.0 <= self.replay_share < 1.0:
            raise ValueError(f"data.replay_share={self.replay_share} must be at least 0 and below 1.")
        if self.replay_share and self.train_since is None:
            raise ValueError(
                f"data.replay_share={self.replay_share} is of what was before data.train_since, which is none; "
                "set both."
            )
        if not self.domain_temperature >= 1.0:
            raise ValueError(
                f"data.domain_temperature={self.domain_temperature} must be at least 1: domains by their sizes."
            )
        if self.duplicates not in ("keep", "drop"):
            raise ValueError(f"data.duplicates={self.duplicates!r} must be 'keep' or 'drop'.")
        if self.windows not in ("last", "all"):
            raise ValueError(f"data.windows={self.windows!r} must be 'last' or 'all'.")
