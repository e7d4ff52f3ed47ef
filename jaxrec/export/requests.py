"""Requests to check and to warm up with: histories of the run's own users, and texts of its items.

B = users, L = events, X = items to leave out, C = candidates.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from jaxrec.data.dataset import UNKNOWN_TIME, PreparedDataset
from jaxrec.export.layout import ITEM_TOWER, USER_TOWER, history_lengths
from jaxrec.export.programs import ProgramSpec
from jaxrec.export.served_model import ServedModel

NUM_CANDIDATES = 20
OF_EVENTS = {"item_ids": 0, "seconds": -1, "labels": -1}  # and what stands after the last event
OF_CANDIDATES = {"candidate_ids", "candidate_context"}
WARM_UP_ROWS = (1, 8)  # a request alone, and some that a server has put together


def spread_users(dataset: PreparedDataset, count: int) -> Int[np.ndarray, " u"]:
    """Users with events, from the one with the fewest to the one with the most."""
    known = np.flatnonzero(dataset.lengths > 0)
    order = known[np.argsort(dataset.lengths[known], kind="stable")]
    return order[np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).astype(int))]


def requests_of(
    programs: Mapping[str, ProgramSpec],
    model: ServedModel,
    dataset: PreparedDataset,
    users: Int[np.ndarray, " u"],
) -> dict[str, dict[str, np.ndarray]]:
    """For each program the arrays that these users' whole histories are; one more user has none.

    The user tower is also asked with beginnings of the longest history, so that every length that it is written for has
    one that fills it.
    """
    arrays = _of_histories(model, dataset, users)
    rng = np.random.default_rng(0)
    candidates = (len(users) + 1, NUM_CANDIDATES)
    arrays["candidate_ids"] = rng.integers(0, model.facts.num_items + 1, candidates, np.int32)
    if model.facts.context:
        arrays["candidate_context"] = rng.integers(
            0, 2**31 - 1, (*candidates, len(model.facts.context)), np.int32
        )
    items = rng.integers(0, model.facts.num_items + 1, len(users) + 1, np.int32)
    if model.config.text is not None:
        arrays["token_ids"] = np.asarray(dataset.item_tokens[items], np.int32)
        items = np.where(np.arange(len(items)) % 2, items, 0).astype(np.int32)
    found = {}
    for name, program in programs.items():
        found[name] = {array.name: arrays[array.name] for array in program.inputs}
        if name == ITEM_TOWER:
            found[name]["item_ids"] = items
        if name == USER_TOWER:
            found[name] = with_beginnings(found[name], history_lengths(model.max_events - model.masked))
    return found


def warm_up_requests(
    requests: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, list[dict[str, np.ndarray]]]:
    """The first rows of the requests, some at a time."""
    return {
        name: [{key: array[:rows] for key, array in inputs.items()} for rows in WARM_UP_ROWS]
        for name, inputs in requests.items()
    }


def sized_request(
    inputs: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], size: tuple[int, ...]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Rows of a request whose histories are short enough for a program of this size, and what is expected of them.

    The rows go evenly from the longest history to the shortest; where the request has fewer rows or candidates than
    `size` says, some come again.

    Args:
      size: users, events and, of task heads, candidates.
    """
    num_rows, length, *candidates = size
    fitting = np.flatnonzero(~inputs["item_ids"][:, length:].any(axis=1))
    order = np.argsort(np.count_nonzero(inputs["item_ids"][fitting], axis=1), kind="stable")
    rows = fitting[order[np.linspace(len(order) - 1, 0, num_rows).astype(int)]]
    found = {name: array[rows] for name, array in inputs.items()}
    wanted = {name: array[rows] for name, array in expected.items()}
    for name in OF_EVENTS.keys() & inputs.keys():
        array = found[name]
        padded = np.full((num_rows, length, *array.shape[2:]), OF_EVENTS[name], array.dtype)
        padded[:, : array.shape[1]] = array[:, :length]
        found[name] = padded
    if candidates:
        places = np.resize(np.arange(inputs["candidate_ids"].shape[1]), candidates)
        for name in OF_CANDIDATES & inputs.keys():
            found[name] = found[name][:, places]
        wanted = {name: array[:, places] for name, array in wanted.items()}
    return found, wanted


def with_beginnings(inputs: Mapping[str, np.ndarray], lengths: Sequence[int]) -> dict[str, np.ndarray]:
    """The request of a tower, and its longest history cut to each of the lengths that are below it."""
    counts = np.count_nonzero(inputs["item_ids"], axis=1)
    longest = int(np.argmax(counts))
    shorter = [length for length in lengths if length < counts[longest]]
    found = {}
    for name, array in inputs.items():
        added = np.repeat(array[longest : longest + 1], len(shorter), axis=0)
        for row, length in zip(added, shorter, strict=True):
            if name in OF_EVENTS:
                row[length:] = OF_EVENTS[name]
        found[name] = np.concatenate([array, added])
    return found


def _of_histories(
    model: ServedModel, dataset: PreparedDataset, users: Int[np.ndarray, " u"]
) -> dict[str, np.ndarray]:
    """Left to right, oldest first; a last row is empty."""
    histories = dataset.histories(users)
    lengths = np.diff(histories.offsets)
    kept = np.minimum(lengths, model.max_events)
    rows, length = len(users) + 1, max(int(kept.max(initial=1)), 1)
    item_ids = np.zeros((rows, length), np.int32)
    seconds = np.full((rows, length), -1, np.int32)
    labels = np.full((rows, length, histories.labels.shape[1]), -1, np.int32)
    exclude = np.zeros((rows, max(int(lengths.max(initial=1)), 1)), np.int32)
    for row, (end, count) in enumerate(zip(histories.offsets[1:], kept, strict=True)):
        events = slice(int(end - count), int(end))
        item_ids[row, :count] = histories.item_ids[events]
        labels[row, :count] = histories.labels[events]
        times = histories.timestamps[events]
        known = times != UNKNOWN_TIME
        passed = np.where(known, times, 0) - times[known].min(initial=np.iinfo(np.int64).max)
        seconds[row, :count] = np.where(known, np.minimum(passed, 2**31 - 1), -1)
        if dataset.metadata.filter_seen:
            whole = slice(int(histories.offsets[row]), int(end))
            exclude[row, : lengths[row]] = histories.item_ids[whole]
    return {
        "item_ids": item_ids,
        "seconds": seconds,
        "labels": labels,
        "exclude_ids": exclude,
        "user_ids": np.append(users + 1, 0).astype(np.int32),
        "domain_ids": np.append(dataset.user_domains[users], 0).astype(np.int32),
    }
