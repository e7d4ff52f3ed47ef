"""Binary cross-entropy over several labels, unknown ones left out. In nats."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def binary_cross_entropy(
    logits: Float[Array, "*b k"], labels: Int[Array, "*b k"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum over the known labels, and how many there are; -1 = unknown."""
    known = labels >= 0
    logits = logits.astype(jnp.float32)
    # log(1 + e^x) - y x, in the form that neither overflows nor cancels.
    loss = jax.nn.softplus(logits) - jnp.where(known, labels, 0) * logits
    return jnp.sum(jnp.where(known, loss, 0.0)), jnp.sum(known.astype(jnp.float32))
