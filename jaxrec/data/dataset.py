"""The prepared dataset: what `python -m jaxrec.prepare` wrote, read by user index.

U = users, E = events, K = behaviours, N = items, T = text tokens of an item.
User indices are 0 .. U - 1. Item ids are 1 .. N; 0 is padding. The split is two cut points per user:
`train = [:train_end]`, `validation = [train_end:validation_end]`, `test = [validation_end:]`.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int, Int32, Int64

from jaxrec.core.batch import ValueFacts
from jaxrec.data.domain_keys import domains_of
from jaxrec.data.histories import UNKNOWN_TIME, Histories, HistoryFiles, blocks
from jaxrec.data.packing import Windows
from jaxrec.data.queries import QueryTable, load_queries
from jaxrec.data.split import first_at_or_after, leave_one_out_cuts

__all__ = ["UNKNOWN_TIME", "DatasetMetadata", "Histories", "PreparedDataset"]

# Events beyond this are not held in memory, but read from the files, batch by batch.
MEMORY_BUDGET_BYTES = 1 << 30
_NAMES = ("behaviours", "context", "domains", "kinds")  # of the metadata, lists in JSON


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetMetadata:
    """What every reader needs to know; the part `metadata` of `statistics.json`."""

    name: str
    num_users: int
    num_items: int
    num_events: int
    behaviours: tuple[str, ...]
    filter_seen: bool
    split: str
    has_timestamps: bool
    value: ValueFacts | None
    fingerprint: str
    context: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()

    @property
    def has_domains(self) -> bool:
        """Whether there are several catalogues: one domain alone is a data set as any other."""
        return len(self.domains) > 1

    def to_json(self) -> dict[str, Any]:
        """The metadata as JSON values."""
        lists = {name: list(getattr(self, name)) for name in _NAMES}
        return {**dataclasses.asdict(self), **lists}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "DatasetMetadata":
        """The metadata of `to_json`; keys of a newer writer are left alone.

        Raises:
            ValueError: a field is missing.
        """
        values = {"context": (), "domains": (), "kinds": (), **values}  # of a writer that knew none
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in values]
        if missing:
            raise ValueError(f"the dataset's metadata lacks {missing}; run python -m jaxrec.prepare again.")
        value = ValueFacts(**values["value"]) if values["value"] is not None else None
        known = {name: values[name] for name in names}
        tuples = {name: tuple(values[name]) for name in _NAMES}
        return cls(**known | tuples | {"value": value})


class PreparedDataset:
    """Histories by user index, with the split, the catalogue and the statistics beside them.

    Attributes:
      metadata: names, sizes, and what holds for the whole dataset.
      train_end, validation_end, lengths: the cut points and the number of events of each user.
      item_counts: training events of each item id; [0] = 0.
    """

    def __init__(
        self,
        metadata: DatasetMetadata,
        *,
        train_end: Int64[np.ndarray, " u"],
        validation_end: Int64[np.ndarray, " u"],
        lengths: Int64[np.ndarray, " u"],
        item_counts: Int64[np.ndarray, " n_plus_1"],
        events: Histories | HistoryFiles,
        directory: Path | None = None,
        item_titles: Sequence[str] | None = None,
        item_tokens: Int32[np.ndarray, "n_plus_1 t"] | None = None,
        user_keys: Sequence[str] | None = None,
        item_keys: Sequence[str] | None = None,
    ):
        self.metadata = metadata
        self.train_end = train_end
        self.validation_end = validation_end
        self.lengths = lengths
        self.item_counts = item_counts
        self.directory = directory
        self._events = events
        self._item_titles = item_titles
        self._item_tokens = item_tokens
        self._user_keys = user_keys
        self._item_keys = item_keys

    @classmethod
    def open(cls, path: str | Path, *, memory_budget_bytes: int = MEMORY_BUDGET_BYTES) -> "PreparedDataset":
        """Opens a prepared directory.

        Events within `memory_budget_bytes` are loaded at once; above it they are read from the files,
        batch by batch, and only the per-user and per-item numbers are held.

        Raises:
            ValueError: the directory was not prepared, or it is damaged.
        """
        directory = Path(path)
        for name in ("statistics.json", "users.parquet", "items.parquet", "histories"):
            if not (directory / name).exists():
                raise ValueError(
                    f"{str(path)!r} is not a prepared dataset: {name} is missing; "
                    "run python -m jaxrec.prepare on the source and name its output here."
                )
        try:
            statistics = json.loads((directory / "statistics.json").read_text(encoding="utf-8"))
            metadata = DatasetMetadata.from_json(statistics["metadata"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{str(directory / 'statistics.json')!r} cannot be read ({error}); "
                "run python -m jaxrec.prepare again."
            ) from error
        users = pq.read_table(directory / "users.parquet", columns=["train_end", "validation_end", "length"])
        train_end, validation_end, lengths = (
            users[name].to_numpy().astype(np.int64) for name in users.column_names
        )
        counts = pq.read_table(directory / "items.parquet", columns=["train_count"])["train_count"].to_numpy()
        if len(counts) != metadata.num_items:
            raise ValueError(
                f"the metadata says num_items={metadata.num_items}, but the tables hold {len(counts)}; "
                "the dataset is damaged: run python -m jaxrec.prepare again."
            )
        _check_sizes(metadata, lengths)
        _check_cuts(train_end, validation_end, lengths)
        files = HistoryFiles(
            directory / "histories", lengths, len(metadata.behaviours), len(metadata.context)
        )
        # Of item_ids, timestamps, values, labels and context.
        bytes_per_event = 4 + 8 + 4 + len(metadata.behaviours) + 4 * len(metadata.context)
        fits = metadata.num_events * bytes_per_event <= memory_budget_bytes
        return cls(
            metadata,
            train_end=train_end,
            validation_end=validation_end,
            lengths=lengths,
            item_counts=np.concatenate([np.zeros(1, np.int64), counts.astype(np.int64)]),
            events=files.load() if fits else files,
            directory=directory,
        )

    @property
    def statistics(self) -> dict[str, Any]:
        """What `prepare` has written of the data: columns, rows, times, ...; {} = they are in memory alone."""
        if self.directory is None:
            return {}
        found: dict[str, Any] = json.loads((self.directory / "statistics.json").read_text(encoding="utf-8"))
        return found

    @classmethod
    def from_histories(
        cls,
        histories: Histories,
        *,
        train_end: Int[np.ndarray, " u"] | None = None,
        validation_end: Int[np.ndarray, " u"] | None = None,
        num_items: int | None = None,
        item_titles: Sequence[str] | None = None,
        item_tokens: Int32[np.ndarray, "n_plus_1 t"] | None = None,
        behaviours: Sequence[str] | None = None,
        filter_seen: bool = True,
        name: str = "memory",
        domains: Sequence[str] = (),
        kinds: Sequence[str] = (),
        user_keys: Sequence[str] | None = None,
        item_keys: Sequence[str] | None = None,
    ) -> "PreparedDataset":
        """A dataset over arrays in memory; leave-one-out unless cut points are given.

        With `domains` the keys are needed: they say whose each user and item is. With `kinds` the items' are.

        Raises:
            ValueError: an item id, a cut point or a label column is out of range, or domains or kinds lack keys.
        """
        if kinds and (domains or item_keys is None):
            raise ValueError(
                f"kinds={tuple(kinds)} need item_keys, which begin with them, and no domains beside them."
            )
        if domains and (user_keys is None or item_keys is None):
            raise ValueError(f"domains={tuple(domains)} need user_keys and item_keys, which begin with them.")
        lengths = np.diff(histories.offsets).astype(np.int64)
        split = "leave_one_out" if train_end is None else "custom"
        if train_end is None or validation_end is None:
            if train_end is not None or validation_end is not None:
                raise ValueError("give both train_end and validation_end, or neither for leave-one-out.")
            train_end, validation_end = leave_one_out_cuts(lengths)
        train_end, validation_end = np.asarray(train_end, np.int64), np.asarray(validation_end, np.int64)
        largest = int(histories.item_ids.max(initial=0))
        num_items = largest if num_items is None else num_items
        if largest > num_items or histories.item_ids.min(initial=1) < 1:
            raise ValueError(
                f"item ids must lie in 1 .. num_items={num_items}, but they run from "
                f"{histories.item_ids.min()} to {largest}."
            )
        if behaviours is None:
            behaviours = [f"behaviour_{index}" for index in range(histories.labels.shape[1])]
        if len(behaviours) != histories.labels.shape[1]:
            raise ValueError(
                f"{len(behaviours)} behaviours are named, but the labels have "
                f"{histories.labels.shape[1]} columns."
            )
        _check_cuts(train_end, validation_end, lengths)
        train = histories.take(np.arange(len(lengths)), np.zeros_like(lengths), train_end)
        metadata = DatasetMetadata(
            name=name,
            num_users=len(histories),
            num_items=num_items,
            num_events=len(histories.item_ids),
            behaviours=tuple(behaviours),
            filter_seen=filter_seen,
            split=split,
            has_timestamps=bool((histories.timestamps != UNKNOWN_TIME).any()),
            value=_value_facts(train.values),
            fingerprint="",
            context=_context_names(histories),
            domains=tuple(domains),
            kinds=tuple(kinds),
        )
        counts = np.bincount(train.item_ids, minlength=num_items + 1)
        return cls(
            metadata,
            train_end=train_end,
            validation_end=validation_end,
            lengths=lengths,
            item_counts=counts.astype(np.int64),
            events=histories,
            item_titles=item_titles,
            item_tokens=item_tokens,
            user_keys=user_keys,
            item_keys=item_keys,
        )

    def histories(self, user_indices: Int[np.ndarray, " n"]) -> Histories:
        """The whole histories of these users, in the order asked for."""
        users = np.asarray(user_indices, np.int64)
        return self._events.take(users, np.zeros_like(users), self.lengths[users])

    def windows(self, windows: Windows) -> Histories:
        """The events of each window, in the order asked for."""
        return self._events.take(windows.users, windows.starts, windows.lengths)

    def prefixes(self, users: Int[np.ndarray, " n"], ends: Int[np.ndarray, " n"]) -> Histories:
        """The first `ends[i]` events of each user."""
        return self.windows(Windows(users=users, starts=np.zeros_like(users), lengths=ends))

    def history_blocks(
        self, users_per_block: int = 4096
    ) -> Iterator[tuple[Int64[np.ndarray, " n"], Histories]]:
        """All users, in blocks of consecutive indices: one pass in bounded memory."""
        for users in blocks(len(self.lengths), users_per_block):
            yield users, self.histories(users)

    def events_before(self, seconds: int) -> Int64[np.ndarray, " u"]:
        """How many events each user has before the first one at or after a time; one pass over the histories."""
        counts = [
            first_at_or_after(part.offsets, part.timestamps, seconds) for _, part in self.history_blocks()
        ]
        return np.concatenate([np.zeros(0, np.int64), *counts])

    @functools.cached_property
    def user_domains(self) -> Int32[np.ndarray, " u"]:
        """The domain of each user, 1, 2, ... in the order of `metadata.domains`; 0 where there are no domains."""
        if not self.metadata.domains:
            return np.zeros(self.metadata.num_users, np.int32)
        return domains_of(pa.array(self.user_keys), self.metadata.domains)

    @functools.cached_property
    def item_domains(self) -> Int32[np.ndarray, " n_plus_1"]:
        """The domain of each item id, as `user_domains`; [0] = 0."""
        if not self.metadata.domains:
            return np.zeros(self.metadata.num_items + 1, np.int32)
        return np.append(np.int32(0), domains_of(pa.array(self.item_keys), self.metadata.domains))

    @functools.cached_property
    def item_kinds(self) -> Int32[np.ndarray, " n_plus_1"]:
        """The kind of each item id, 1, 2, ... in the order of `metadata.kinds`; 0 where there are none; [0] = 0."""
        if not self.metadata.kinds:
            return np.zeros(self.metadata.num_items + 1, np.int32)
        return np.append(np.int32(0), domains_of(pa.array(self.item_keys), self.metadata.kinds))

    @property
    def item_groups(self) -> Int32[np.ndarray, " n_plus_1"] | None:
        """Items are ranked among those of their group, a domain or a kind; None = among all."""
        if self.metadata.has_domains:
            return self.item_domains
        return self.item_kinds if self.metadata.kinds else None

    def asked_groups(
        self, user_indices: Int[np.ndarray, " n"], targets: Int[np.ndarray, " n"], kind: int = 0
    ) -> Int32[np.ndarray, " n"]:
        """The group that each user is asked for: the user's domain, or `kind`; 0 = the kind of the user's target."""
        if self.metadata.has_domains:
            return self.user_domains[user_indices]
        return np.full(len(targets), kind, np.int32) if kind else self.item_kinds[targets]

    @functools.cached_property
    def user_keys(self) -> np.ndarray:
        """The users' own ids, by user index."""
        if self._user_keys is not None:
            return np.asarray(self._user_keys)
        if self.directory is None:
            return np.arange(self.metadata.num_users)
        return _column(self.directory / "users.parquet", "user_id").to_numpy()

    @functools.cached_property
    def item_keys(self) -> np.ndarray:
        """The items' own ids; element `i` belongs to item id `i + 1`."""
        if self._item_keys is not None:
            return np.asarray(self._item_keys)
        if self.directory is None:
            return np.arange(1, self.metadata.num_items + 1)
        return _column(self.directory / "items.parquet", "item_id").to_numpy()

    def titles(self, item_ids: Int[np.ndarray, " n"]) -> list[str]:
        """The items' titles; "" where an item has none, and for padding."""
        chosen = self._titles.take(pa.array(np.asarray(item_ids, np.int64)))
        return [title or "" for title in chosen.to_pylist()]

    @functools.cached_property
    def _titles(self) -> pa.Array:
        if self.directory is not None:
            titles = _column(self.directory / "items.parquet", "title").combine_chunks().cast(pa.string())
        else:
            titles = pa.array(self._item_titles or [""] * self.metadata.num_items, pa.string())
        return pa.concat_arrays([pa.array([""], pa.string()), titles])

    @functools.cached_property
    def item_categories(self) -> list[tuple[str, ...]]:
        """The categories of each item; element `i` belongs to item id `i + 1`."""
        if self.directory is None:
            return [()] * self.metadata.num_items
        categories = _column(self.directory / "items.parquet", "categories").to_pylist()
        return [tuple(names or ()) for names in categories]

    @functools.cached_property
    def item_texts(self) -> list[str]:
        """The whole text of each item, where `item_tokens` has a beginning; element `i` belongs to item id `i + 1`."""
        if self.directory is None:
            return list(self._item_titles or [""] * self.metadata.num_items)
        return [text or "" for text in _column(self.directory / "items.parquet", "text").to_pylist()]

    @functools.cached_property
    def item_features(self) -> list[tuple[str, ...]]:
        """`column=value` for each of `columns.features`; element `i` belongs to item id `i + 1`."""
        file = None if self.directory is None else self.directory / "items.parquet"
        if file is None or "features" not in pq.read_schema(file).names:
            return [()] * self.metadata.num_items
        return [tuple(values or ()) for values in _column(file, "features").to_pylist()]

    @functools.cached_property
    def item_tokens(self) -> Int32[np.ndarray, "n_plus_1 t"]:
        """The text tokens of each item id, mapped from the file; row 0 is padding.

        Raises:
            ValueError: the dataset has no text tokens.
        """
        if self._item_tokens is not None:
            return self._item_tokens
        path = None if self.directory is None else self.directory / "item_tokens.npy"
        if path is None or not path.exists():
            raise ValueError(
                f"dataset {self.metadata.name!r} has no item_tokens.npy, so no item text can be read; "
                "prepare it from an items table with text columns."
            )
        return np.load(path, mmap_mode="r", allow_pickle=False)

    @functools.cached_property
    def queries(self) -> QueryTable | None:
        """Texts that items were found by, and these items; None where the dataset has none."""
        return None if self.directory is None else load_queries(self.directory)

    @property
    def num_text_tokens(self) -> int:
        """T, the tokens of an item's text; 0 where the dataset holds none."""
        try:
            return int(self.item_tokens.shape[1])
        except ValueError:
            return 0


def _context_names(histories: Histories) -> tuple[str, ...]:
    columns = 0 if histories.context is None else histories.context.shape[1]
    return tuple(f"context_{index}" for index in range(columns))


def _column(path: Path, name: str) -> pa.ChunkedArray:
    return pq.read_table(path, columns=[name])[name]


def _value_facts(values: Float32[np.ndarray, " e"]) -> ValueFacts | None:
    known = values[~np.isnan(values)].astype(np.float64)
    if not len(known):
        return None
    return ValueFacts(name="value", mean=float(known.mean()), deviation=float(known.std()))


def _check_sizes(metadata: DatasetMetadata, lengths: Int64[np.ndarray, " u"]) -> None:
    """Raises ValueError where the tables are not those of the metadata."""
    for name, value in (("num_users", len(lengths)), ("num_events", int(lengths.sum()))):
        if value != getattr(metadata, name):
            raise ValueError(
                f"the metadata says {name}={getattr(metadata, name)}, but the tables hold {value}; "
                "the dataset is damaged: run python -m jaxrec.prepare again."
            )


def _check_cuts(
    train_end: Int64[np.ndarray, " t"],
    validation_end: Int64[np.ndarray, " v"],
    lengths: Int64[np.ndarray, " u"],
) -> None:
    """Raises ValueError where the cut points are not those of histories of these lengths."""
    if not (len(train_end) == len(validation_end) == len(lengths)):
        raise ValueError(
            f"{len(train_end)} and {len(validation_end)} cut points are given for {len(lengths)} users."
        )
    wrong = np.flatnonzero(~((train_end >= 0) & (train_end <= validation_end) & (validation_end <= lengths)))
    if len(wrong):
        user = int(wrong[0])
        raise ValueError(
            f"user {user} has train_end={train_end[user]}, validation_end={validation_end[user]} and "
            f"{lengths[user]} events; 0 <= train_end <= validation_end <= events must hold."
        )
