"""What an experiment changes of the training events: items that are taken away, events that are falsified.

Both come after the split: what is asked of the test part, and of whom, is decided by the data as they are.

Letters: E events of a bucket, U users of a bucket, V distinct items.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from jaxrec.data.bucket_sort import Sorted
from jaxrec.data.config import ColdItems, NoisyEvents
from jaxrec.data.mixed_bits import ODD, mixed
from jaxrec.data.packing import random_stream

__all__ = ["falsify_events", "remove_cold_items"]


@dataclass(frozen=True)
class _Bucket:
    """The sorted events of some users.

    Attributes:
      number: of the bucket.
      users: user indices, in the order of the events.
      owner: of each event: the user's place in `users`.
      place: of each event in its history.
    """

    number: int
    records: np.ndarray
    users: Int64[np.ndarray, " u"]
    owner: Int64[np.ndarray, " e"]
    place: Int64[np.ndarray, " e"]

    def before(self, ends: Int64[np.ndarray, " all"]) -> Bool[np.ndarray, " e"]:
        """Events before these ends, which are by user index."""
        return self.place < ends[self.users][self.owner]


def _buckets(histories: Sorted) -> Iterator[_Bucket]:
    spool = histories.state.spool
    for number in range(spool.num_buckets):
        users = histories.users_of(number)
        lengths = histories.lengths[users]
        owner = np.repeat(np.arange(len(users)), lengths)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        yield _Bucket(number, spool.reader(number, histories.dtype).take(-1), users, owner, place)


def remove_cold_items(histories: Sorted, config: ColdItems) -> None:
    """Takes the events of drawn items out of the training and the validation part of every history.

    Raises:
      ValueError: the share is no item, or leaves nothing to train on.
    """
    state = histories.state
    _, rank = state.items.ranked()
    trained = np.sort(rank[histories.item_counts > 0])  # by the items' own order, whatever the source's is
    count = round(config.share * len(trained))
    if not 0 < count < len(trained):
        raise ValueError(
            f"cold_items.share={config.share} of {len(trained)} items with a training event is {count} items; choose a "
            "share that takes some and leaves some."
        )
    drawn = random_stream(config.seed, 0).permutation(trained)[:count]
    cold = np.isin(rank, drawn)
    for bucket in _buckets(histories):
        gone = cold[bucket.records["item"]] & bucket.before(histories.validation_end)
        of_training = gone & bucket.before(histories.train_end)
        all_gone, training_gone = (
            np.bincount(bucket.owner[events], minlength=len(bucket.users)) for events in (gone, of_training)
        )
        histories.train_end[bucket.users] -= training_gone
        histories.validation_end[bucket.users] -= all_gone
        histories.lengths[bucket.users] -= all_gone
        histories.removed += int(all_gone.sum())
        state.spool.replace(bucket.number, bucket.records[~gone])
    histories.item_counts[cold] = 0
    histories.cold_items = count
    if not histories.train_end.any():
        raise ValueError(f"cold_items.share={config.share} leaves no training event; choose a smaller share.")


def falsify_events(histories: Sorted, config: NoisyEvents) -> None:
    """Gives a share of the training events another item."""
    num_items = len(histories.state.items)
    keys, rank = histories.state.items.ranked()
    code_of_rank = np.argsort(rank)
    histories.item_counts = np.zeros(num_items, np.int64)
    for bucket in _buckets(histories):
        trained = bucket.before(histories.train_end)
        at = bucket.users[bucket.owner], bucket.place
        chosen = trained & (_uniform(config.seed, 0, *at) < config.share)
        drawn = (_uniform(config.seed, 1, *at) * len(keys)).astype(np.int64)
        bucket.records["item"][chosen] = code_of_rank[drawn[chosen]]
        histories.falsified += int(chosen.sum())
        histories.state.spool.replace(bucket.number, bucket.records)
        histories.item_counts += np.bincount(bucket.records["item"][trained], minlength=num_items)


def _uniform(
    seed: int, stream: int, users: Int64[np.ndarray, " e"], places: Int64[np.ndarray, " e"]
) -> np.ndarray:
    """Numbers in [0, 1) of (seed, stream, user, place) alone: no order of the work changes them.

    Source: Steele, Lea, Flood, OOPSLA 2014 (SplitMix64, its mixing function).
    """
    start = mixed(np.array([seed & (2**64 - 1)], np.uint64) * ODD + np.uint64(stream))
    bits = mixed(mixed(start + users.astype(np.uint64) * ODD) + places.astype(np.uint64) * ODD)
    return (bits >> np.uint64(11)) * 2.0**-53
