"""Optimizers of table rows: they touch the rows of the batch only, or every row under a full softmax.

Both forms run where the rows lie. `SparseRows` holds one gradient per looked-up position, ids repeated; they are
summed per row before any nonlinear update.

R = physical rows, D = embed dim, T = looked-up positions.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrec.core.partition import spec
from jaxrec.core.placement import all_gather, local_index

Slots = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseRows:
    """Gradient of a loss with respect to looked-up rows; ids repeat, and 0 (padding) is ignored."""

    ids: Int[Array, "t"]
    gradients: Float[Array, "t D"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowOptimizer:
    """Base of the row optimizers.

    Attributes:
      learning_rate: peak rate; the run's schedule scales it as it scales the dense parameters' rate.
    """

    learning_rate: float = 1e-3

    def init(self, table: Float[Array, "R D"]) -> Slots:
        """Fresh slots, whose leading dim is the table's."""
        raise TypeError(f"{type(self).__name__} must define init")

    def update(
        self, rows: jax.Array, slots: Slots, gradients: jax.Array, rate: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, Slots]:
        """New rows and slots from the rows' summed gradients; elementwise over rows, `count` starts at 1."""
        raise TypeError(f"{type(self).__name__} must define update")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sgd(RowOptimizer):
    """`row -= rate * gradient`."""

    def init(self, table: Float[Array, "R D"]) -> Slots:
        """No state."""
        return {}

    def update(
        self, rows: jax.Array, slots: Slots, gradients: jax.Array, rate: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, Slots]:
        """See the class."""
        return rows - rate * gradients, slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowAdagrad(RowOptimizer):
    """Adagrad with one accumulator a row: the mean square of the row's gradient.

    Source: Duchi et al., JMLR 2011 (Adagrad); one float a row as in large recommenders' table optimizers.
    """

    epsilon: float = 1e-8

    def init(self, table: Float[Array, "R D"]) -> Slots:
        """One float a row."""
        return {"accumulator": jnp.zeros(table.shape[:1], jnp.float32)}

    def update(
        self, rows: jax.Array, slots: Slots, gradients: jax.Array, rate: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, Slots]:
        """See the class."""
        accumulator = slots["accumulator"] + jnp.mean(jnp.square(gradients), -1)
        step = rate * gradients / (jnp.sqrt(accumulator) + self.epsilon)[:, None]
        return rows - step, {"accumulator": accumulator}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam(RowOptimizer):
    """Adam; on sparse rows it is lazy: the moments of a row move only when the row is touched.

    Source: Kingma & Ba, ICLR 2015; decoupled weight decay of Loshchilov & Hutter, ICLR 2019.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0

    def init(self, table: Float[Array, "R D"]) -> Slots:
        """Two moments the size of the table."""
        return {"first_moment": jnp.zeros_like(table), "second_moment": jnp.zeros_like(table)}

    def update(
        self, rows: jax.Array, slots: Slots, gradients: jax.Array, rate: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, Slots]:
        """See the class."""
        first = self.beta1 * slots["first_moment"] + (1 - self.beta1) * gradients
        second = self.beta2 * slots["second_moment"] + (1 - self.beta2) * jnp.square(gradients)
        mean = first / (1 - self.beta1**count)
        variance = second / (1 - self.beta2**count)
        step = rate * (mean / (jnp.sqrt(variance) + self.epsilon) + self.weight_decay * rows)
        return rows - step, {"first_moment": first, "second_moment": second}


def apply_sparse(
    optimizer: RowOptimizer,
    table: Float[Array, "R D"],
    slots: Slots,
    sparse: SparseRows,
    *,
    rate: jax.Array,
    count: jax.Array,
    apply: Bool[Array, ""],
) -> tuple[jax.Array, Slots]:
    """Updates the rows of `sparse` alone. `apply` False leaves every bit as it was, by masking ids."""

    def local(
        shard: jax.Array, slots: Slots, ids: jax.Array, gradients: jax.Array
    ) -> tuple[jax.Array, Slots]:
        index = _owned_index(shard, jnp.where(apply, ids, 0))
        rows, summed = sum_by_row(index, all_gather(gradients), shard.shape[0])
        old = shard.at[rows].get(mode="fill", fill_value=0)
        old_slots = {name: slot.at[rows].get(mode="fill", fill_value=0) for name, slot in slots.items()}
        new, new_slots = optimizer.update(old, old_slots, summed, rate, count)

        def put(array: jax.Array, values: jax.Array) -> jax.Array:
            return array.at[rows].set(values, mode="drop", unique_indices=True, indices_are_sorted=True)

        return put(shard, new), {name: put(slot, new_slots[name]) for name, slot in slots.items()}

    row, batch = spec("row"), spec("batch")
    return jax.shard_map(local, in_specs=(row, row, batch, batch), out_specs=(row, row))(
        table, slots, sparse.ids, sparse.gradients
    )


def apply_dense(
    optimizer: RowOptimizer,
    table: Float[Array, "R D"],
    slots: Slots,
    gradient: Float[Array, "R D"],
    *,
    rate: jax.Array,
    count: jax.Array,
    apply: Bool[Array, ""],
) -> tuple[jax.Array, Slots]:
    """Updates every row from a shard-local dense gradient (a full softmax touches them all)."""
    new, new_slots = optimizer.update(table, slots, gradient, rate, count)
    # One pass over the table reads and writes it anyway: the select fuses into that pass.
    guard = lambda new, old: jnp.where(apply, new, old)  # noqa: E731
    return guard(new, table), jax.tree.map(guard, new_slots, slots)


def add_sparse(gradient: Float[Array, "R D"], sparse: SparseRows) -> Float[Array, "R D"]:
    """Adds the look-ups' gradients to a shard-local dense gradient, in place."""

    def local(shard: jax.Array, ids: jax.Array, gradients: jax.Array) -> jax.Array:
        return shard.at[_owned_index(shard, ids)].add(all_gather(gradients), mode="drop")

    row, batch = spec("row"), spec("batch")
    return jax.shard_map(local, in_specs=(row, batch, batch), out_specs=row)(
        gradient, sparse.ids, sparse.gradients
    )


def _owned_index(shard: jax.Array, ids: Int[Array, "t"]) -> Int[Array, "n"]:
    """Rows on this shard of all devices' ids; padding and other shards' ids are out of range."""
    wanted = all_gather(ids)
    return jnp.where(wanted > 0, local_index(wanted, shard.shape[0]), shard.shape[0])


def sum_by_row(
    index: Int[Array, "t"], gradients: Float[Array, "t D"], num_rows: int
) -> tuple[Int[Array, "t"], Float[Array, "t D"]]:
    """Sums gradients of equal rows: strictly rising rows first, then fillers past `num_rows`."""
    order = jnp.argsort(index)
    ordered = index[order]
    first = (
        jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]]) if index.size else jnp.ones(0, bool)
    )
    group = jnp.cumsum(first) - 1
    filler = num_rows + jnp.arange(index.size, dtype=index.dtype)
    rows = filler.at[group].set(ordered)
    # Dropped ids all share row `num_rows`; what follows them must keep rising for `indices_are_sorted`.
    rows = jnp.where(rows >= num_rows, filler, rows)
    return rows, jax.ops.segment_sum(
        gradients[order], group, num_segments=index.size, indices_are_sorted=True
    )
