"""What an update is made of, fixed before anything else: the log as far as it was read, and where it is cut.

The whole log is read each time: it is the truth, an event is in it once, and who was erased is not in it. What is new
is decided by numbers of the log, which only grow.

E = events.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from jaxrec.data.staging import staged_directory
from jaxrec.serving.store import AddedItem, Feedback

__all__ = [
    "EVENTS_FILE",
    "ITEMS_FILE",
    "Mark",
    "Plan",
    "clocked_seconds",
    "discard",
    "holds",
    "plan_update",
    "read_plan",
    "write_snapshot",
]

EVENTS_FILE, ITEMS_FILE, PLAN_FILE = "log.parquet", "log_items.parquet", "plan.json"
Log = Sequence[tuple[int, Feedback]]

_EVENTS = pa.schema(
    [
        ("number", pa.int64()),
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("timestamp", pa.int64()),
        ("behaviour", pa.string()),
        ("value", pa.float64()),
    ]
)
_ITEMS = pa.schema(
    [
        ("item_id", pa.string()),
        ("title", pa.string()),
        ("text", pa.string()),
        ("categories", pa.list_(pa.string())),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
    """How far a model was trained: events up to `number`, all of which count as earlier than `seconds`."""

    number: int = 0
    seconds: int = np.iinfo(np.int64).min


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One update.

    Attributes:
      since: the time in seconds of the first event that is new to the model that answers.
      cut: events from this time on are held out; the next update trains on them.
      number: of the last event that is trained on.
      last: number of the last event that was read.
      new, held_out: how many events are new and trained on, or held out.
    """

    since: int
    cut: int
    number: int
    last: int
    new: int
    held_out: int

    @property
    def mark(self) -> Mark:
        """How far a model of this plan is trained."""
        return Mark(number=self.number, seconds=self.cut)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """As `write_snapshot` wrote it."""
        return cls(**json.loads(text))


def clocked_seconds(
    numbers: Int64[np.ndarray, " e"], seconds: Int64[np.ndarray, " e"], mark: Mark, start: int
) -> Int64[np.ndarray, " e"]:
    """Times that never fall along the log, so that a cut by time is one by number.

    An event that comes in late counts as of when it came: of the latest time before it, at least of `start`, and after
    the mark of the mark's.
    """
    floor = np.where(numbers > mark.number, max(mark.seconds, start), start)
    return np.maximum.accumulate(np.maximum(seconds, floor))


def plan_update(
    numbers: Int64[np.ndarray, " e"],
    timestamps: Int64[np.ndarray, " e"],
    mark: Mark,
    *,
    holdout: float,
    least_events: int,
) -> Plan | None:
    """Where the new events are cut; None = they are too few, or all of one second.

    Args:
      timestamps: as `clocked_seconds` gives them.
      mark: of the model that answers.
      holdout: share of the new events that is held out, the newest.
      least_events: that an update is made for.
    """
    new = timestamps[numbers > mark.number]
    if len(new) < max(least_events, 2):
        return None
    cut = new[-max(round(holdout * len(new)), 1)]
    if cut == new[0]:  # what is of one second is on one side
        later = new[new > cut]
        if not len(later):
            return None
        cut = later[0]
    held_out = int(np.count_nonzero(new >= cut))
    return Plan(
        since=int(new[0]),
        cut=int(cut),
        number=int(numbers[timestamps < cut][-1]),
        last=int(numbers[-1]),
        new=len(new) - held_out,
        held_out=held_out,
    )


def write_snapshot(
    directory: Path,
    plan: Plan,
    log: Log,
    timestamps: Int64[np.ndarray, " e"],
    items: Mapping[str, AddedItem],
) -> None:
    """Makes the directory of an update: there is no part of it without the others."""
    events = {
        "number": [number for number, _ in log],
        "user_id": [event.user_id for _, event in log],
        "item_id": [event.item_id for _, event in log],
        "timestamp": timestamps,
        "behaviour": [event.behaviour for _, event in log],
        "value": [event.value for _, event in log],
    }
    added = [dataclasses.asdict(item) for item in items.values()]
    with staged_directory(directory) as staging:
        pq.write_table(pa.table(events, schema=_EVENTS), staging / EVENTS_FILE, compression="zstd")
        pq.write_table(pa.Table.from_pylist(added, schema=_ITEMS), staging / ITEMS_FILE, compression="zstd")
        text = json.dumps(dataclasses.asdict(plan), indent=1) + "\n"
        (staging / PLAN_FILE).write_text(text, encoding="utf-8")


def read_plan(directory: Path) -> Plan | None:
    """The plan of an update that has begun; None = none has."""
    path = directory / PLAN_FILE
    return Plan.from_json(path.read_text(encoding="utf-8")) if path.is_file() else None


def discard(directory: Path) -> None:
    """Removes an update that has begun; one without a plan has not, however much of it is left by a kill."""
    (directory / PLAN_FILE).unlink()
    shutil.rmtree(directory)


def holds(directory: Path, log: Log) -> bool:
    """Whether the log up to the snapshot's end is still what the snapshot has: nobody was erased since."""
    numbers = pq.read_table(directory / EVENTS_FILE, columns=["number"])["number"].to_pylist()
    last = numbers[-1]
    return numbers == [number for number, _ in log if number <= last]
