"""Binary cross-entropy against the definition in float64; unknown labels and extreme logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxrec.losses.binary import binary_cross_entropy, product_logits


@given(data=st.data(), shape=st.sampled_from([(1,), (5, 3), (2, 3, 2)]))
def test_equals_the_definition_over_known_labels(data, shape):
    logits = data.draw(hnp.arrays(np.float32, shape, elements=st.floats(-15, 15, width=32)))
    labels = data.draw(hnp.arrays(np.int8, shape, elements=st.integers(-1, 1)))
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    loss = -np.where(labels == 1, np.log(probability), np.log(1 - probability))
    total, weight = binary_cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(total, loss[labels >= 0].sum(), rtol=1e-4, atol=1e-6)
    assert weight == (labels >= 0).sum()


@pytest.mark.parametrize(
    ("logit", "label", "loss"), [(20.0, 1, np.exp(-20.0)), (1e4, 1, 0.0), (-1e4, 1, 1e4), (1e4, 0, 1e4)]
)
def test_extreme_logits_neither_overflow_nor_cancel(logit, label, loss):
    total, gradient = jax.value_and_grad(lambda x: binary_cross_entropy(x[None], jnp.array([label]))[0])(
        jnp.float32(logit)
    )
    np.testing.assert_allclose(total, loss, rtol=1e-5)
    assert np.isfinite(gradient)


def test_unknown_labels_take_no_part():
    logits = jnp.array([[1.0, jnp.inf], [jnp.nan, -2.0]])
    labels = jnp.array([[1, -1], [-1, 0]], jnp.int8)
    (total, weight), gradient = jax.value_and_grad(binary_cross_entropy, has_aux=True)(logits, labels)
    np.testing.assert_allclose(total, np.log1p(np.exp(-1)) + np.log1p(np.exp(-2)), rtol=1e-6)
    assert weight == 2
    np.testing.assert_array_equal(np.asarray(gradient)[[0, 1], [1, 0]], 0.0)


def test_no_known_label_gives_zero_of_zero():
    total, weight = binary_cross_entropy(jnp.ones((2, 3)), jnp.full((2, 3), -1))
    assert (total, weight) == (0.0, 0.0)


@given(logits=hnp.arrays(np.float32, (2, 4), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_a_product_is_never_above_its_factors(logits):
    one, other = jnp.asarray(logits)
    product, gradients = jax.value_and_grad(lambda a, b: jnp.sum(product_logits(a, b)), (0, 1))(one, other)
    assert np.isfinite(product)
    assert (np.asarray(product_logits(one, other)) <= logits.min(0)).all()
    for gradient in gradients:
        assert (np.asarray(gradient) >= 0).all()
        assert (np.asarray(gradient) <= 1 + 1e-6).all()


@given(logits=hnp.arrays(np.float32, (2, 4), elements=st.floats(-12, 12, width=32)))
def test_a_product_equals_the_definition(logits):
    probability = np.prod(1 / (1 + np.exp(-logits.astype(np.float64))), axis=0)
    expected = np.log(probability) - np.log1p(-probability)
    np.testing.assert_allclose(product_logits(*jnp.asarray(logits)), expected, rtol=1e-4, atol=1e-4)
