"""How far a student's beliefs over a whole catalogue are from a teacher's, the rows over every device.

As in `losses.softmax` no `[tokens, items]` array exists: tokens go through in chunks, every device scores its own rows
by both models, and only maxima and sums cross the network. The gradient is formed in the same pass, since the
normalisers are known before it: it is the difference of the two distributions.

T = tokens, R = physical rows, N = items and padding, D = embed dim, E = the teacher's.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxrec.core.partition import spec
from jaxrec.core.placement import all_gather, num_shards, own_ids, psum_scatter
from jaxrec.losses.sharded_rows import (
    CHUNK_LOGITS,
    chunks,
    masked,
    max_of_all,
    scaled,
    sum_of_all,
)

Taught = tuple[Float[Array, "T E"], Float[Array, "N E"], Float[Array, " N"]]


def full_divergence(
    queries: Float[Array, "T D"],
    weights: Float[Array, "T"],
    vectors: Float[Array, "R D"],
    bias: Float[Array, "R"],
    taught: Taught,
    *,
    num_rows: int,
    chunk_logits: int = CHUNK_LOGITS,
) -> Float[Array, ""]:
    """Weighted sum of `KL(softmax(teacher's scores) || softmax(queries . vectors + bias))` over all rows but padding.

    Args:
      queries: split over the devices by tokens.
      weights: 0 leaves a token out. Not differentiated.
      vectors, bias: item vectors in physical row order (see `embedding.table`).
      taught: the teacher's queries, split as the others; its vectors and biases by id, whole on every device. Not
        differentiated.
      num_rows: logical rows, row 0 (padding) included.
      chunk_logits: bound on the scores of a chunk by one model on one device, where its rows are no more than that.

    Returns:
      The sum in nats, float32; divide by the sum of weights of the whole batch.
    """
    return _full_divergence(queries, weights, vectors, bias, taught, num_rows, chunk_logits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _full_divergence(*arguments):  # type: ignore[no-untyped-def]
    return _forward_rule(*arguments)[0]


def _forward_rule(queries, weights, vectors, bias, taught, num_rows, chunk_logits):  # type: ignore[no-untyped-def]
    batch, row = spec("batch"), spec("row")
    loss, gradients = jax.shard_map(
        functools.partial(_own_rows, num_rows=num_rows, chunk_logits=chunk_logits),
        in_specs=((batch,) * 3, row, row, P(), P()),
        out_specs=(P(), (batch, row, row)),
        check_vma=False,
    )((queries, weights.astype(jnp.float32), taught[0]), vectors, bias, *taught[1:])
    return loss, jax.tree.map(lambda d, x: d.astype(x.dtype), gradients, (queries, vectors, bias))


def _backward_rule(num_rows, chunk_logits, gradients, cotangent):  # type: ignore[no-untyped-def]
    d_queries, d_vectors, d_bias = scaled(gradients, cotangent)
    return d_queries, None, d_vectors, d_bias, None


_full_divergence.defvjp(_forward_rule, _backward_rule)


def _own_rows(tokens, vectors, bias, taught_vectors, taught_bias, *, num_rows, chunk_logits):  # type: ignore[no-untyped-def]
    """One device's part."""
    rows, dim = vectors.shape
    ids = own_ids(jnp.arange(rows, dtype=jnp.int32))
    valid = (ids > 0) & (ids < num_rows)
    sides = []
    for side, offsets in ((vectors, bias), (taught_vectors[ids * valid], taught_bias[ids * valid])):
        sides.append((side.astype(jnp.float32), jnp.where(valid, offsets.astype(jnp.float32), -jnp.inf)))

    def chunk(carry, part):  # type: ignore[no-untyped-def]
        total, d_vectors, d_bias = carry
        query, weight, taught_query = (all_gather(x) for x in part)
        own, theirs = (
            _log_softmax(asked.astype(jnp.float32) @ side.T + offsets)
            for asked, (side, offsets) in zip((query, taught_query), sides, strict=True)
        )
        belief = jnp.exp(theirs)
        loss = sum_of_all(jnp.sum(jnp.where(valid, belief * (theirs - own), 0.0), -1))
        total += jnp.sum(masked(weight, loss))
        share = (jnp.exp(own) - belief) * weight[:, None]
        d_vectors += share.T @ query.astype(jnp.float32)
        return (total, d_vectors, d_bias + jnp.sum(share, 0)), psum_scatter(share @ sides[0][0])

    parts, cut_off = chunks(tokens, chunk_logits // rows // num_shards())
    start = (jnp.float32(0), jnp.zeros((rows, dim)), jnp.zeros(rows))
    (total, d_vectors, d_bias), d_query = jax.lax.scan(chunk, start, parts)
    return total, (cut_off(d_query), d_vectors, d_bias)


def _log_softmax(logits: jax.Array) -> jax.Array:
    """Over the rows of all devices; minus infinity where the logits are."""
    peak = max_of_all(jnp.max(logits, -1))
    normaliser = sum_of_all(jnp.sum(jnp.exp(logits - peak[:, None]), -1))
    return logits - (peak + jnp.log(normaliser))[:, None]
