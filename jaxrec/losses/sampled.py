"""Softmax over a sample of the catalogue, for catalogues past a full softmax. In nats.

T = targets, S = shared negatives, D = embed dim, C = targets in a chunk.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrec.core.placement import num_shards

# Logits of one chunk on one device; past it the targets go through in chunks that are computed twice.
CHUNK_LOGITS = 1 << 24
MASKED = -1e9  # finite, so that a target without a single negative has a loss and a gradient of 0, not NaN


def sampled_softmax(
    queries: Float[Array, "T D"],
    target_ids: Int[Array, "T"],
    target_vectors: Float[Array, "T D"],
    weights: Float[Array, "T"],
    negative_ids: Int[Array, "S"],
    negative_vectors: Float[Array, "S D"],
    negative_log_q: Float[Array, "S"],
    *,
    target_bias: Float[Array, "T"] | None = None,
    negative_bias: Float[Array, "S"] | None = None,
    negative_mask: Bool[Array, "S"] | None = None,
    target_log_q: Float[Array, "T"] | None = None,
    num_draws: Float[Array, ""] | float | None = None,
    chunk_logits: int = CHUNK_LOGITS,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sum of `-log(e^target / (e^target + sum of e^negative / (draws q)))`, and the sum of weights.

    The denominator estimates the full softmax's without bias when the negatives are independent draws from q:
    a negative that is drawn `draws q` times on average counts for one. A draw of the target itself (an
    accidental hit) is left out, since the target is already there.

    Args:
      weights: 0 leaves a target out.
      negative_log_q: log of the probability that one draw gives this negative.
      target_bias, negative_bias: added to the logits.
      negative_mask: True = a real draw; None = all are.
      target_log_q: corrects the target's logit like a negative's (Yi et al., RecSys 2019). None keeps it as it
        is, which is what makes the estimate unbiased.
      num_draws: real draws; None = counted from `negative_mask`.

    Source: Bengio and Senecal, AISTATS 2003 (importance sampling of the denominator); Jean et al., ACL 2015
    (negatives shared by all targets).
    """
    if negative_mask is None:
        negative_mask = jnp.ones(negative_ids.shape, bool)
    if num_draws is None:
        num_draws = jnp.sum(negative_mask.astype(jnp.float32))
    log_draws = jnp.log(jnp.maximum(jnp.asarray(num_draws, jnp.float32), 1.0))
    offset = -negative_log_q.astype(jnp.float32) - log_draws
    if negative_bias is not None:
        offset = offset + negative_bias.astype(jnp.float32)
    target_logits = jnp.sum(queries.astype(jnp.float32) * target_vectors.astype(jnp.float32), axis=-1)
    if target_bias is not None:
        target_logits = target_logits + target_bias.astype(jnp.float32)
    if target_log_q is not None:
        target_logits = target_logits - target_log_q.astype(jnp.float32) - log_draws

    def chunk_loss(part: tuple[jax.Array, ...]) -> jax.Array:
        query, ids, target_logit, weight = part
        logits = jnp.einsum("cd,sd->cs", query, negative_vectors, preferred_element_type=jnp.float32) + offset
        hit = ids[:, None] == negative_ids[None, :]
        rest = jax.nn.logsumexp(jnp.where(hit | ~negative_mask[None, :], MASKED, logits), axis=-1)
        return jnp.sum(jnp.where(weight > 0, weight * jax.nn.softplus(rest - target_logit), 0.0))

    weights = weights.astype(jnp.float32)
    parts = (queries, target_ids, target_logits, weights)
    num_chunks = max(1, math.ceil(len(target_ids) * len(negative_ids) / (chunk_logits * num_shards())))
    return _sum_over_chunks(chunk_loss, parts, min(num_chunks, len(target_ids))), jnp.sum(weights)


def _sum_over_chunks(loss, parts: tuple[jax.Array, ...], num_chunks: int) -> jax.Array:  # type: ignore[no-untyped-def]
    """Sums `loss` over `num_chunks` parts of the targets; each is computed again in the backward pass.

    A chunk takes every `num_chunks`-th target, so that where targets are split over devices, each device has
    its share of each chunk. The last places are filled up with weight 0.
    """
    if num_chunks == 1:
        return loss(parts)

    def fold(x: jax.Array) -> jax.Array:
        missing = -len(x) % num_chunks
        x = jnp.pad(x, ((0, missing), *((0, 0) for _ in x.shape[1:])))
        return jnp.swapaxes(x.reshape(-1, num_chunks, *x.shape[1:]), 0, 1)

    def add(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + jax.checkpoint(loss)(part), None

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), tuple(fold(part) for part in parts))[0]
