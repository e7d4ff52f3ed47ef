"""Generalised binary cross-entropy (gBCE): negative sampling without the over-confidence that it brings. In nats.

T = targets, S = shared negatives, D = embed dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrec.losses.chunks import CHUNK_LOGITS, Arrays, sum_over_targets


def generalised_bce(
    queries: Float[Array, "T D"],
    target_ids: Int[Array, "T"],
    target_vectors: Float[Array, "T D"],
    weights: Float[Array, "T"],
    negative_ids: Int[Array, "S"],
    negative_vectors: Float[Array, "S D"],
    *,
    num_items: int,
    calibration: float,
    target_bias: Float[Array, "T"] | None = None,
    negative_bias: Float[Array, "S"] | None = None,
    chunk_logits: int = CHUNK_LOGITS,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sum of `(-beta log sigmoid(target) - sum of log sigmoid(-negative)) / (S + 1)`, and of the weights.

    `beta = 1 - calibration (1 - a)`, where `a = S / (num_items - 1)` is the share of the items that are drawn. Each
    positive meets a positive label, but only `a` of the negatives do a negative one: plain cross-entropy learns
    probabilities that are too high by that. A power of `beta` on the positive's takes it back.

    Args:
      weights: 0 leaves a target out.
      negative_ids: uniform draws; a draw of the target itself is left out.
      calibration: 0 = plain binary cross-entropy, 1 = calibrated probabilities.
      target_bias, negative_bias: added to the logits.

    Source: Petrov and Macdonald, RecSys 2023 (gSASRec). Deviation: the negatives are shared by all targets.
    """
    num_negatives = len(negative_ids)
    share = min(1.0, num_negatives / max(1, num_items - 1))
    beta = 1.0 - calibration * (1.0 - share)
    target_logits = jnp.sum(queries.astype(jnp.float32) * target_vectors.astype(jnp.float32), axis=-1)
    if target_bias is not None:
        target_logits = target_logits + target_bias.astype(jnp.float32)
    if negative_bias is None:
        negative_bias = jnp.zeros(num_negatives, jnp.float32)

    def chunk_loss(part: Arrays, shared: Arrays) -> jax.Array:
        query, ids, target_logit, weight = part
        candidate_ids, vectors, bias = shared
        # Its gradient is summed over the chunks: in float32, whatever the operands of the product are.
        vectors = vectors.astype(negative_vectors.dtype)
        logits = jnp.einsum("cd,sd->cs", query, vectors, preferred_element_type=jnp.float32) + bias
        hit = ids[:, None] == candidate_ids[None, :]
        negatives = jnp.sum(jnp.where(hit, 0.0, jax.nn.softplus(logits)), axis=-1)
        loss = (beta * jax.nn.softplus(-target_logit) + negatives) / (num_negatives + 1)
        return jnp.sum(jnp.where(weight > 0, weight * loss, 0.0))

    weights = weights.astype(jnp.float32)
    targets = (queries, target_ids, target_logits, weights)
    shared = (negative_ids, negative_vectors.astype(jnp.float32), negative_bias.astype(jnp.float32))
    return sum_over_targets(chunk_loss, targets, shared, chunk_logits // num_negatives), jnp.sum(weights)
