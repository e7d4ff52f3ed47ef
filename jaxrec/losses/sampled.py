"""Softmax over a sample of the catalogue, for catalogues past a full softmax. In nats.

T = targets, S = shared negatives, D = embed dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrec.core.mixture_score import MixtureScore
from jaxrec.losses.chunks import CHUNK_LOGITS, pair_logits, sum_against_negatives

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
    own_ids: Int[Array, "T *e"] | None = None,
    score: MixtureScore | None = None,
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
      own_ids: further ids, one or E of each target, that are no negatives for it.

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
    target_logits = pair_logits(queries, target_vectors, target_bias, score)
    if target_log_q is not None:
        target_logits = target_logits - target_log_q.astype(jnp.float32) - log_draws

    def loss(target: jax.Array, logits: jax.Array, counts: jax.Array) -> jax.Array:
        rest = jax.nn.logsumexp(jnp.where(counts, logits, MASKED), axis=-1)
        return jax.nn.softplus(rest - target)

    return sum_against_negatives(
        loss, queries, target_ids, target_logits, weights, negative_ids, negative_vectors, offset,
        negative_mask=negative_mask, own_ids=own_ids, score=score, chunk_logits=chunk_logits,
    )  # fmt: skip
