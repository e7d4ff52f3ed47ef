"""Generalised binary cross-entropy (gBCE): negative sampling without the over-confidence that it brings. In nats.

T = targets, S = shared negatives, D = embed dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrec.core.mixture_score import MixtureScore
from jaxrec.losses.chunks import CHUNK_LOGITS, pair_logits, sum_against_negatives


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
    score: MixtureScore | None = None,
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
    offset = jnp.zeros(num_negatives, jnp.float32) if negative_bias is None else negative_bias

    def loss(target: jax.Array, logits: jax.Array, counts: jax.Array) -> jax.Array:
        negatives = jnp.sum(jnp.where(counts, jax.nn.softplus(logits), 0.0), axis=-1)
        return (beta * jax.nn.softplus(-target) + negatives) / (num_negatives + 1)

    return sum_against_negatives(
        loss, queries, target_ids, pair_logits(queries, target_vectors, target_bias, score), weights,
        negative_ids, negative_vectors, offset.astype(jnp.float32),
        negative_mask=jnp.ones(num_negatives, bool), score=score, chunk_logits=chunk_logits,
    )  # fmt: skip
