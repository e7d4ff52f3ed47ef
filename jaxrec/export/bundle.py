"""A bundle, opened to be asked: no training code is loaded, and nothing is read before it is checked.

`Bundle.open` compares every file with the manifest. Programs are compiled for each size that they are asked with, so
`recommend` pads histories to powers of two.
B = users, L = events of a history, D = item dim.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import jax
import numpy as np
import safetensors
from jaxtyping import Float, Int

from jaxrec.export.catalogue import Catalogue, Key, Vocabulary, read_users
from jaxrec.export.compiled import Compiled, Program
from jaxrec.export.events import Event, UserEvents
from jaxrec.export.layout import (
    CONFIG_FILE,
    ITEM_TOWER,
    METRICS_FILE,
    SIZED_PLATFORM,
    STABLEHLO,
    WEIGHT_FILES,
    known_sizes,
    sized_program,
)
from jaxrec.export.manifest import Manifest

if TYPE_CHECKING:
    from jaxrec.data.text import WordPieces

PIECE_ENTRIES = 1 << 18  # of an array, read at once


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """An item, by its own id."""

    item_id: Key
    title: str
    score: float


class Bundle:
    """The bundle in `directory`; made by `open`.

    Attributes:
      manifest: what it says of itself; `manifest.facts` are those of the model.
    """

    def __init__(self, directory: Path, manifest: Manifest):
        self.directory = directory
        self.manifest = manifest

    @classmethod
    def open(cls, directory: str | Path) -> Self:
        """Opens a version and checks every file.

        Raises:
          DamagedBundleError: a file is not the one that was exported; names it.
          ValueError: the format is not one that this program reads.
        """
        path = Path(directory)
        manifest = Manifest.read(path)
        manifest.verify(path)
        return cls(path, manifest)

    @property
    def facts(self) -> Mapping[str, Any]:
        """Of the run and the model."""
        return self.manifest.facts

    @functools.cached_property
    def catalogue(self) -> Catalogue:
        """The items: own ids, titles, categories."""
        return Catalogue.read(self.directory)

    @functools.cached_property
    def users(self) -> Vocabulary | None:
        """The users' own ids; None where the model has no rows of users."""
        return read_users(self.directory) if self.facts["reads"]["user_ids"] else None

    @functools.cached_property
    def weights(self) -> Mapping[str, np.ndarray]:
        """By name, as stored."""
        return dict(entry for name in WEIGHT_FILES for entry in _arrays(self.directory / name))

    @functools.cached_property
    def item_vectors(self) -> Float[np.ndarray, "n_plus_1 d"]:
        """v(y) by item id; row 0 is padding."""
        if "items/vectors" in self.weights:
            return np.asarray(self.weights["items/vectors"], np.float32)
        # Of a compressed model codes are stored: the program knows what they mean.
        item_ids = np.arange(self.facts["num_items"] + 1, dtype=np.int32)
        return np.asarray(self._item_tower({"item_ids": item_ids})["vectors"])

    @property
    def item_bias(self) -> Float[np.ndarray, " n_plus_1"]:
        """b_y by item id."""
        return np.asarray(self.weights["items/bias"], np.float32)

    @functools.cached_property
    def metrics(self) -> str:
        """What the evaluation of the run found, as JSON."""
        return (self.directory / METRICS_FILE).read_text(encoding="utf-8")

    @functools.cached_property
    def config(self) -> str:
        """The run's config, as JSON."""
        return (self.directory / CONFIG_FILE).read_text(encoding="utf-8")

    def program(self, name: str) -> Program:
        """A program with its weights on the device.

        Raises:
          ValueError: the bundle has no such program.
        """
        programs = self.manifest.programs
        if name not in programs:
            raise ValueError(f"program {name!r}: the bundle has {', '.join(programs)}; name one of these.")
        weights = {key: self._placed(key) for key in programs[name]["weights"]}
        files = {size: sized_program(name, *size) for size in known_sizes(name, self.facts)}
        sized = {
            size: self._compiled(file)
            for size, file in files.items()
            if f"{STABLEHLO}/{file}" in self.manifest.files and jax.default_backend() == SIZED_PLATFORM
        }
        return Program(functools.partial(self._compiled, name), weights, sized)

    def _compiled(self, file: str) -> Compiled:
        return Compiled.of((self.directory / STABLEHLO / file).read_bytes())

    def recommend(
        self,
        histories: Sequence[Sequence[Event | Key]],
        *,
        k: int = 10,
        exclude: Sequence[Sequence[Key]] | None = None,
        user_ids: Sequence[Key | None] | None = None,
        domains: Sequence[str | None] | None = None,
    ) -> list[list[Recommendation]]:
        """The best items of each history, oldest event first, in the catalogue's own ids.

        Items of the history are left out where the data set says `filter_seen`, and those of `exclude` always. What the
        catalogue does not know is no event.

        Raises:
          ValueError: more items are asked for than the program gives, or lists do not fit each other.
        """
        most = self.facts["k"]
        if not 1 <= k <= most:
            raise ValueError(f"k={k} must lie in 1 .. {most}; export with a larger --k.")
        excluded = [list(keys) for keys in exclude] if exclude is not None else [[] for _ in histories]
        if self.facts["filter_seen"]:
            for keys, history in zip(excluded, histories, strict=True):
                keys += [event.item_id if isinstance(event, Event) else event for event in history]
        events = [self.events_of(history) for history in histories]
        inputs = self.history_inputs(
            events,
            num_rows=_power_of_two(len(events)),
            length=_power_of_two(max(map(len, events), default=1)),
            user_ids=user_ids,
        )
        if self.facts["domains"]:
            inputs["domain_ids"] = self._domain_ids(
                domains or [None] * len(histories), len(inputs["item_ids"])
            )
        ids = [self.catalogue.ids_of(keys) for keys in excluded]
        inputs["exclude_ids"] = _rows(ids, len(inputs["item_ids"]), max(map(len, ids), default=1))
        wanted = {array["name"] for array in self.manifest.programs["recommend"]["inputs"]}
        found = self._recommend({name: array for name, array in inputs.items() if name in wanted})
        top, scores = np.asarray(found["top_item_ids"]), np.asarray(found["top_scores"])
        return [self._named(top[row, :k], scores[row, :k]) for row in range(len(histories))]

    def events_of(self, history: Sequence[Event | Key]) -> UserEvents:
        """The latest events that the model reads; unknown items are left out."""
        given = [event if isinstance(event, Event) else Event(event) for event in history]
        found = [(self.catalogue.vocabulary.id_of(event.item_id), event) for event in given]
        known = [(item, event) for item, event in found if item][-self.facts["max_events"] :]
        first = min((event.seconds for _, event in known if event.seconds is not None), default=0)
        seconds = [-1 if event.seconds is None else event.seconds - first for _, event in known]
        labels = None
        if self.facts["reads"]["labels"]:
            labels = np.full((len(known), self.facts["reads"]["labels"]), -1, np.int32)
            for row, (_, event) in enumerate(known):
                if event.labels:
                    labels[row] = event.labels
        ids = np.array([item for item, _ in known], np.int64)
        return UserEvents(ids, np.array(seconds, np.int64), labels)

    def history_inputs(
        self,
        histories: Sequence[UserEvents],
        *,
        num_rows: int,
        length: int,
        user_ids: Sequence[Key | None] | None = None,
    ) -> dict[str, np.ndarray]:
        """The arrays of histories that the model reads, padded to `num_rows` rows of `length`."""
        reads = self.facts["reads"]
        most = min(length, self.facts["max_events"])
        inputs = {"item_ids": np.zeros((num_rows, length), np.int32)}
        if reads["seconds"]:
            inputs["seconds"] = np.full((num_rows, length), -1, np.int32)
        if reads["labels"]:
            inputs["labels"] = np.full((num_rows, length, reads["labels"]), -1, np.int32)
        for row, events in enumerate(histories):
            ids = events.item_ids[-most:]
            inputs["item_ids"][row, : len(ids)] = ids
            if reads["seconds"]:
                inputs["seconds"][row, : len(ids)] = _since_first(events.seconds[-most:])
            if reads["labels"] and events.labels is not None:
                inputs["labels"][row, : len(ids)] = events.labels[-most:]
        if self.users is not None:
            given = user_ids or [None] * len(histories)
            known = [0 if key is None else self.users.id_of(self.users.own(key)) for key in given]
            inputs["user_ids"] = np.pad(np.asarray(known, np.int32), (0, num_rows - len(known)))
        return inputs

    def vectors_of_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """v(y) of new items, which are what is written about them; zeros for a text without a known word.

        Args:
          texts: as the data put them, e.g. "title. genre, genre. abstract".

        Raises:
          ValueError: the model reads no text.
        """
        if not self.facts["reads"]["text_tokens"]:
            raise ValueError(
                "the model of this bundle reads no text: an item that it does not know has no vector."
            )
        tokens = np.concatenate(
            [np.zeros((0, self._word_pieces.max_tokens), np.int32), *self._word_pieces.tokens(texts)]
        )
        padded = np.pad(tokens, ((0, _power_of_two(len(tokens)) - len(tokens)), (0, 0)))
        found = self._item_tower({"item_ids": np.zeros(len(padded), np.int32), "token_ids": padded})
        return np.asarray(found["vectors"])[: len(tokens)]

    @functools.cached_property
    def _word_pieces(self) -> "WordPieces":
        # Here alone: who asks for no new text loads nothing of the data.
        from jaxrec.data.config import TextConfig
        from jaxrec.data.text import WordPieces

        return WordPieces(
            TextConfig(vocabulary=str(self.directory), max_tokens=self.facts["reads"]["text_tokens"])
        )

    @functools.cached_property
    def _item_tower(self) -> Program:
        return self.program(ITEM_TOWER)

    @functools.cached_property
    def _recommend(self) -> Program:
        return self.program("recommend")

    @functools.cached_property
    def _on_device(self) -> dict[str, jax.Array]:
        return {}

    def _placed(self, name: str) -> jax.Array:
        """Programs share what lies on the device."""
        if name not in self._on_device:
            self._on_device[name] = jax.device_put(self.weights[name])
        return self._on_device[name]

    def _domain_ids(self, domains: Sequence[str | None], num_rows: int) -> np.ndarray:
        names = self.facts["domains"]
        unknown = {name for name in domains if name is not None} - set(names)
        if unknown:
            raise ValueError(f"domain {min(unknown)!r}: the catalogue has {', '.join(names)}.")
        ids = [0 if name is None else 1 + names.index(name) for name in domains]
        return np.pad(np.asarray(ids, np.int32), (0, num_rows - len(ids)))

    def _named(self, ids: np.ndarray, scores: np.ndarray) -> list[Recommendation]:
        vocabulary, titles = self.catalogue.vocabulary, self.catalogue.titles
        return [
            Recommendation(vocabulary.key_of(index), titles[index], score)
            for index, score in zip(ids.tolist(), scores.tolist(), strict=True)
            if index
        ]


def _arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a file of weights, by name.

    Large ones are read a piece at a time: safetensors holds the interpreter's lock while it copies, and a server has
    other threads that answer meanwhile.
    """
    with safetensors.safe_open(path, framework="np") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            rows = file.get_slice(name)
            size, *others = rows.get_shape() or [0]
            step = max(1, PIECE_ENTRIES // max(1, math.prod(others)))
            if size <= step:
                yield name, file.get_tensor(name)
            else:
                yield name, np.concatenate([rows[at : min(at + step, size)] for at in range(0, size, step)])


def _since_first(seconds: Int[np.ndarray, " l"]) -> Int[np.ndarray, " l"]:
    """Seconds since the earliest known moment, saturating; -1 = unknown."""
    known = seconds >= 0
    first = np.min(seconds, initial=np.iinfo(np.int64).max, where=known)
    return np.where(known, np.minimum(seconds - np.where(known, first, 0), 2**31 - 1), -1)


def _rows(values: Sequence[Sequence[int]], num_rows: int, length: int) -> np.ndarray:
    array = np.zeros((num_rows, _power_of_two(length)), np.int32)
    for row, entries in enumerate(values):
        array[row, : len(entries)] = entries
    return array


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
