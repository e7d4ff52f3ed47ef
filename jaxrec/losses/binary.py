"""Binary cross-entropy over several labels, unknown ones left out, and the logit of a product. In nats.

K = labels.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def binary_cross_entropy(
    logits: Float[Array, "*b k"], labels: Int[Array, "*b k"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum over the known labels, and how many there are.

    Args:
      labels: 1, 0, or negative = unknown: adds nothing to either sum, nor to a gradient.
    """
    known = labels >= 0
    logits = jnp.where(known, logits.astype(jnp.float32), 0.0)
    # -log sigmoid(x) of a positive is softplus(-x). The short form softplus(x) - x y cancels: at x = 20 it is 0.
    loss = jax.nn.softplus(jnp.where(labels > 0, -logits, logits))
    return jnp.sum(jnp.where(known, loss, 0.0)), jnp.sum(known.astype(jnp.float32))


def product_logits(one: Float[Array, "*b"], other: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """The logit of sigmoid(one) sigmoid(other): never above either, and with gradients between 0 and 1.

    The odds against the product are (1 + e^-a)(1 + e^-b) - 1 = e^-a + e^-b + e^-(a + b), whose logarithm needs no
    probability that could round to 0 or 1.
    """
    one, other = one.astype(jnp.float32), other.astype(jnp.float32)
    return -jax.nn.logsumexp(jnp.stack([-one, -other, -one - other], -1), axis=-1)
