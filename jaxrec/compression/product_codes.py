"""Product quantisation: a row is cut into parts, and each part is the nearest of 256 centroids of its sub-space.

A score needs no row: the query's products with all centroids are a table of `[M, K]` numbers, and an item's score is
the sum of one number a sub-space.

Source: Jégou, Douze and Schmid, TPAMI 2011; Petrov and Macdonald, WSDM 2024 (RecJPQ: the item table of a sequential
recommender in this form). RecJPQ learns the centroids with the model; ours are fitted to a trained table.

R = rows, D = entries of a row, M = sub-spaces, K = centroids of a sub-space, S = entries of a part.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from scipy.cluster.vq import kmeans2

from jaxrec.compression.codes import Code, static

NUM_CENTROIDS = 256  # a byte
FIT_ROWS = 1 << 16  # of a larger table the centroids are fitted to a sample
ROUNDS = 25  # of Lloyd's algorithm; past them less than a thousandth of the error goes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductCodes(Code):
    """The rows of a table as bytes. Row 0, which is padding, is read back as zeros."""

    kind: ClassVar[str] = "product"
    codes: UInt8[Array, "R M"] | np.ndarray
    centroids: Float[Array, "M K S"] | np.ndarray
    num_rows: int = static()
    num_parts: int = static()
    part_dim: int = static()

    @classmethod
    def of(cls, table: Float[np.ndarray, "R D"], *, part_dim: int) -> "ProductCodes":
        """Fits the centroids to the rows past row 0, and encodes all.

        Args:
          part_dim: entries of a part; the row is cut evenly.

        Raises:
          ValueError: the parts do not divide the row, there is no row, or an entry is not finite or too large.
        """
        num_rows, dim = table.shape
        if part_dim < 1 or dim % part_dim:
            fitting = [str(size) for size in range(1, dim + 1) if dim % size == 0]
            raise ValueError(
                f"part_dim={part_dim} does not divide rows of {dim} entries; take one of {', '.join(fitting)}."
            )
        if num_rows < 2:
            raise ValueError(f"a table of {num_rows} rows has no item; there is nothing to quantise.")
        with np.errstate(over="ignore"):
            finite = np.isfinite(table.astype(np.float16)).all()
        if not finite:
            raise ValueError(
                "an entry of the table is not finite, or past what a float16 centroid holds (65504); compress an older "
                "checkpoint, or use int8."
            )
        parts = table.reshape(num_rows, dim // part_dim, part_dim).swapaxes(0, 1)
        fitted = [_fit(part[1:], np.random.default_rng([0, i])) for i, part in enumerate(parts)]
        centroids = np.stack(
            [np.pad(one, ((0, _count(num_rows) - len(one)), (0, 0)), mode="edge") for one in fitted]
        )
        codes = np.stack(
            [_nearest(part, own.astype(np.float32)) for part, own in zip(parts, centroids, strict=True)], 1
        )
        return cls(
            codes=codes,
            centroids=centroids,
            num_rows=num_rows,
            num_parts=dim // part_dim,
            part_dim=part_dim,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Code`."""
        return self.num_rows, self.num_parts * self.part_dim

    def expected(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """See `Code`."""
        return {
            "codes": ((self.num_rows, self.num_parts), "uint8"),
            "centroids": ((self.num_parts, _count(self.num_rows), self.part_dim), "float16"),
        }

    def decode(self) -> jax.Array:
        """See `Code`."""
        return self.rows(jnp.arange(self.num_rows))

    def rows(self, ids: Int[Array, "*b"]) -> Float[Array, "*b D"]:
        """See `Code`."""
        centroids = jnp.asarray(self.centroids).astype(jnp.float32)
        found = centroids[jnp.arange(self.num_parts), jnp.asarray(self.codes)[ids]]
        return jnp.where(ids[..., None] > 0, found.reshape(*ids.shape, -1), 0.0)

    def scores(self, query: Float[Array, " D"]) -> Float[Array, " R"]:
        """Sums over the table of products; see the module."""
        centroids = jnp.asarray(self.centroids).astype(jnp.float32)
        products = jnp.einsum("mks,ms->mk", centroids, query.reshape(self.num_parts, self.part_dim))
        scores = jnp.sum(products[jnp.arange(self.num_parts), jnp.asarray(self.codes)], axis=1)
        return scores.at[0].set(0.0)


def _count(num_rows: int) -> int:
    return min(NUM_CENTROIDS, num_rows - 1)


def _fit(part: Float[np.ndarray, "R S"], generator: np.random.Generator) -> np.ndarray:
    """Centroids of the rows' parts, as float16; the parts themselves where they are few."""
    if len(part) > FIT_ROWS:
        part = part[np.sort(generator.choice(len(part), FIT_ROWS, replace=False))]
    distinct = np.unique(part, axis=0)
    if len(distinct) <= NUM_CENTROIDS:
        return distinct.astype(np.float16)
    found, _ = kmeans2(
        part.astype(np.float64), NUM_CENTROIDS, iter=ROUNDS, minit="++", missing="warn", rng=generator
    )
    return found.astype(np.float16)


def _nearest(part: Float[np.ndarray, "R S"], centroids: Float[np.ndarray, "K S"]) -> UInt8[np.ndarray, " R"]:
    """In blocks, so that no `[R, K]` array of a large table exists."""
    half_norms = 0.5 * np.sum(np.square(centroids), axis=1)
    blocks = [
        np.argmin(half_norms - part[first : first + 65536] @ centroids.T, axis=1)
        for first in range(0, len(part), 65536)
    ]
    return np.concatenate(blocks).astype(np.uint8)
