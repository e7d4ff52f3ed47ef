"""Where shared negatives come from, and with what probability: the samplers of `losses.sampled`.

S = draws, N = items.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

BLOCK_BITS = 12
Counts = np.ndarray | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """A distribution over the ids 1 .. num_items; base of the samplers.

    Attributes:
      num_samples: independent draws, with replacement.
    """

    num_samples: int = 1024

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples={self.num_samples} must be at least 1.")

    def sample(self, key: jax.Array, num_items: int, item_counts: Counts = None) -> Int[Array, "S"]:
        """Draws item ids. `item_counts`: events of each id, `[num_items + 1]`."""
        raise TypeError(f"{type(self).__name__} must define sample")

    def log_q(self, ids: Int[Array, "*b"], num_items: int, item_counts: Counts = None) -> Float[Array, "*b"]:
        """Log of the probability that one draw gives each id."""
        raise TypeError(f"{type(self).__name__} must define log_q")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformSampler(Sampler):
    """Every item alike."""

    def sample(self, key: jax.Array, num_items: int, item_counts: Counts = None) -> Int[Array, "S"]:
        """See `Sampler`."""
        return jax.random.randint(key, (self.num_samples,), 1, num_items + 1, jnp.int32)

    def log_q(self, ids: Int[Array, "*b"], num_items: int, item_counts: Counts = None) -> Float[Array, "*b"]:
        """See `Sampler`."""
        return jnp.full(jnp.shape(ids), -math.log(num_items), jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogUniformSampler(Sampler):
    """Zipf's law over ids sorted by falling count: q(id) is nearly log(1 + 1/id) / log(1 + num_items).

    Exactly that up to id 2**13. Beyond, ids are drawn evenly inside of blocks of 1/8192 to 1/4096 of their
    size, because a float32 cannot tell neighbours apart among millions; `log_q` is of these blocks.
    """

    def sample(self, key: jax.Array, num_items: int, item_counts: Counts = None) -> Int[Array, "S"]:
        """See `Sampler`."""
        place_key, inner_key = jax.random.split(key)
        place = jax.random.uniform(place_key, (self.num_samples,))
        near = jnp.exp(place * math.log1p(num_items)).astype(jnp.int32)
        start, width = _block(jnp.clip(near, 1, num_items), num_items)
        return start + jax.random.randint(inner_key, (self.num_samples,), 0, width, jnp.int32)

    def log_q(self, ids: Int[Array, "*b"], num_items: int, item_counts: Counts = None) -> Float[Array, "*b"]:
        """See `Sampler`."""
        start, width = _block(jnp.asarray(ids), num_items)
        width = width.astype(jnp.float32)
        return jnp.log(jnp.log1p(width / start.astype(jnp.float32)) / (width * math.log1p(num_items)))


def _block(ids: Int[Array, "*b"], num_items: int) -> tuple[Int[Array, "*b"], Int[Array, "*b"]]:
    """First id and number of ids of the block of each id; a block of 2**n ids holds ids of n + 13 bits."""
    num_bits = 32 - jax.lax.clz(jnp.maximum(ids.astype(jnp.int32), 1))
    shift = jnp.maximum(num_bits - BLOCK_BITS - 1, 0)
    start = jnp.maximum(ids.astype(jnp.int32), 1) >> shift << shift
    return start, jnp.minimum(jnp.int32(1) << shift, num_items + 1 - start)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequencySampler(Sampler):
    """Items by their training events, to a power: q(id) is proportional to max(1, count)^power.

    By Walker's alias method: two random numbers and one look-up a draw. The table is built on the host and has 12
    bytes an item in the compiled step; for catalogues past tens of millions take `LogUniformSampler`.

    Attributes:
      power: 1 = as often as in the data, 0 = every item alike; 0.75 is the usual middle.

    Source: Walker, ACM TOMS 1977; the table is filled by prefix sums (Huebschle-Schneider & Sanders, ESA 2019).
    """

    power: float = 1.0

    def sample(self, key: jax.Array, num_items: int, item_counts: Counts = None) -> Int[Array, "S"]:
        """See `Sampler`."""
        keep, alias, _ = self._table(num_items, item_counts)
        column_key, keep_key = jax.random.split(key)
        column = jax.random.randint(column_key, (self.num_samples,), 0, num_items, jnp.int32)
        kept = jax.random.uniform(keep_key, (self.num_samples,)) < jnp.asarray(keep)[column]
        return 1 + jnp.where(kept, column, jnp.asarray(alias)[column])

    def log_q(self, ids: Int[Array, "*b"], num_items: int, item_counts: Counts = None) -> Float[Array, "*b"]:
        """See `Sampler`: of the table as it is, its rounding included."""
        return jnp.asarray(self._table(num_items, item_counts)[2])[jnp.asarray(ids) - 1]

    def _table(self, num_items: int, item_counts: Counts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if item_counts is None or len(item_counts) != num_items + 1:
            found = "no counts" if item_counts is None else f"{len(item_counts)} counts"
            raise ValueError(
                f"FrequencySampler got {found} for {num_items} items; pass one for each id from 0 on."
            )
        return alias_table(item_counts[1:].astype(np.float64).tobytes(), self.power)


@functools.lru_cache(maxsize=4)
def alias_table(counts: bytes, power: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(chance to keep a column's own item, its other item, log q of every item) for float64 counts."""
    weights = np.maximum(np.frombuffer(counts), 1.0) ** power
    size = len(weights)
    scaled = weights * (size / weights.sum())
    light, heavy = np.flatnonzero(scaled <= 1), np.flatnonzero(scaled > 1)
    keep, alias = np.minimum(scaled, 1.0), np.arange(size)
    if len(heavy):
        # Lights are filled in turn by the first heavy that has something left; a heavy that falls below one is
        # filled by the next.
        wanted, spare = np.cumsum(1 - scaled[light]), np.cumsum(scaled[heavy] - 1)
        before = np.concatenate([[0.0], wanted[:-1]])
        alias[light] = heavy[np.minimum(np.searchsorted(spare, before), len(heavy) - 1)]
        last = np.searchsorted(wanted, spare[:-1], side="right")
        falls = last < len(light)
        emptied = heavy[:-1][falls]
        keep[emptied] = np.clip(1 - (wanted[last[falls]] - spare[:-1][falls]), 0.0, 1.0)
        alias[emptied] = heavy[1:][falls]
    keep = keep.astype(np.float32)
    share = keep.astype(np.float64)
    np.add.at(share, alias, 1 - share.copy())
    with np.errstate(divide="ignore"):
        return keep, alias.astype(np.int32), np.log(share / size).astype(np.float32)
