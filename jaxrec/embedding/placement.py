"""How the rows of a table lie on the devices: the choices, as values, and their arithmetic.

`Rows` is the engine itself; the others are described to it. `Columns` is a table of C times as many rows, each a part
of one; `Replicated` is a table on one shard that every device has. A placement changes no result: first rows, rounding
and updates hang on the id and on the place in the row alone.

N = devices, D = embed dim, C = parts of a row, W = D / C.
"""

import dataclasses

from jax.sharding import PartitionSpec
from jaxtyping import Array

from jaxrec.core.hashing import Part
from jaxrec.core.partition import spec
from jaxrec.core.placement import own_ids

MAX_ROWS = 2**31 - 1  # rows are numbered in int32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Base of the placements."""

    def __str__(self) -> str:
        return repr(self).removesuffix("()")

    @property
    def num_parts(self) -> int:
        """C: a row of the table is so many rows of its array."""
        return 1

    @property
    def partition(self) -> PartitionSpec:
        """How the table's array and its slots are split."""
        return spec("row")

    def shards(self, devices: int) -> int:
        """Shards that the array is split into."""
        return devices

    def own_numbers(self, places: Array) -> Array:
        """Inside `shard_map`: the numbers, in the whole table, of this device's array rows."""
        return own_ids(places)

    def hashed_part(self, numbers: Array, width: int) -> tuple[Array, Part | None]:
        """Ids of array rows of `width`, and which part of their rows these are; for `core.hashing`."""
        return numbers, None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows(Placement):
    """Row i whole on device i mod N; ids, rows and gradients are exchanged."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replicated(Placement):
    """Every row on every device: look-ups are local, the gradients of all rows are summed over the devices."""

    @property
    def partition(self) -> PartitionSpec:
        """Not split."""
        return PartitionSpec()

    def shards(self, devices: int) -> int:
        """One, which every device has."""
        return 1

    def own_numbers(self, places: Array) -> Array:
        """All of them."""
        return places


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns(Placement):
    """Each row cut into parts of equal width; part c of row i lies as row i * parts + c would.

    Attributes:
      parts: divides the table's dim.
    """

    parts: int = 2

    def __post_init__(self) -> None:
        if self.parts < 2:
            raise ValueError(f"Columns.parts={self.parts} must be at least 2; Rows keeps rows whole.")

    @property
    def num_parts(self) -> int:
        """See the class."""
        return self.parts

    def hashed_part(self, numbers: Array, width: int) -> tuple[Array, Part | None]:
        """See the base."""
        return numbers // self.parts, (((numbers % self.parts * width)[:, None],), (width,))
