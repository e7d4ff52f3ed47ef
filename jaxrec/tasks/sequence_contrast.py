"""Sequence contrast: two views of a history are told from the views of other histories (self-supervised).

A view is the history cropped, masked or reordered, one of them drawn for each history, under its own dropout.
`views=()` leaves the dropout alone to tell the two apart.

B = packed rows, L = positions, S = histories of a row (a static bound), D = item dim.

Source: Xie et al., ICDE 2022 (CL4SRec: crop, mask, reorder); Qiu et al., WSDM 2022 (DuoRec: dropout views).
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrec.core.batch import Batch
from jaxrec.core.hashing import hashed_uniform
from jaxrec.losses.sampled import sampled_softmax
from jaxrec.nn.layers import unit_vectors
from jaxrec.tasks.base import DataFacts, Forward, Plan, Task, TaskLoss

View = Literal["crop", "mask", "reorder"]
VIEWS: tuple[View, ...] = get_args(View)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ViewPlan:
    """How a view shows a batch.

    Attributes:
      source: the column whose event stands here.
      masked: True = hidden behind the mask vector.
      kept: False = cut away.
      last: columns of the last kept events, in the order of the histories.
    """

    source: Int[Array, "B L"]
    masked: Bool[Array, "B L"]
    kept: Bool[Array, "B L"]
    last: Int[Array, "B S"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceContrast(Task):
    """Tells two views of a history from those of the other histories of the global batch.

    Attributes:
      views: what may be done to a history; empty = nothing but dropout.
      crop_rate, mask_rate, reorder_rate: share of a history that is kept, hidden, and shuffled.
      temperature: the cosines are divided by it.
      max_histories: of a packed row that take part, the first ones; a static bound.
    """

    views: tuple[View, ...] = VIEWS
    crop_rate: float = 0.6
    mask_rate: float = 0.3
    reorder_rate: float = 0.3
    temperature: float = 0.1
    max_histories: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("crop_rate", "mask_rate", "reorder_rate"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"SequenceContrast.{name}={getattr(self, name)} must lie in (0, 1].")
        if unknown := [view for view in self.views if view not in VIEWS]:
            raise ValueError(
                f"SequenceContrast.views has {unknown[0]!r}; choose among crop, mask and reorder."
            )
        if self.temperature <= 0:
            raise ValueError(f"SequenceContrast.temperature={self.temperature} must be above 0.")
        if self.max_histories < 1:
            raise ValueError(f"SequenceContrast.max_histories={self.max_histories} must be at least 1.")

    @property
    def encodings(self) -> frozenset[str]:
        """Two of its own."""
        return frozenset({"first view", "second view"})

    def scored_pairs(self, batch_rows: int, length: int, num_items: int) -> float:
        """Every view against every other one, both ways."""
        return 2.0 * float(batch_rows * min(self.max_histories, length)) ** 2

    def plan(self, batch: Batch, facts: DataFacts, key: jax.Array) -> Plan:
        """Draws two views; histories of one event have nothing to tell."""
        ends = _ends(batch)
        first, weights = _first(ends.is_last & (jnp.asarray(batch.positions) > 0), self.max_histories)
        views = [self._view(batch, ends, first, jax.random.fold_in(key, i)) for i in range(2)]
        users = jnp.take_along_axis(jnp.asarray(batch.user_ids), first, 1)
        return Plan(jnp.sum(weights), arrays={"views": views, "weights": weights, "users": users})

    def loss(self, forward: Forward, plan: Plan, key: jax.Array) -> TaskLoss:
        """Cross-entropy of each view's partner among the views of the other histories, mean of both directions."""
        one, other = (
            self._encode(forward, view, jax.random.fold_in(key, i))
            for i, view in enumerate(plan.arrays["views"])
        )
        weights, users = plan.arrays["weights"].reshape(-1), plan.arrays["users"].reshape(-1)

        def told(a: jax.Array, b: jax.Array) -> jax.Array:
            # The other histories are what they are, no draws that stand for more: log_q = 0 of one draw.
            return sampled_softmax(
                a / self.temperature, users, b, weights, users, b, jnp.zeros_like(weights),
                negative_mask=weights > 0, num_draws=1.0,
            )[0]  # fmt: skip

        return TaskLoss(0.5 * (told(one, other) + told(other, one)))

    def _encode(self, forward: Forward, view: ViewPlan, key: jax.Array) -> Float[Array, "BS D"]:
        """Unit vectors of the views' histories."""
        events = jnp.take_along_axis(forward.events, view.source[..., None], 1)
        batch = dataclasses.replace(
            forward.batch,
            segment_ids=jnp.where(view.kept, forward.batch.segment_ids, 0),
            labels=jnp.take_along_axis(jnp.asarray(forward.batch.labels), view.source[..., None], 1),
        )
        states = forward.model.encode(
            events, batch, causal=True, key=key, user_rows=forward.users, masked=view.masked,
            last_positions=view.last,
        )  # fmt: skip
        queries = forward.model.queries(states).astype(jnp.float32)
        return unit_vectors(queries.reshape(-1, queries.shape[-1]))

    def _view(self, batch: Batch, ends: "_Ends", first: Int[Array, "B S"], key: jax.Array) -> ViewPlan:
        shape = batch.item_ids.shape
        columns = jnp.broadcast_to(jnp.arange(shape[1]), shape)
        positions = jnp.asarray(batch.positions)
        kind, place, chance = (hashed_uniform(jax.random.fold_in(key, i), shape) for i in range(3))
        # One draw a history: its events read the draw at its first column.
        kind, place = (jnp.take_along_axis(x, columns - positions, 1) for x in (kind, place))
        chosen = jnp.minimum((kind * len(self.views)).astype(jnp.int32), len(self.views) - 1)
        is_view = {
            name: (chosen == self.views.index(name)) if name in self.views else jnp.zeros(shape, bool)
            for name in VIEWS
        }

        def inside(rate: float) -> tuple[Bool[Array, "B L"], Int[Array, "B L"], Int[Array, "B L"]]:
            """Events of a random run that is this share of its history, its first position and its length."""
            size = jnp.clip(jnp.ceil(rate * ends.length).astype(jnp.int32), 1, jnp.maximum(ends.length, 1))
            start = jnp.minimum((place * (ends.length - size + 1)).astype(jnp.int32), ends.length - size)
            return (positions >= start) & (positions < start + size), start, size

        in_crop, crop_start, crop_size = inside(self.crop_rate)
        kept = jnp.where(is_view["crop"], in_crop, True)
        last = jnp.where(is_view["crop"], columns - positions + crop_start + crop_size - 1, ends.last)
        in_shuffle, start, size = inside(self.reorder_rate)
        order = jnp.where(
            is_view["reorder"] & in_shuffle, columns - positions + start + chance * size, columns
        )
        return ViewPlan(
            source=jnp.argsort(order, axis=1, stable=True),
            masked=is_view["mask"] & (chance < self.mask_rate),
            kept=kept,
            last=jnp.take_along_axis(last, first, 1),
        )


@dataclasses.dataclass(frozen=True)
class _Ends:
    """Of each event's history: the column of its last event, its length; and whether the event is the last."""

    last: Int[Array, "B L"]
    length: Int[Array, "B L"]
    is_last: Bool[Array, "B L"]


def _ends(batch: Batch) -> _Ends:
    segments, is_last = jnp.asarray(batch.segment_ids), jnp.asarray(batch.last_mask)
    columns = jnp.arange(segments.shape[1])
    # The nearest end to the right; padding has none, and reads its own column.
    nearest = jax.lax.cummin(jnp.where(is_last, columns, segments.shape[1]), axis=1, reverse=True)
    last = jnp.where(segments > 0, nearest, columns)
    return _Ends(last, jnp.take_along_axis(jnp.asarray(batch.positions), last, 1) + 1, is_last)


def _first(chosen: Bool[Array, "B L"], bound: int) -> tuple[Int[Array, "B S"], Float[Array, "B S"]]:
    """The first columns that are chosen, at most `bound` of a row, and 1.0 where there is one."""
    length = chosen.shape[1]
    rank, columns = jax.lax.top_k(jnp.where(chosen, length - jnp.arange(length), 0), min(bound, length))
    return columns, (rank > 0).astype(jnp.float32)
