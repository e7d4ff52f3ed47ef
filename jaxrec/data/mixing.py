"""Whose row comes next: how the rows of several domains are mixed, by a temperature.

The stream of rows is cut into cycles of `sum(turns)` places. In each of them domain `d` has `turns[d]` places, dealt
anew by the seed, and takes its own rows in its own epochs. So a row is known from its position in the stream alone, and
the shares are those of the formula in every cycle, not in the long run only.

D = domains, C = places of a cycle.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Int, Int64

from jaxrec.data.packing import random_stream

__all__ = ["Mixing"]

# Streams of random numbers: epoch e of the first domain has e + 1, as it has where there are no others.
_DOMAIN_STREAMS = 1 << 40
_CYCLE_STREAMS = 1 << 62


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixing:
    """The endless stream of the rows of all domains.

    Attributes:
      sizes: rows of each domain, which lie one domain after another.
      turns: places of each domain in a cycle.
    """

    sizes: tuple[int, ...]
    turns: tuple[int, ...]
    seed: int

    @classmethod
    def make(cls, sizes: Int[np.ndarray, " d"], temperature: float, seed: int) -> "Mixing":
        """Domain `d` has a share of the places in proportion to `sizes[d] ** (1 / temperature)`, and one at least.

        At temperature 1 a cycle holds every row once.

        Source: Arivazhagan et al., arXiv 2019 (languages sampled by temperature).
        """
        weights = (sizes / sizes.max()) ** (1.0 / temperature)
        turns = np.maximum(np.round(sizes.sum() * weights / weights.sum()), 1).astype(np.int64)
        return cls(sizes=tuple(sizes.tolist()), turns=tuple(turns.tolist()), seed=seed)

    def followed_by(self, other: "Mixing", share: float) -> "Mixing":
        """Both streams in one, whose rows lie behind this one's: `other` has a share of the places, and one at least.

        A cycle holds what a cycle of this one holds.
        """
        places = sum(self.turns) * share / (1.0 - share)
        turns = [max(round(places * turn / sum(other.turns)), 1) for turn in other.turns]
        return Mixing(sizes=self.sizes + other.sizes, turns=(*self.turns, *turns), seed=self.seed)

    def rows_at(self, positions: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The rows at these positions of the stream."""
        if len(self.sizes) == 1:
            return self._rows_of(0, positions)
        rows = np.empty_like(positions)
        cycles, places = np.divmod(positions, sum(self.turns))
        first_rows = np.cumsum(self.sizes) - self.sizes
        for cycle in np.unique(cycles).tolist():
            here = np.flatnonzero(cycles == cycle)
            domains, before = _deal(self.seed, cycle, self.turns)
            domains, before = domains[places[here]], before[places[here]]
            for domain in np.unique(domains).tolist():
                own = domains == domain
                turn = cycle * self.turns[domain] + before[own]
                rows[here[own]] = first_rows[domain] + self._rows_of(domain, turn)
        return rows

    def _rows_of(self, domain: int, turns: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The rows that a domain takes at these of its own turns, counted within the domain."""
        epochs, inside = np.divmod(turns, self.sizes[domain])
        rows = np.empty_like(inside)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            rows[here] = self._permutations[domain](epoch)[inside[here]]
        return rows

    @functools.cached_property
    def _permutations(self) -> list[Callable[[int], Int64[np.ndarray, " r"]]]:
        """By domain, the order of its rows in an epoch; a batch spans two epochs at most, unless the domain is tiny."""

        def make(domain: int, size: int) -> Callable[[int], Int64[np.ndarray, " r"]]:
            @functools.lru_cache(maxsize=4)
            def permutation(epoch: int) -> Int64[np.ndarray, " r"]:
                return random_stream(self.seed, domain * _DOMAIN_STREAMS + epoch + 1).permutation(size)

            return permutation

        return [make(domain, size) for domain, size in enumerate(self.sizes)]


@functools.lru_cache(maxsize=4)
def _deal(
    seed: int, cycle: int, turns: tuple[int, ...]
) -> tuple[Int[np.ndarray, " c"], Int[np.ndarray, " c"]]:
    """The domain of each place of a cycle, and how many places of that domain come before it."""
    domains = np.repeat(np.arange(len(turns)), turns)
    domains = domains[random_stream(seed, _CYCLE_STREAMS + cycle).permutation(len(domains))]
    before = np.empty_like(domains)
    for domain in range(len(turns)):
        own = domains == domain
        before[own] = np.arange(np.count_nonzero(own))
    return domains, before
