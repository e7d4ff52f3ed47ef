"""The history of updates: a JSON line each, which is all the state that outlives an update.

Who answers and how far it was trained follow from the lines, and the file is replaced whole: there is no second place
that could say something else after a kill.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from jaxrec.updating.snapshot import Mark

__all__ = ["Outcome", "add_outcome", "read_outcomes", "standing", "write_text"]

HISTORY_FILE = "history.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of an update.

    Attributes:
      number: 1, 2, ...
      promoted: whether the new model answers now.
      text: the decision, with its numbers, for people.
      run: directory of the new model's run, in the directory of updates.
      version: name of the exported version; "" = none.
      trained_to, trained_before: number and time of the log up to which, and before which, the new model was trained.
      last: number of the last event that was read.
      new_events, held_out_events: of the log.
      new_items, new_users: rows that the last model had not.
      num_train_steps: of the new model.
      metric: that was compared, over `targets` held-out events of `users` users.
      old, new: the means of the model that answered and of the new one; difference, low, high, p_value: of the paired
        test, new minus old.
      seconds, processor_seconds: of the sitting that came to the decision.
      finished: when, UTC.
    """

    number: int
    promoted: bool
    text: str
    run: str
    version: str
    trained_to: int
    trained_before: int
    last: int
    new_events: int
    held_out_events: int
    new_items: int
    new_users: int
    num_train_steps: int
    metric: str
    targets: int
    users: int
    old: float
    new: float
    difference: float
    low: float
    high: float
    p_value: float
    seconds: float
    processor_seconds: float
    finished: str

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Outcome":
        """As `to_json` wrote it."""
        return cls(**json.loads(text))


def read_outcomes(updates: Path) -> list[Outcome]:
    """All updates that have ended, the oldest first.

    Raises:
      ValueError: the file is damaged.
    """
    path = updates / HISTORY_FILE
    if not path.is_file():
        return []
    try:
        return [Outcome.from_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); mend the line, or take another --workdir, whose updates begin anew."
        ) from error


def add_outcome(updates: Path, outcome: Outcome) -> None:
    """Adds a line; it is there whole or not at all."""
    lines = [one.to_json() for one in (*read_outcomes(updates), outcome)]
    write_text(updates / HISTORY_FILE, "".join(f"{line}\n" for line in lines))


def standing(outcomes: Sequence[Outcome], first: Mark) -> tuple[str, Mark]:
    """The run that answers ("" = the one that the updates began with), and how far it was trained."""
    promoted = [outcome for outcome in outcomes if outcome.promoted]
    if not promoted:
        return "", first
    last = promoted[-1]
    return last.run, Mark(number=last.trained_to, seconds=last.trained_before)


def write_text(path: Path, text: str) -> None:
    """Writes a file beside its place, to the disk, and renames it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
