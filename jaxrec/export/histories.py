"""What a server knows of users from the start: their latest events, and how later ones are labelled.

E = events, K = behaviours.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from jaxrec.data.columns import ABSENT
from jaxrec.data.dataset import UNKNOWN_TIME, PreparedDataset
from jaxrec.data.packing import Windows
from jaxrec.export.events import UNKNOWN_LABEL

__all__ = ["histories_of", "label_facts"]


def histories_of(dataset: PreparedDataset, most: int, *, labels: bool) -> pa.Table:
    """The latest events of every user, of all parts of the split, in own ids; see `catalogue.write_histories`."""
    lengths = np.minimum(dataset.lengths, most)
    events = dataset.windows(
        Windows(users=np.arange(len(lengths)), starts=dataset.lengths - lengths, lengths=lengths)
    )
    offsets = events.offsets.astype(np.int32)
    keys = pa.array(dataset.item_keys[events.item_ids - 1])
    seconds = pa.array(np.where(events.timestamps == UNKNOWN_TIME, -1, events.timestamps))
    columns = {
        "user_id": pa.array(np.asarray(dataset.user_keys)),
        "item_ids": pa.ListArray.from_arrays(pa.array(offsets), keys),
        "seconds": pa.ListArray.from_arrays(pa.array(offsets), seconds),
    }
    if labels:
        num_behaviours = events.labels.shape[1]
        columns["labels"] = pa.ListArray.from_arrays(
            pa.array(offsets * num_behaviours), pa.array(events.labels.ravel())
        )
    return pa.table(columns)


def label_facts(dataset: PreparedDataset) -> dict[str, Any]:
    """What `events.EventLabels` is made of; of a data set in memory nothing is known."""
    others, at_least = UNKNOWN_LABEL, None
    if columns := dataset.statistics.get("columns"):
        if columns["behaviour"] not in (ABSENT, ""):
            others = 0
        if columns["value"]["column"] not in (ABSENT, ""):
            at_least = columns["value"]["at_least"]
    return {"others": others, "at_least": at_least}
