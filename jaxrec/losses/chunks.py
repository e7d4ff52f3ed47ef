"""Losses over many targets and shared negatives, in chunks that stay on the targets' own devices.

T = targets, S = shared negatives, D = embed dim, C = targets in a chunk.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxrec.core.mixture_score import MixtureScore
from jaxrec.core.partition import spec
from jaxrec.core.placement import num_shards

Arrays = tuple[jax.Array, ...]
# Logits of one chunk on one device.
CHUNK_LOGITS = 1 << 24


def pair_logits(
    queries: Float[Array, "T D"],
    vectors: Float[Array, "T D"],
    bias: Float[Array, "T"] | None,
    score: MixtureScore | None = None,
) -> Float[Array, "T"]:
    """Each query's logit of its own target, in float32."""
    queries, vectors = queries.astype(jnp.float32), vectors.astype(jnp.float32)
    logits = jnp.sum(queries * vectors, axis=-1) if score is None else score.pairs(queries, vectors)
    return logits if bias is None else logits + bias.astype(jnp.float32)


def sum_against_negatives(
    loss: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    queries: Float[Array, "T D"],
    target_ids: Int[Array, "T"],
    target_logits: Float[Array, "T"],
    weights: Float[Array, "T"],
    negative_ids: Int[Array, "S"],
    negative_vectors: Float[Array, "S D"],
    negative_offset: Float[Array, "S"],
    *,
    negative_mask: Bool[Array, "S"],
    own_ids: Int[Array, "T *e"] | None = None,
    score: MixtureScore | None = None,
    chunk_logits: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sum of each target's `loss` against shared negatives, and the sum of weights.

    Args:
      loss: of target logits `[C]`, negatives' logits `[C, S]`, and which of these count (a draw of the target itself
        does not); gives `[C]`.
      weights: 0 leaves a target out.
      negative_offset: added to the logits.
      negative_mask: True = counts.
      own_ids: further ids, one or E of each target, that are no negatives for it.
      score: of a query and a negative; None = their product.
    """

    def chunk_loss(part: Arrays, shared: Arrays) -> jax.Array:
        query, ids, target_logit, weight, *own = part
        candidate_ids, vectors, offset, mask = shared
        # Its gradient is summed over the chunks: in float32, whatever the operands of the product are.
        vectors = vectors.astype(negative_vectors.dtype)
        if score is None:
            logits = jnp.einsum("cd,sd->cs", query, vectors, preferred_element_type=jnp.float32) + offset
        else:
            logits = score.all_pairs(query, vectors) + offset
        counts = mask[None, :]
        for excluded in (ids, *own):
            same = excluded.reshape(len(ids), -1, 1) == candidate_ids
            counts = counts & ~jnp.any(same, axis=1)
        return jnp.sum(jnp.where(weight > 0, weight * loss(target_logit, logits, counts), 0.0))

    weights = weights.astype(jnp.float32)
    targets = (queries, target_ids, target_logits, weights, *(() if own_ids is None else (own_ids,)))
    negatives = (negative_ids, negative_vectors.astype(jnp.float32), negative_offset, negative_mask)
    products = 1 if score is None else score.num_vectors**2
    chunk = max(1, chunk_logits // (products * len(negative_ids)))
    total = _sum_over_targets(chunk_loss, targets, negatives, chunk)
    return total, jnp.sum(weights)


def _sum_over_targets(
    loss: Callable[[Arrays, Arrays], jax.Array],
    targets: Arrays,
    negatives: Arrays,
    chunk_targets: int,
) -> jax.Array:
    """Sums `loss(targets, negatives)` over the targets, each device over its own, a chunk at a time.

    Left to the compiler's partitioning, the chunks of targets that lie over many devices are gathered whole on each.
    More than `chunk_targets` on a device go through in chunks, each computed again in the backward pass.
    """
    if num_shards() == 1:
        return _sum_over_chunks(loss, targets, negatives, chunk_targets)
    batch = spec("batch")
    local_sums = jax.shard_map(
        lambda own, shared: _sum_over_chunks(loss, own, shared, chunk_targets)[None],
        in_specs=(batch, PartitionSpec()),
        out_specs=batch,
        check_vma=False,
    )(_padded(targets, num_shards()), negatives)
    return jnp.sum(local_sums)


def _sum_over_chunks(
    loss: Callable[[Arrays, Arrays], jax.Array],
    targets: Arrays,
    negatives: Arrays,
    chunk_targets: int,
) -> jax.Array:
    num_chunks = -(-len(targets[0]) // chunk_targets)
    if num_chunks <= 1:
        return loss(targets, negatives)
    parts = tuple(x.reshape(num_chunks, -1, *x.shape[1:]) for x in _padded(targets, num_chunks))

    def add(total: jax.Array, part: Arrays) -> tuple[jax.Array, None]:
        return total + jax.checkpoint(loss)(part, negatives), None

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), parts)[0]


def _padded(targets: Arrays, multiple: int) -> Arrays:
    """Fills the targets up to a multiple of a number, with weight 0."""
    missing = -len(targets[0]) % multiple
    return tuple(jnp.pad(x, ((0, missing), *((0, 0) for _ in x.shape[1:]))) for x in targets)
