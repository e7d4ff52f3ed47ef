"""Full softmax over a catalogue whose rows lie over every device (vocabulary-parallel).

No `[tokens, items]` array exists: tokens go through in chunks, every device scores its own rows of the chunk, and
only the chunk's maxima, sums and target logits cross the network. The gradient is formed in the forward pass,
chunk by chunk, because the only thing that it still lacks there is the scalar cotangent.

A device whose rows fit a chunk's logits sees each logit once (`_whole_rows`): the gradient is summed before the
normaliser is known and divided after, which saves the second computation of the logits, a quarter of the matrix
work. With more rows the items go through in tiles as well (`_tiled_rows`), twice: once for the normaliser, once for
the gradient, which is written into one buffer. The peak is a tile and that buffer.

T = tokens, R = physical rows, D = embed dim, N = shards, I = items of a tile.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxrec.core.mesh import ALL_AXES
from jaxrec.core.partition import spec
from jaxrec.core.placement import all_gather, local_index, num_shards, own_ids, psum_scatter

# Logits of one chunk on one device: 1.5 M floats = 6 MB, what stays near a core's cache.
CHUNK_LOGITS = 1_500_000
# A chunk of fewer tokens than this would read all rows for too little work: items are tiled instead.
MIN_CHUNK_TOKENS = 128
LOWEST = float(np.finfo(np.float32).min) / 2


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
    rows_per_shard = vectors.shape[0] // num_shards()
    enough = min(MIN_CHUNK_TOKENS, queries.shape[0])
    local = functools.partial(
        _whole_rows if chunk_logits >= enough * rows_per_shard else _tiled_rows,
        num_rows=num_rows,
        chunk_logits=chunk_logits,
        with_gradient=with_gradient,
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


def _whole_rows(queries, target_ids, weights, vectors, bias, *, num_rows, chunk_logits, with_gradient):  # type: ignore[no-untyped-def]
    """One device's part. A column of ones beside the vectors makes the GEMMs deliver the sums as well."""
    rows, dim = vectors.shape
    vectors = vectors.astype(jnp.float32)
    ids = own_ids(jnp.arange(rows, dtype=jnp.int32))
    valid_bias = jnp.where((ids > 0) & (ids < num_rows), bias.astype(jnp.float32), -jnp.inf)
    with_ones = jnp.concatenate([vectors, jnp.ones((rows, 1), jnp.float32)], 1)

    def chunk(carry, part):  # type: ignore[no-untyped-def]
        d_with_ones, total = carry
        q, target, weight = part
        q, target, weight = (all_gather(x) for x in (q.astype(jnp.float32), target, weight))
        logits = q @ vectors.T + valid_bias
        peak = _max(jnp.max(logits, -1))
        unnormalised = jnp.exp(logits - peak[:, None])
        index, mine = _own_targets(target, rows)
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

    parts, num_tokens = _chunks((queries, target_ids, weights), chunk_logits // rows)
    start = (jnp.zeros((rows, dim + 1) if with_gradient else (0,), jnp.float32), jnp.float32(0))
    (d_with_ones, total), d_queries = jax.lax.scan(chunk, start, parts)
    if not with_gradient:
        return total, ()
    return total, (d_queries.reshape(-1, dim)[:num_tokens], d_with_ones[:, :dim], d_with_ones[:, dim])


def _tiled_rows(queries, target_ids, weights, vectors, bias, *, num_rows, chunk_logits, with_gradient):  # type: ignore[no-untyped-def]
    """One device's part where its rows are many: a tile is about square in tokens and items."""
    rows, dim = vectors.shape
    side = max(1, math.isqrt(chunk_logits))
    items = min(rows, side)
    num_tiles = -(-rows // items)

    def tile(index):  # type: ignore[no-untyped-def]
        """Rows, biases and first row of a tile; the last tile reaches back, its repeated rows are masked."""
        start = jnp.minimum(index * items, rows - items)
        row = start + jnp.arange(items, dtype=jnp.int32)
        ids = own_ids(row)
        valid = (row >= index * items) & (ids > 0) & (ids < num_rows)
        part = jax.lax.dynamic_slice_in_dim(bias, start, items).astype(jnp.float32)
        vector = jax.lax.dynamic_slice_in_dim(vectors, start, items).astype(jnp.float32)
        return vector, jnp.where(valid, part, -jnp.inf), start

    def chunk(carry, part):  # type: ignore[no-untyped-def]
        (d_vectors, d_bias), total = carry
        q, target, weight = (all_gather(x) for x in part)
        q = q.astype(jnp.float32)

        def scan_sums(index, sums):  # type: ignore[no-untyped-def]
            peak, normaliser = sums
            vector, valid_bias, _ = tile(index)
            logits = q @ vector.T + valid_bias
            # Finite even where every item so far is masked: exp(-inf - peak) must be 0, not NaN.
            new_peak = jnp.maximum(peak, jnp.maximum(jnp.max(logits, -1), LOWEST))
            scaled = normaliser * jnp.exp(peak - new_peak)
            return new_peak, scaled + jnp.sum(jnp.exp(logits - new_peak[:, None]), -1)

        start = (jnp.full(q.shape[0], LOWEST, jnp.float32), jnp.zeros(q.shape[0], jnp.float32))
        own_peak, own_sum = jax.lax.fori_loop(0, num_tiles, scan_sums, start)
        peak = _max(own_peak)
        log_z = jnp.log(_sum(own_sum * jnp.exp(own_peak - peak))) + peak
        index, mine = _own_targets(target, rows)
        target_vectors = vectors[index].astype(jnp.float32)
        target_logit = _sum(jnp.where(mine, jnp.sum(q * target_vectors, -1) + bias[index], 0.0))
        total += jnp.sum(_masked(weight, log_z - target_logit))
        if not with_gradient:
            return ((d_vectors, d_bias), total), ()

        def gradient(index, sums):  # type: ignore[no-untyped-def]
            d_vectors, d_bias, d_query = sums
            vector, valid_bias, start = tile(index)
            share = jnp.exp(q @ vector.T + valid_bias - log_z[:, None]) * weight[:, None]
            d_vectors = _add_slice(d_vectors, share.T @ q, start)
            return d_vectors, _add_slice(d_bias, jnp.sum(share, 0), start), d_query + share @ vector

        own = (weight * mine)[:, None]
        sums = (d_vectors, d_bias, -own * target_vectors)
        d_vectors, d_bias, d_query = jax.lax.fori_loop(0, num_tiles, gradient, sums)
        d_vectors = d_vectors.at[index].add(-own * q)
        d_bias = d_bias.at[index].add(-own[:, 0])
        return ((d_vectors, d_bias), total), psum_scatter(d_query)

    parts, num_tokens = _chunks((queries, target_ids, weights), side)
    empty = (jnp.zeros((rows, dim) if with_gradient else (0,)), jnp.zeros(rows if with_gradient else 0))
    ((d_vectors, d_bias), total), d_queries = jax.lax.scan(chunk, (empty, jnp.float32(0)), parts)
    if not with_gradient:
        return total, ()
    return total, (d_queries.reshape(-1, dim)[:num_tokens], d_vectors, d_bias)


def _own_targets(target_ids: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Local rows of the targets that this device owns (0 for the others), and which those are."""
    index = local_index(target_ids, rows)
    return jnp.where(index < rows, index, 0), index < rows


def _add_slice(array, part, start):  # type: ignore[no-untyped-def]
    old = jax.lax.dynamic_slice_in_dim(array, start, part.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(array, old + part, start, 0)


def _chunks(arrays, chunk_tokens):  # type: ignore[no-untyped-def]
    """Cuts the local tokens into equal chunks of at most `chunk_tokens` over all devices, padded with weight 0."""
    num_tokens = arrays[0].shape[0]
    size = max(1, min(num_tokens, chunk_tokens // num_shards()))
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
