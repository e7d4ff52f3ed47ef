"""What a user has done, as the user tower reads it: of a request, or of the version and the state.

L = events.
"""

from collections.abc import Sequence

import numpy as np

from jaxrec.export.catalogue import Key
from jaxrec.export.events import UserEvents
from jaxrec.serving.store import Store
from jaxrec.serving.version import Version
from jaxrec.serving.view import View

__all__ = ["events_of"]


def events_of(
    version: Version, view: View, store: Store, user_id: Key | None, history: Sequence[Key] | None
) -> UserEvents:
    """Those of the request, or what the version was exported with and the state has had since.

    In ids of the view; what it does not know is left out.
    """
    if history is not None:
        return UserEvents.of_items(view.ids_of(history))
    if user_id is None:
        return UserEvents.of_items(np.zeros(0, np.int64))
    before = version.history(str(user_id))
    since = store.history(str(user_id))
    if not since:
        return before
    known = [(item, event) for event in since if (item := view.id_of(event.item_id))]
    labels = None
    if version.event_labels is not None:
        labels = version.event_labels.labels([(event.behaviour, event.value) for _, event in known])
    new = UserEvents(
        np.array([item for item, _ in known], np.int64),
        np.array([event.seconds for _, event in known], np.int64),
        labels,
    )
    return before.then(new)
