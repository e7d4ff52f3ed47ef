"""Who may look at whom in packed rows, and by which path the attention computes it.

B = rows, Q = query positions, L = key positions.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

Path = Literal["full", "chunked", "fused", "compressed"]
MASKED = -1e9  # finite: exp() gives an exact 0, and no NaN can arise from a difference of infinities


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Places:
    """Where positions are: what the rule needs to know of queries and of keys; times are for biases alone."""

    segments: Int[Array, "*n b l"]
    columns: Int[Array, "*n #b l"]
    times: Int[Array, "*n b l"] | None = None


def may_see(queries: Places, keys: Places, *, causal: bool) -> Bool[Array, "b q l"]:
    """True = this query position may look at this key position.

    A position sees its own segment only. Padding (segment 0) is a segment like the others: no real event sees
    it, and no row of the softmax is ever empty.

    Args:
      causal: look at the position itself and those before it only.
    """
    mask = queries.segments[:, :, None] == keys.segments[:, None, :]
    if causal:
        mask = mask & (keys.columns[:, None, :] <= queries.columns[:, :, None])
    return mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Visibility:
    """The rule of `may_see` for a batch of rows; made by `of`.

    Attributes:
      query_positions: columns of the queries; None = every column.
      times: of the columns, as `Batch.times`; None = nobody asks.
      mask: the rule written out; for the full path alone, whose layers share it.
      path: how the attention computes (`nn.attention`).
    """

    segment_ids: Int[Array, "b l"]
    query_positions: Int[Array, "b q"] | None
    times: Int[Array, "b l"] | None
    mask: Bool[Array, "b q l"] | None
    causal: bool = dataclasses.field(metadata={"static": True})
    path: Path = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        segment_ids: Int[Array, "b l"],
        *,
        causal: bool,
        query_positions: Int[Array, "b q"] | None = None,
        times: Int[Array, "b l"] | None = None,
        path: Path = "full",
    ) -> "Visibility":
        """The rule; "fused" takes whole rows only, so that query positions go by "chunked" in its stead."""
        if path == "fused" and query_positions is not None:
            path = "chunked"
        seen = cls(
            segment_ids=segment_ids,
            query_positions=query_positions,
            times=times,
            mask=None,
            causal=causal,
            path=path,
        )
        if path == "full":
            seen = dataclasses.replace(seen, mask=may_see(seen.queries, seen.keys, causal=causal))
        return seen

    @property
    def keys(self) -> Places:
        """Every column."""
        columns = jnp.arange(self.segment_ids.shape[1], dtype=jnp.int32)[None, :]
        return Places(segments=self.segment_ids, columns=columns, times=self.times)

    @property
    def queries(self) -> Places:
        """The columns of the queries."""
        if self.query_positions is None:
            return self.keys
        take = lambda x: jnp.take_along_axis(x, self.query_positions, axis=1)  # noqa: E731
        times = None if self.times is None else take(self.times)
        return Places(segments=take(self.segment_ids), columns=self.query_positions, times=times)
