"""Softmax over the other targets of the batch: negatives that cost no look-up. In nats.

T = targets, D = embed dim, N = items.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrec.core.mixture_score import MixtureScore
from jaxrec.losses.chunks import CHUNK_LOGITS
from jaxrec.losses.sampled import sampled_softmax


def in_batch_softmax(
    queries: Float[Array, "T D"],
    target_ids: Int[Array, "T"],
    target_vectors: Float[Array, "T D"],
    weights: Float[Array, "T"],
    target_log_q: Float[Array, "T"],
    *,
    target_bias: Float[Array, "T"] | None = None,
    own_ids: Int[Array, "T *e"] | None = None,
    score: MixtureScore | None = None,
    chunk_logits: int = CHUNK_LOGITS,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Each target against all other targets of the global batch; weighted sum in nats, and the sum of weights.

    A target elsewhere in the batch with the same item is no negative (a false negative) and is masked. What is
    left are draws from the popularity of the items, which logQ corrects, so that popular items are not pushed
    down for being frequent.

    Args:
      weights: 0 = padding, neither target nor negative.
      target_log_q: log of each item's share of the training events (`item_log_q`).
      target_bias: added to the logits of the item, as target and as negative.
      own_ids: further items, one or E of each query, that are no negatives for it either.

    Source: Yi et al., RecSys 2019 (logQ correction of in-batch negatives). Deviation: the target's own logit is
    not corrected, because it is not there by sampling; the denominator then estimates the full softmax's.
    """
    real = weights > 0
    others = jnp.sum(real.astype(jnp.float32)) - 1.0
    return sampled_softmax(
        queries,
        target_ids,
        target_vectors,
        weights,
        target_ids,
        target_vectors,
        target_log_q,
        target_bias=target_bias,
        negative_bias=target_bias,
        negative_mask=real,
        num_draws=others,
        own_ids=own_ids,
        score=score,
        chunk_logits=chunk_logits,
    )


def item_log_q(item_counts: Float[np.ndarray, "N"] | Int[np.ndarray, "N"] | None) -> Float[np.ndarray, "N"]:
    """Log of each item's share of the training events; index = item id, index 0 = padding.

    Items that were never seen count as one event: such a target may still turn up where the counts are of
    another split, and log 0 would drown the batch.

    Raises:
      ValueError: no counts, or a negative one.
    """
    if item_counts is None:
        raise ValueError(
            "in-batch negatives are corrected by the items' counts, which need data; use SampledSoftmax."
        )
    counts = np.asarray(item_counts, np.float64)
    if np.any(counts < 0):
        raise ValueError(f"item_counts[{int(np.argmin(counts))}]={counts.min():g} must not be negative.")
    counts = np.maximum(counts, 1.0)
    return np.log(counts / counts[1:].sum()).astype(np.float32)
