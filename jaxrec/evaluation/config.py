"""What is measured, how often, and beside what."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxrec.evaluation.groups import Group
from jaxrec.evaluation.slates import Slate

METRICS = ("hr", "recall", "ndcg", "mrr")
BEHAVIOUR_BASELINES = ("item_rate", "logistic_regression")
BASELINES = ("popularity", "recent_popularity", "transition", "item_knn", "ease", "ials")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation during training (`every_steps`, `max_users`) and of `python -m jaxrec.evaluate` (the rest).

    Attributes:
      ks: cut-offs of the ranking metrics.
      metric: the one that is headlined, and that validation selects by, as `name@k`.
      every_steps: steps between validations while training, of which the last is at its end; 0 = never.
      max_users: users per validation while training; 0 = all. The final evaluation always takes all.
      rows_per_batch: packed rows that are encoded at a time; changes the speed only.
      list_length: recommendations per user that coverage, novelty and diversity look at; the whole catalogue where
        that is smaller.
      baselines: simple models to print beside the model.
      bootstrap_samples: resamples of the users behind each interval.
      ranking_events: which targets are ranked: "first" = each user's first event of the split, "all" = every event of
        the split that has a past, each from all events before it; for splits by time, and for sessions.
      cold_items: also rank the targets that training never saw among the items that it never saw.
      behaviour_events: where behaviours are judged: "first" = at each user's target, "all" = at every event of the
        split, which a split by time has more of.
      behaviour_baselines: simple models of behaviours to print beside the model, of "item_rate" and
        "logistic_regression".
      slates: sets of items to choose from each user's best ones, by name, beside the plain lists.
      groups: ways to make one list for several users, by name, measured on groups of friends.
      group_size: members of the groups that are measured.
      confidence: of the intervals; a paired difference is called significant at 1 - confidence.
      seed: of the resampling and of the users shown as examples.
      example_users: users shown in the report with their history and recommendations.
    """

    ks: tuple[int, ...] = (1, 5, 10, 20, 50)
    metric: str = "ndcg@10"
    every_steps: int = 0
    max_users: int = 0
    rows_per_batch: int = 32
    list_length: int = 10
    baselines: tuple[str, ...] = BASELINES
    bootstrap_samples: int = 1000
    ranking_events: Literal["first", "all"] = "first"
    cold_items: bool = False
    behaviour_events: Literal["first", "all"] = "first"
    behaviour_baselines: tuple[str, ...] = ()
    slates: Mapping[str, Slate] = field(default_factory=dict)
    groups: Mapping[str, Group] = field(default_factory=dict)
    group_size: int = 3
    confidence: float = 0.95
    seed: int = 0
    example_users: int = 4

    @property
    def draws(self) -> dict[str, Any]:
        """How the functions of `evaluation.significance` resample."""
        return {"num_samples": self.bootstrap_samples, "confidence": self.confidence, "seed": self.seed}

    def __post_init__(self) -> None:
        if not self.ks or any(k < 1 for k in self.ks) or list(self.ks) != sorted(set(self.ks)):
            raise ValueError(
                f"evaluation.ks={self.ks} must be growing cut-offs of at least 1, e.g. (1, 5, 10)."
            )
        names = [f"{name}@{k}" for name in METRICS for k in self.ks] + ["mrr"]
        if self.metric not in names:
            hint = "" if re.fullmatch(r"\w+@\d+", self.metric) else ' (written as "ndcg@10")'
            raise ValueError(f"evaluation.metric={self.metric!r}{hint} is not one of {', '.join(names)}.")
        unknown = [name for name in self.baselines if name not in BASELINES]
        if unknown:
            raise ValueError(f"evaluation.baselines has {unknown[0]!r}; known are {', '.join(BASELINES)}.")
        unknown = [name for name in self.behaviour_baselines if name not in BEHAVIOUR_BASELINES]
        if unknown:
            raise ValueError(
                f"evaluation.behaviour_baselines has {unknown[0]!r}; known are {', '.join(BEHAVIOUR_BASELINES)}."
            )
        if not 0.5 <= self.confidence < 1.0:
            raise ValueError(f"evaluation.confidence={self.confidence} must lie in 0.5 .. 1; 0.95 is usual.")
        for name, least in (
            ("rows_per_batch", 1),
            ("list_length", 1),
            ("bootstrap_samples", 100),
            ("group_size", 2),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"evaluation.{name}={getattr(self, name)} must be at least {least}.")
        for name in ("ranking_events", "behaviour_events"):
            if getattr(self, name) not in ("first", "all"):
                raise ValueError(f"evaluation.{name}={getattr(self, name)!r} must be 'first' or 'all'.")
        for name in ("every_steps", "max_users", "example_users", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"evaluation.{name}={getattr(self, name)} must not be negative.")
