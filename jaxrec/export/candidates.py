"""What other methods know of the items, for candidates beside the model's: neighbours of items, and factors.

They are fitted to the training events, as the baselines are, and lie in one file of the bundle.
N = items, K = neighbours of an item, F = factors, L = events of a history, S = items with a score.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import safetensors.numpy
import scipy.linalg
from jaxtyping import Float32, Int, Int32

from jaxrec.data.dataset import Histories, PreparedDataset
from jaxrec.evaluation.baselines.base import Fitted
from jaxrec.evaluation.baselines.ease import EASE
from jaxrec.evaluation.baselines.ials import IALS
from jaxrec.evaluation.baselines.item_knn import ItemKNN

__all__ = ["METHODS", "Factors", "Known", "Neighbours", "read_candidates", "write_candidates"]

FILE = "candidates.safetensors"
NUM_NEIGHBOURS = 200
BLOCK_ELEMENTS = 1 << 24


class Known(Protocol):
    """A method's scores of the items after a history."""

    def scores(
        self, history: Int[np.ndarray, " l"]
    ) -> tuple[Int[np.ndarray, " s"], Float32[np.ndarray, " s"]]:
        """The items that have one, rising, and their scores; a repeated event counts once."""
        ...

    def arrays(self) -> dict[str, np.ndarray]:
        """As the file holds them."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Neighbours:
    """A history's scores are the sum of the rows of its items.

    Attributes:
      ids: of the items with the largest weights; 0 = an empty place.
      weights: what each gets.
    """

    ids: Int32[np.ndarray, "n_plus_1 k"]
    weights: Float32[np.ndarray, "n_plus_1 k"]

    @classmethod
    def of(cls, fitted: Fitted, num_items: int) -> Self:
        """The rows of a method whose scores are sums over the history, cut to their largest weights."""
        most = min(NUM_NEIGHBOURS, num_items)
        ids = np.zeros((num_items + 1, most), np.int32)
        weights = np.zeros((num_items + 1, most), np.float32)
        size = max(1, BLOCK_ELEMENTS // (num_items + 1))
        for first in range(1, num_items + 1, size):
            items = np.arange(first, min(first + size, num_items + 1))
            scores = fitted.scores(_singles(items))
            scores[:, 0] = 0.0
            places = np.argpartition(-np.abs(scores), most - 1, axis=1)[:, :most]
            kept = np.take_along_axis(scores, places, axis=1)
            ids[items] = np.where(kept != 0, places, 0)
            weights[items] = kept
        return cls(ids, weights)

    def scores(
        self, history: Int[np.ndarray, " l"]
    ) -> tuple[Int[np.ndarray, " s"], Float32[np.ndarray, " s"]]:
        """See `Known`."""
        rows = np.unique(history)
        found, at = np.unique(self.ids[rows], return_inverse=True)
        sums = np.bincount(at.ravel(), weights=self.weights[rows].ravel(), minlength=len(found))
        real = found > 0
        return found[real].astype(np.int64), sums[real].astype(np.float32)

    def arrays(self) -> dict[str, np.ndarray]:
        """See `Known`."""
        return {"ids": self.ids, "weights": self.weights}


@dataclasses.dataclass(frozen=True, eq=False)
class Factors:
    """A history's scores are the inner products with the factors that fit it best.

    Attributes:
      vectors: of the items.
      gram: their inner products, with the ridge.
      weight: of an item that was taken; the others have 1.

    Source: Hu, Koren, Volinsky, ICDM 2008.
    """

    vectors: Float32[np.ndarray, "n_plus_1 f"]
    gram: Float32[np.ndarray, "f f"]
    weight: float

    @classmethod
    def fit(cls, train: Histories, num_items: int, method: IALS) -> Self:
        """By `method`."""
        vectors = np.asarray(method.fit(train, num_items).model.item_factors, np.float32)
        ridge = method.regularization * np.eye(vectors.shape[1], dtype=np.float32)
        return cls(vectors, vectors.T @ vectors + ridge, method.positive_weight)

    def scores(
        self, history: Int[np.ndarray, " l"]
    ) -> tuple[Int[np.ndarray, " s"], Float32[np.ndarray, " s"]]:
        """See `Known`."""
        taken = self.vectors[np.unique(history)]
        gram = self.gram + (self.weight - 1.0) * taken.T @ taken
        user = scipy.linalg.solve(gram, self.weight * taken.sum(axis=0), assume_a="pos")
        return np.arange(1, len(self.vectors)), self.vectors[1:] @ user.astype(np.float32)

    def arrays(self) -> dict[str, np.ndarray]:
        """See `Known`."""
        return {"vectors": self.vectors, "gram": self.gram, "weight": np.array([self.weight], np.float32)}


METHODS: Mapping[str, Callable[[Histories, int], Known]] = {
    "item_knn": lambda train, num_items: Neighbours.of(ItemKNN().fit(train, num_items), num_items),
    "ease": lambda train, num_items: Neighbours.of(EASE().fit(train, num_items), num_items),
    "ials": lambda train, num_items: Factors.fit(train, num_items, IALS()),
}


def write_candidates(dataset: PreparedDataset, names: Sequence[str], directory: Path) -> None:
    """Fits the methods to the training events and writes them; none = no file.

    Raises:
      ValueError: there is no such method, or it cannot be fitted to these data.
    """
    unknown = sorted(set(names) - set(METHODS))
    if unknown:
        raise ValueError(f"candidates of {unknown[0]!r}: there are {', '.join(METHODS)}.")
    if not names:
        return
    train = dataset.prefixes(np.arange(len(dataset.train_end)), dataset.train_end)
    methods = {name: METHODS[name](train, dataset.metadata.num_items) for name in names}
    arrays = {
        f"{name}/{key}": array for name, method in methods.items() for key, array in method.arrays().items()
    }
    safetensors.numpy.save_file(
        {key: np.ascontiguousarray(array) for key, array in arrays.items()}, directory / FILE
    )


def read_candidates(directory: Path) -> dict[str, Known]:
    """What `write_candidates` wrote, by the method's name; {} where a bundle has none."""
    path = directory / FILE
    if not path.is_file():
        return {}
    arrays = safetensors.numpy.load_file(path)
    found: dict[str, Known] = {}
    for name in METHODS:
        own = {key.partition("/")[2]: array for key, array in arrays.items() if key.startswith(f"{name}/")}
        if "ids" in own:
            found[name] = Neighbours(own["ids"], own["weights"])
        elif own:
            found[name] = Factors(own["vectors"], own["gram"], float(own["weight"][0]))
    return found


def _singles(items: Int[np.ndarray, " n"]) -> Histories:
    """Histories of one event each."""
    count = len(items)
    return Histories(
        np.arange(count + 1, dtype=np.int64),
        items.astype(np.int32),
        np.zeros(count, np.int64),
        np.zeros((count, 0), np.int8),
        np.zeros(count, np.float32),
        None,
    )
