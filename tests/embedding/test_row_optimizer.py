"""Row optimizers: their arithmetic, and that `apply=False` changes no bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrec.embedding.row_optimizer import Adam, Momentum, RowAdagrad, RowOptimizer, Sgd, apply_dense

OPTIMIZERS = [Sgd(), Momentum(), RowAdagrad(), Adam(weight_decay=0.01)]
RATE = jnp.float32(0.1)
TABLE = jnp.asarray(np.random.default_rng(0).normal(size=(37, 4)).astype(np.float32))


def dense_steps(optimizer, gradients):
    table, slots = TABLE, optimizer.init(TABLE)
    for gradient in gradients:
        table, slots = apply_dense(optimizer, table, slots, gradient, rate=RATE, apply=jnp.bool_(True))
    return table


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_a_refused_update_changes_no_bit(optimizer):
    slots = jax.tree.map(lambda s: s + 1, optimizer.init(TABLE))
    after = apply_dense(optimizer, TABLE, slots, TABLE, rate=RATE, apply=jnp.bool_(False))
    jax.tree.map(np.testing.assert_array_equal, after, (TABLE, slots))


@pytest.mark.parametrize(
    ("optimizer", "reference"),
    [
        (Sgd(), optax.sgd(0.1)),
        (Momentum(decay=0.8), optax.sgd(0.1, momentum=0.8)),
        (Adam(), optax.adam(0.1)),
        (Adam(weight_decay=0.3), optax.adamw(0.1, weight_decay=0.3)),
    ],
    ids=lambda o: type(o).__name__,
)
def test_on_every_row_they_are_the_optax_optimizers(optimizer, reference):
    twin, state = TABLE, reference.init(TABLE)
    gradients = [TABLE * count for count in range(1, 4)]
    for gradient in gradients:
        updates, state = reference.update(gradient, state, twin)
        twin = optax.apply_updates(twin, updates)
    np.testing.assert_allclose(dense_steps(optimizer, gradients), twin, rtol=1e-5, atol=1e-6)


def test_row_wise_adagrad_divides_by_the_root_of_the_summed_mean_squares():
    first, second = TABLE, 2 * TABLE
    mean_square = jnp.mean(jnp.square(TABLE), -1, keepdims=True)
    expected = TABLE - RATE * (first / jnp.sqrt(mean_square) + second / jnp.sqrt(5 * mean_square))
    np.testing.assert_allclose(dense_steps(RowAdagrad(), [first, second]), expected, rtol=1e-5)


def test_the_base_class_says_what_is_missing():
    with pytest.raises(TypeError, match="RowOptimizer must define init"):
        RowOptimizer().init(TABLE)
    with pytest.raises(TypeError, match="RowOptimizer must define direction"):
        RowOptimizer().update(TABLE, {}, TABLE, RATE)


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [(Adam, "beta1", 1.0), (Adam, "beta2", -0.1), (Momentum, "decay", 1.5), (Adam, "epsilon", 0.0),
     (RowAdagrad, "epsilon", -1e-8)],
)  # fmt: skip
def test_settings_that_divide_by_zero_are_refused(make, field, value):
    with pytest.raises(ValueError, match=rf"row_optimizer\.{field}={value} must be"):
        make(**{field: value})


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_negative_rates_are_refused(name):
    with pytest.raises(ValueError, match=rf"row_optimizer\.{name}=-1 must not be negative"):
        Sgd(**{name: -1})
