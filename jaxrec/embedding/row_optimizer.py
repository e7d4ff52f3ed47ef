"""Optimizers of table rows: what happens to a row that has a gradient.

They see whole rows and their complete gradients, one a row, and are elementwise over rows. The engine calls them on
the rows of a batch alone, `apply_dense` on every row (a full softmax touches them all).

R = rows of a shard, U = touched rows, D = embed dim.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Slots = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowOptimizer:
    """Base of the row optimizers.

    Attributes:
      learning_rate: peak rate; the run's schedule scales it as it scales the dense parameters' rate.
      weight_decay: decoupled, on the rows that the step touches.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"row_optimizer.{name}={getattr(self, name)} must not be negative.")

    @property
    def elementwise(self) -> bool:
        """Whether the entries of a row are updated apart, so that the parts of a row give what the whole row gives.

        Slots of one float a row must then be alike in all parts.
        """
        return False

    def init(self, table: Float[Array, "R D"]) -> Slots:
        """Fresh slots, whose leading dim is the table's."""
        raise TypeError(f"{type(self).__name__} must define init")

    def direction(self, slots: Slots, gradients: Float[Array, "u D"]) -> tuple[Float[Array, "u D"], Slots]:
        """What the rate is multiplied with, and the new slots; elementwise over rows."""
        raise TypeError(f"{type(self).__name__} must define direction")

    def update(
        self, rows: Float[Array, "u D"], slots: Slots, gradients: Float[Array, "u D"], rate: jax.Array
    ) -> tuple[Float[Array, "u D"], Slots]:
        """New rows and slots from the rows' complete gradients."""
        direction, slots = self.direction(slots, gradients)
        if self.weight_decay:
            direction += self.weight_decay * rows
        return rows - rate * direction, slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sgd(RowOptimizer):
    """`row -= rate * gradient`."""

    @property
    def elementwise(self) -> bool:
        """See the base."""
        return True

    def init(self, table: Float[Array, "R D"]) -> Slots:
        """No state."""
        return {}

    def direction(self, slots: Slots, gradients: Float[Array, "u D"]) -> tuple[Float[Array, "u D"], Slots]:
        """See the class."""
        return gradients, slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Momentum(RowOptimizer):
    """Lazy heavy-ball momentum: the velocity of a row moves only when the row is touched.

    Source: Polyak, 1964; the dampening-free form of Sutskever et al., ICML 2013.
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_shares(decay=self.decay)

    @property
    def elementwise(self) -> bool:
        """See the base."""
        return True

    def init(self, table: Float[Array, "R D"]) -> Slots:
        """A velocity the size of the table."""
        return {"velocity": jnp.zeros(table.shape, jnp.float32)}

    def direction(self, slots: Slots, gradients: Float[Array, "u D"]) -> tuple[Float[Array, "u D"], Slots]:
        """See the class."""
        velocity = self.decay * slots["velocity"] + gradients
        return velocity, {"velocity": velocity}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowAdagrad(RowOptimizer):
    """Adagrad with one accumulator a row: the mean square of the row's gradient.

    Source: Duchi et al., JMLR 2011 (Adagrad); one float a row as in large recommenders' table optimizers.
    """

    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_epsilon(self.epsilon)

    def init(self, table: Float[Array, "R D"]) -> Slots:
        """One float a row."""
        return {"accumulator": jnp.zeros(table.shape[:1], jnp.float32)}

    def direction(self, slots: Slots, gradients: Float[Array, "u D"]) -> tuple[Float[Array, "u D"], Slots]:
        """See the class."""
        accumulator = slots["accumulator"] + jnp.mean(jnp.square(gradients), -1)
        return gradients / (jnp.sqrt(accumulator) + self.epsilon)[:, None], {"accumulator": accumulator}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam(RowOptimizer):
    """Adam; lazy on sparse rows: moments move, and bias is corrected, by the number of a row's own updates.

    Source: Kingma & Ba, ICLR 2015; decoupled weight decay of Loshchilov & Hutter, ICLR 2019.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_shares(beta1=self.beta1, beta2=self.beta2)
        _check_epsilon(self.epsilon)

    @property
    def elementwise(self) -> bool:
        """See the base."""
        return True

    def init(self, table: Float[Array, "R D"]) -> Slots:
        """Two moments the size of the table, and a count a row."""
        zeros = jnp.zeros(table.shape, jnp.float32)
        return {
            "first_moment": zeros,
            "second_moment": jnp.zeros_like(zeros),
            "count": jnp.zeros(table.shape[:1], jnp.float32),
        }

    def direction(self, slots: Slots, gradients: Float[Array, "u D"]) -> tuple[Float[Array, "u D"], Slots]:
        """See the class."""
        count = slots["count"] + 1
        first = self.beta1 * slots["first_moment"] + (1 - self.beta1) * gradients
        second = self.beta2 * slots["second_moment"] + (1 - self.beta2) * jnp.square(gradients)
        mean = first / (1 - self.beta1**count)[:, None]
        variance = second / (1 - self.beta2**count)[:, None]
        direction = mean / (jnp.sqrt(variance) + self.epsilon)
        return direction, {"first_moment": first, "second_moment": second, "count": count}


def apply_dense(
    optimizer: RowOptimizer,
    table: Float[Array, "R D"],
    slots: Slots,
    gradient: Float[Array, "R D"],
    *,
    rate: jax.Array,
    apply: Bool[Array, ""],
) -> tuple[jax.Array, Slots]:
    """Updates every row from a shard-local dense gradient; `apply` False leaves every bit as it was."""
    new, new_slots = optimizer.update(table, slots, gradient, rate)
    # One pass over the table reads and writes it anyway: the select fuses into that pass.
    guard = lambda new, old: jnp.where(apply, new, old)  # noqa: E731
    return guard(new, table), jax.tree.map(guard, new_slots, slots)


def _check_shares(**kept: float) -> None:
    """Of an average, what is kept of it at each update."""
    for name, share in kept.items():
        if not 0.0 <= share < 1.0:
            raise ValueError(f"row_optimizer.{name}={share} must be at least 0 and below 1.")


def _check_epsilon(epsilon: float) -> None:
    if epsilon <= 0:
        raise ValueError(
            f"row_optimizer.epsilon={epsilon} must be above 0, or a row without gradients divides 0 by 0."
        )
