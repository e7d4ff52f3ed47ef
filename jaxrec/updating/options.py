"""What an update is asked to do."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

__all__ = ["UpdateOptions"]

UPDATES = "updates"


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateOptions:
    """What an update is asked to do.

    Attributes:
      workdir: of the trained run; updates are kept in its `updates/`.
      model: the directory of exported versions.
      after: number of the log up to which the run's own data have its events.
      least_events: not read before that an update is made for.
      holdout: share of the new events, the newest, that the models are compared on.
      passes: how often the new events are trained on.
      replay_share: share of the training rows that are histories as they were before.
      tolerance: share of the metric that the new model may lose, by the lower end of the interval.
      least_users, most_users: users that the models are compared on; with fewer the old one stays.
      keep_versions: of the versions that updates have exported, how many of the newest stay; 0 = all.
      overrides: `--config.FIELD=VALUE` of the training.
    """

    workdir: Path
    model: Path
    after: int = 0
    least_events: int = 100
    holdout: float = 0.1
    passes: float = 8.0
    replay_share: float = 0.5
    tolerance: float = 0.02
    least_users: int = 20
    most_users: int = 5_000
    keep_versions: int = 0
    overrides: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, valid, constraint in (
            ("after", self.after >= 0, "at least 0"),
            ("least_events", self.least_events >= 1, "at least 1"),
            (
                "holdout",
                0 < self.holdout < 1,
                "above 0 and below 1: what neither model was trained on compares them",
            ),
            ("passes", 0 < self.passes < math.inf, "above 0"),
            ("replay_share", 0 <= self.replay_share < 1, "at least 0 and below 1"),
            ("tolerance", 0 <= self.tolerance < 1, "at least 0 and below 1"),
            ("least_users", self.least_users >= 1, "at least 1"),
            ("keep_versions", self.keep_versions >= 0, "at least 0"),
            ("most_users", self.most_users >= self.least_users, f"at least --least-users={self.least_users}"),
        ):
            if not valid:
                raise ValueError(f"--{name.replace('_', '-')}={getattr(self, name)} must be {constraint}.")

    @property
    def updates(self) -> Path:
        """Where updates are kept."""
        return self.workdir / UPDATES
