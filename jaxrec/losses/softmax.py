"""Full softmax over a catalogue whose rows lie over every device (vocabulary-parallel).

No `[tokens, items]` array exists: tokens go through in chunks, every device scores its own rows of the chunk, and
only the chunk's maxima, sums and target logits cross the network. The gradient is formed in the forward pass,
chunk by chunk, because the only thing that it still lacks there is the scalar cotangent.

A device whose rows fit a chunk's logits sees each logit once (`_whole_rows`): the gradient is summed before the
normaliser is known and divided after, which saves the second computation of the logits, a quarter of the matrix
work. With more rows the items go through in tiles as well (`_tiled_rows`), twice: once for the normaliser, once for
the gradient, which is written into one buffer. The peak is a tile and that buffer.

T = tokens, R = physical rows, D = embed dim, N = shards, I = items of a tile, M = items with logits of their own.
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
from jaxrec.core.sparse_logits import SparseLogits

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
    extra: SparseLogits | None = None,
    chunk_logits: int = CHUNK_LOGITS,
) -> Float[Array, ""]:
    """Weighted sum of `-log softmax(queries . vectors + bias + extra)[target]` over all rows but padding.

    Args:
      queries: split over the devices by tokens.
      weights: 0 leaves a token out. Not differentiated.
      vectors, bias: item vectors in physical row order (see `embedding.table`).
      num_rows: logical rows, row 0 (padding) included.
      extra: logits of a few items of each token, `[T, M]`; differentiated.
      chunk_logits: bound on the logits of a chunk on one device.

    Returns:
      The sum in nats, float32; divide by the sum of weights of the whole batch.
    """
    if extra is None:
        none = (len(target_ids), 0)
        extra = SparseLogits(jnp.zeros(none, jnp.int32), jnp.zeros(none, jnp.float32))
    arrays = (queries, target_ids, weights, vectors, bias, extra.item_ids, extra.values)
    return _full_softmax(*arrays, num_rows, chunk_logits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _full_softmax(*arguments):  # type: ignore[no-untyped-def]
    loss, _ = _forward(*arguments, with_gradient=False)
    return loss


def _forward_rule(*arguments):  # type: ignore[no-untyped-def]
    return _forward(*arguments, with_gradient=True)


def _backward_rule(num_rows, chunk_logits, gradients, cotangent):  # type: ignore[no-untyped-def]
    d_queries, d_vectors, d_bias, d_extra = (gradient * cotangent for gradient in gradients)
    return d_queries, None, None, d_vectors, d_bias, None, d_extra


_full_softmax.defvjp(_forward_rule, _backward_rule)


def _forward(  # type: ignore[no-untyped-def]
    queries, target_ids, weights, vectors, bias, extra_ids, extra, num_rows, chunk_logits, *, with_gradient
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
        in_specs=((batch,) * 5, row, row),
        out_specs=(P(), (batch, row, row, batch) if with_gradient else ()),
        check_vma=False,
    )((queries, target_ids, weights.astype(jnp.float32), extra_ids, extra), vectors, bias)
    if with_gradient:
        wanted = (queries, vectors, bias, extra)
        gradients = tuple(x.astype(like.dtype) for x, like in zip(gradients, wanted, strict=True))
    return loss, gradients


def _whole_rows(tokens, vectors, bias, *, num_rows, chunk_logits, with_gradient):  # type: ignore[no-untyped-def]
    """One device's part. A column of ones beside the vectors makes the GEMMs deliver the sums as well."""
    rows, dim = vectors.shape
    vectors = vectors.astype(jnp.float32)
    ids = own_ids(jnp.arange(rows, dtype=jnp.int32))
    valid_bias = jnp.where((ids > 0) & (ids < num_rows), bias.astype(jnp.float32), -jnp.inf)
    with_ones = jnp.concatenate([vectors, jnp.ones((rows, 1), jnp.float32)], 1)

    def chunk(carry, part):  # type: ignore[no-untyped-def]
        d_with_ones, total = carry
        q, target, weight, extra_ids, extra = part
        q, target, weight, extra_ids, extra = (
            all_gather(x) for x in (q.astype(jnp.float32), target, weight, extra_ids, extra)
        )
        places = _places(extra_ids, rows)
        logits = _add_extra(q @ vectors.T + valid_bias, places, extra)
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
        d_extra = _at_places(unnormalised, places) * scale - own * _is_target(places, index)
        return (d_with_ones, total), (psum_scatter(d_query), psum_scatter(d_extra))

    parts, num_tokens = _chunks(tokens, chunk_logits // rows)
    start = (jnp.zeros((rows, dim + 1) if with_gradient else (0,), jnp.float32), jnp.float32(0))
    (d_with_ones, total), of_tokens = jax.lax.scan(chunk, start, parts)
    if not with_gradient:
        return total, ()
    d_queries, d_extra = (jax.lax.collapse(x, 0, 2)[:num_tokens] for x in of_tokens)
    return total, (d_queries, d_with_ones[:, :dim], d_with_ones[:, dim], d_extra)


def _tiled_rows(tokens, vectors, bias, *, num_rows, chunk_logits, with_gradient):  # type: ignore[no-untyped-def]
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
        q, target, weight, extra_ids, extra = (all_gather(x) for x in part)
        q = q.astype(jnp.float32)
        places = _places(extra_ids, rows)

        def scan_sums(index, sums):  # type: ignore[no-untyped-def]
            peak, normaliser = sums
            vector, valid_bias, start = tile(index)
            logits = _add_extra(q @ vector.T + valid_bias, places - start, extra)
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
        is_target = _is_target(places, index)
        added = jnp.sum(extra * is_target, -1)
        target_logit = _sum(jnp.where(mine, jnp.sum(q * target_vectors, -1) + bias[index] + added, 0.0))
        total += jnp.sum(_masked(weight, log_z - target_logit))
        if not with_gradient:
            return ((d_vectors, d_bias), total), ()

        def gradient(index, sums):  # type: ignore[no-untyped-def]
            d_vectors, d_bias, d_query, d_extra = sums
            vector, valid_bias, start = tile(index)
            logits = _add_extra(q @ vector.T + valid_bias, places - start, extra)
            share = jnp.exp(logits - log_z[:, None]) * weight[:, None]
            d_vectors = _add_slice(d_vectors, share.T @ q, start)
            d_bias = _add_slice(d_bias, jnp.sum(share, 0), start)
            return d_vectors, d_bias, d_query + share @ vector, d_extra + _at_places(share, places - start)

        own = (weight * mine)[:, None]
        sums = (d_vectors, d_bias, -own * target_vectors, -own * is_target)
        d_vectors, d_bias, d_query, d_extra = jax.lax.fori_loop(0, num_tiles, gradient, sums)
        d_vectors = d_vectors.at[index].add(-own * q)
        d_bias = d_bias.at[index].add(-own[:, 0])
        return ((d_vectors, d_bias), total), (psum_scatter(d_query), psum_scatter(d_extra))

    parts, num_tokens = _chunks(tokens, side)
    empty = (jnp.zeros((rows, dim) if with_gradient else (0,)), jnp.zeros(rows if with_gradient else 0))
    ((d_vectors, d_bias), total), of_tokens = jax.lax.scan(chunk, (empty, jnp.float32(0)), parts)
    if not with_gradient:
        return total, ()
    d_queries, d_extra = (jax.lax.collapse(x, 0, 2)[:num_tokens] for x in of_tokens)
    return total, (d_queries, d_vectors, d_bias, d_extra)


def _own_targets(target_ids: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Local rows of the targets that this device owns (0 for the others), and which those are."""
    index = local_index(target_ids, rows)
    return jnp.where(index < rows, index, 0), index < rows


def _places(extra_ids: jax.Array, rows: int) -> jax.Array:
    """Local rows of the items with a logit of their own; below 0 = another device's, or none."""
    index = local_index(extra_ids, rows)
    return jnp.where((index < rows) & (extra_ids > 0), index, -rows - 1)


def _add_extra(logits: jax.Array, places: jax.Array, extra: jax.Array) -> jax.Array:
    """Adds to the logits of these columns; those that lie outside are other tiles'."""
    if not places.shape[1]:
        return logits
    outside = jnp.where(places < 0, logits.shape[1], places)
    return logits.at[jnp.arange(len(logits))[:, None], outside].add(extra, mode="drop")


def _at_places(values: jax.Array, places: jax.Array) -> jax.Array:
    """The values at these columns, 0 outside."""
    inside = (places >= 0) & (places < values.shape[1])
    return jnp.where(inside, jnp.take_along_axis(values, jnp.where(inside, places, 0), 1), 0.0)


def _is_target(places: jax.Array, index: jax.Array) -> jax.Array:
    return (places == index[:, None]).astype(jnp.float32)


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
