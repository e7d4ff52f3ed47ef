"""Attention over long histories: the recent events one by one, the older ones in groups.

An event sees between `recent` and `recent + group - 1` events singly, itself included, and everything older as groups
of `group` events, each with one key and one value, which counts as often as it has members. Where the events of a group
are alike this is what full attention gives. Operations grow with `length (recent + length / group)` and not with the
square of the length. Groups are counted from the start of the history, so that packing changes nothing.

B = rows, H = heads, Q = query positions, L = key positions, K = width of a head; G = groups of a row, N = blocks of
queries, C = queries of a block, M = keys of a block.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrec.nn.dropout import dropout
from jaxrec.nn.visibility import MASKED, Visibility

NOBODY = -1  # the segment of columns that are in no row


@dataclasses.dataclass(frozen=True, kw_only=True)
class HistoryCompression:
    """How much of a long history is seen singly.

    Attributes:
      recent: the latest events, seen one by one.
      group: older events that share a key and a value.
    """

    recent: int = 128
    group: int = 16

    def __post_init__(self) -> None:
        if self.recent < 1 or self.group < 2:
            raise ValueError(
                f"compression.recent={self.recent}, group={self.group}: say recent >= 1 and group >= 2."
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """The complete groups of packed rows.

    Attributes:
      places: of the columns in their segments.
      members: the columns of each group, oldest first.
      segments: of the groups; `NOBODY` = there is no such group.
      ends: place of each group's latest member.
    """

    places: Int[Array, "b l"]
    members: Int[Array, "b g c"]
    segments: Int[Array, "b g"]
    ends: Int[Array, "b g"]

    @classmethod
    def of(cls, segment_ids: Int[Array, "b l"], group: int) -> "Groups":
        """Finds them: a row of L columns has L / `group` at most, however it is packed."""
        length = segment_ids.shape[1]
        columns = jnp.arange(length, dtype=jnp.int32)
        starts = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=NOBODY) != segment_ids
        places = columns - jax.lax.cummax(jnp.where(starts, columns, 0), axis=1)
        complete = (places % group == group - 1) & (segment_ids > 0)
        last = jnp.argsort(~complete, axis=1, stable=True)[:, : length // group].astype(jnp.int32)
        take = lambda x: jnp.take_along_axis(x, last, axis=1)  # noqa: E731
        return cls(
            places=places,
            members=jnp.maximum(last[..., None] - jnp.arange(group - 1, -1, -1, dtype=jnp.int32), 0),
            segments=jnp.where(take(complete), take(segment_ids), NOBODY),
            ends=take(places),
        )

    def pooled(self, x: Float[Array, "b h l k"], weights: Float[Array, "b h g c"]) -> Float[Array, "b h g k"]:
        """The weighted mean over the members of each group."""
        rows, heads, _, width = x.shape
        num, size = self.members.shape[1:]
        at = self.members.reshape(rows, 1, num * size, 1)
        members = jnp.take_along_axis(x, at, axis=2).reshape(rows, heads, num, size, width)
        return jnp.einsum("bhgc,bhgck->bhgk", weights.astype(x.dtype), members)


def attend_compressed(
    query: Float[Array, "b h q k"],
    key: Float[Array, "b h l k"],
    value: Float[Array, "b h l k"],
    seen: Visibility,
    compression: HistoryCompression,
    pool_query: Float[Array, "h k"],
    dropout_key: jax.Array | None = None,
    dropout_rate: float = 0.0,
) -> Float[Array, "b h q k"]:
    """Causal attention, exact within the recent events.

    Args:
      pool_query: a group's members weigh `softmax(key . pool_query)` in its key and value; zeros = their mean.
      dropout_key: of the dropout on the weights; None = no dropout.

    Source: Lee et al., ICML 2019 (pooling by attention to a learned vector).
    """
    recent, group = compression.recent, compression.group
    groups = Groups.of(seen.segment_ids, group)
    logits = jnp.einsum("bhlk,hk->bhl", key, pool_query, preferred_element_type=jnp.float32)
    at = groups.members.reshape(len(key), 1, -1)
    of_members = jnp.take_along_axis(logits, at, axis=2).reshape(*logits.shape[:2], *groups.members.shape[1:])
    weights = jax.nn.softmax(of_members, axis=-1)
    group_keys, group_values = groups.pooled(key, weights), groups.pooled(value, weights)

    queries = seen.queries
    places = groups.places
    if seen.query_positions is not None:
        places = jnp.take_along_axis(places, seen.query_positions, axis=1)
    # The first place that is seen singly, where a group begins.
    since = jnp.maximum(places - recent + 1, 0) // group * group

    blocks = _Blocks(query.shape[2], None if seen.query_positions is not None else recent + group - 1)
    columns = jnp.broadcast_to(queries.columns, since.shape)
    of_queries = (blocks.queries(x)[..., None] for x in (queries.segments, columns, since))
    segments, columns, since = of_queries
    keys = seen.keys
    key_columns = jnp.broadcast_to(keys.columns, keys.segments.shape)
    key_segments, key_columns, key_places = (
        blocks.keys(x, padding)[:, :, None]
        for x, padding in ((keys.segments, NOBODY), (key_columns, 0), (groups.places, 0))
    )
    near = (segments == key_segments) & (key_columns <= columns) & (key_places >= since)
    far = (segments == groups.segments[:, None, None]) & (groups.ends[:, None, None] < since)

    query = blocks.queries(jnp.swapaxes(query, 1, 2) * (1.0 / math.sqrt(query.shape[-1])))
    key, value = (blocks.keys(jnp.swapaxes(x, 1, 2), 0) for x in (key, value))
    product = lambda spec, *x: jnp.einsum(spec, *x, preferred_element_type=jnp.float32)  # noqa: E731
    near_scores = product("bnchk,bnmhk->bhncm", query, key)
    far_scores = product("bnchk,bhgk->bhncg", query, group_keys) + math.log(group)
    weights = _softmax(near_scores, near, far_scores, far).astype(value.dtype)
    weights = dropout(weights, dropout_rate, dropout_key)
    of_near, of_far = jnp.split(weights, [near_scores.shape[-1]], axis=-1)
    mixed = product("bhncm,bnmhk->bhnck", of_near, value) + product("bhncg,bhgk->bhnck", of_far, group_values)
    rows, heads, *_, width = mixed.shape
    return mixed.reshape(rows, heads, -1, width)[:, :, : blocks.length].astype(value.dtype)


def _softmax(
    near_scores: Float[Array, "b h n c m"],
    near: Bool[Array, "b n c m"],
    far_scores: Float[Array, "b h n c g"],
    far: Bool[Array, "b n c g"],
) -> Float[Array, "b h n c mg"]:
    scores = jnp.concatenate([near_scores, far_scores], axis=-1)
    return jax.nn.softmax(jnp.where(jnp.concatenate([near, far], axis=-1)[:, None], scores, MASKED), axis=-1)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Whole rows in blocks of `size` queries, each with the keys of its own block and of the one before.

    Attributes:
      length: of the queries.
      size: no query sees more keys singly; None = one block of some columns, with all keys.
    """

    length: int
    size: int | None

    def queries(self, x: Array) -> Array:
        """`[B, Q, ...] -> [B, N, C, ...]`"""
        return x[:, None] if self.size is None else self._cut(x, 0)

    def keys(self, x: Array, padding: int) -> Array:
        """`[B, L, ...] -> [B, N, M, ...]`"""
        if self.size is None:
            return x[:, None]
        own = self._cut(x, padding)
        before = [(0, 0), (1, 0)] + [(0, 0)] * (own.ndim - 2)
        return jnp.concatenate([jnp.pad(own, before, constant_values=padding)[:, :-1], own], axis=2)

    def _cut(self, x: Array, padding: int) -> Array:
        assert self.size is not None
        pad = [(0, 0), (0, -x.shape[1] % self.size)] + [(0, 0)] * (x.ndim - 2)
        padded = jnp.pad(x, pad, constant_values=padding)
        return padded.reshape(len(x), -1, self.size, *x.shape[2:])
