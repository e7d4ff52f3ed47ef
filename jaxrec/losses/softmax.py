"""Full softmax over a catalogue whose rows lie over every device (vocabulary-parallel).

No `[tokens, items]` array exists: tokens go through in chunks, every device scores its own rows of the chunk, and
only the chunk's maxima, sums and target logits cross the network. The gradient is formed in the forward pass,
chunk by chunk, because the only thing that it still lacks there is the scalar cotangent; this saves the second
computation of the logits, a quarter of the matrix work.

T = tokens, R = physical rows, D = embed dim, N = shards.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxrec.core.mesh import ALL_AXES
from jaxrec.core.partition import spec
from jaxrec.core.placement import all_gather, local_index, logical_ids, num_shards, psum_scatter

# Logits of one chunk on one device: 1.5 M floats = 6 MB, what stays near a core's cache.
CHUNK_LOGITS = 1_500_000


def full_softmax(
    queries: Float[Array, "T D"],
    target_ids: Int[Array, "T"],
    weights: Float[Array, "T"],
    vectors: Float[Array, "R D"],
    bias: Float[Array, "R"],
    *,
    num_rows: int,
    chunk_logits: int = CHUNK_LOGITS,
) -> Float[Array, ""]:
    """Weighted sum of `-log softmax(queries . vectors + bias)[target]` over all rows but padding.

    Args:
      queries: split over the devices by tokens.
      weights: 0 leaves a token out. Not differentiated.
      vectors, bias: item vectors in physical row order (see `embedding.table`).
      num_rows: logical rows, row 0 (padding) included.
      chunk_logits: bound on the logits of a chunk on one device.

    Returns:
      The sum in nats, float32; divide by the sum of weights of the whole batch.
    """
    return _full_softmax(queries, target_ids, weights, vectors, bias, num_rows, chunk_logits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _full_softmax(queries, target_ids, weights, vectors, bias, num_rows, chunk_logits):  # type: ignore[no-untyped-def]
    loss, _ = _forward(
        queries, target_ids, weights, vectors, bias, num_rows, chunk_logits, with_gradient=False
    )
    return loss


def _forward_rule(queries, target_ids, weights, vectors, bias, num_rows, chunk_logits):  # type: ignore[no-untyped-def]
    return _forward(queries, target_ids, weights, vectors, bias, num_rows, chunk_logits, with_gradient=True)


def _backward_rule(num_rows, chunk_logits, gradients, cotangent):  # type: ignore[no-untyped-def]
    d_queries, d_vectors, d_bias = gradients
    return d_queries * cotangent, None, None, d_vectors * cotangent, d_bias * cotangent


_full_softmax.defvjp(_forward_rule, _backward_rule)


def _forward(  # type: ignore[no-untyped-def]
    queries, target_ids, weights, vectors, bias, num_rows, chunk_logits, *, with_gradient
):
    local = functools.partial(
        _local_forward, num_rows=num_rows, chunk_logits=chunk_logits, with_gradient=with_gradient
    )
    batch, row = spec("batch"), spec("row")
    loss, gradients = jax.shard_map(
        local,
        in_specs=(batch, batch, batch, row, row),
        out_specs=(P(), (batch, row, row) if with_gradient else ()),
        check_vma=False,
    )(queries, target_ids, weights.astype(jnp.float32), vectors, bias)
    if with_gradient:
        d_queries, d_vectors, d_bias = gradients
        gradients = (
            d_queries.astype(queries.dtype),
            d_vectors.astype(vectors.dtype),
            d_bias.astype(bias.dtype),
        )
    return loss, gradients


def _local_forward(queries, target_ids, weights, vectors, bias, *, num_rows, chunk_logits, with_gradient):  # type: ignore[no-untyped-def]
    """One device's part. A column of ones beside the vectors makes the GEMMs deliver the sums as well."""
    rows, dim = vectors.shape
    vectors = vectors.astype(jnp.float32)
    ids = logical_ids(jax.lax.axis_index(ALL_AXES), num_shards(), rows)
    valid_bias = jnp.where((ids > 0) & (ids < num_rows), bias.astype(jnp.float32), -jnp.inf)
    with_ones = jnp.concatenate([vectors, jnp.ones((rows, 1), jnp.float32)], 1)

    def chunk(carry, part):  # type: ignore[no-untyped-def]
        d_with_ones, total = carry
        q, target, weight = part
        q, target, weight = (all_gather(x) for x in (q.astype(jnp.float32), target, weight))
        logits = q @ vectors.T + valid_bias
        peak = _max(jnp.max(logits, -1))
        unnormalised = jnp.exp(logits - peak[:, None])
        index = local_index(target, rows)
        mine = index < rows
        index = jnp.where(mine, index, 0)
        target_logit = _sum(jnp.where(mine, jnp.take_along_axis(logits, index[:, None], 1)[:, 0], 0.0))
        if not with_gradient:
            log_z = jnp.log(_sum(jnp.sum(unnormalised, -1))) + peak
            return (d_with_ones, total + jnp.sum(_masked(weight, log_z - target_logit))), ()
        weighted = unnormalised @ with_ones
        normaliser = _sum(weighted[:, dim])
        total += jnp.sum(_masked(weight, jnp.log(normaliser) + peak - target_logit))
        scale = (weight / normaliser)[:, None]
        own = (weight * mine)[:, None]
        d_query = weighted[:, :dim] * scale - own * vectors[index]
        d_with_ones += jax.lax.dot_general(
            unnormalised, jnp.concatenate([q * scale, scale], 1), (((0,), (0,)), ((), ()))
        )
        d_with_ones = d_with_ones.at[index].add(-own * jnp.concatenate([q, jnp.ones_like(scale)], 1))
        return (d_with_ones, total), psum_scatter(d_query)

    parts, num_tokens = _chunks((queries, target_ids, weights), rows, chunk_logits)
    start = (jnp.zeros((rows, dim + 1) if with_gradient else (0,), jnp.float32), jnp.float32(0))
    (d_with_ones, total), d_queries = jax.lax.scan(chunk, start, parts)
    if not with_gradient:
        return total, ()
    return total, (d_queries.reshape(-1, dim)[:num_tokens], d_with_ones[:, :dim], d_with_ones[:, dim])


def _chunks(arrays, rows, chunk_logits):  # type: ignore[no-untyped-def]
    """Cuts the local tokens into equal chunks, padded with weight 0."""
    num_tokens = arrays[0].shape[0]
    size = max(1, min(num_tokens, chunk_logits // (rows * num_shards())))
    num_chunks = max(1, -(-num_tokens // size))
    size = -(-num_tokens // num_chunks)
    pad = num_chunks * size - num_tokens
    cut = lambda x: jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)).reshape(num_chunks, size, *x.shape[1:])  # noqa: E731
    return jax.tree.map(cut, arrays), num_tokens


def _masked(weight: jax.Array, value: jax.Array) -> jax.Array:
    # A token of weight 0 may have an infinite loss (its target is padding): 0 * inf would be NaN.
    return jnp.where(weight > 0, weight * value, 0.0)


def _sum(x: jax.Array) -> jax.Array:
    return jax.lax.psum(x, ALL_AXES)


def _max(x: jax.Array) -> jax.Array:
    return jax.lax.pmax(x, ALL_AXES)
