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

from jaxrec.core.partition import spec
from jaxrec.core.placement import all_gather, local_index, num_shards, own_ids, psum_scatter
from jaxrec.core.sparse_logits import MixedLogits
from jaxrec.losses.mixture import mix, places_of, unmix
from jaxrec.losses.sharded_rows import (
    CHUNK_LOGITS,
    chunks,
    masked,
    max_of_all,
    scaled,
    sum_of_all,
)
from jaxrec.losses.target_trust import TargetTrust

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
    mixed: MixedLogits | None = None,
    trust: TargetTrust = TargetTrust(),
    chunk_logits: int = CHUNK_LOGITS,
) -> Float[Array, ""]:
    """Weighted sum of `-log softmax(queries . vectors + bias + mixed)[target]` over all rows but padding.

    Args:
      queries: split over the devices by tokens.
      weights: 0 leaves a token out. Not differentiated.
      vectors, bias: item vectors in physical row order (see `embedding.table`).
      num_rows: logical rows, row 0 (padding) included.
      mixed: logits of a few items of each token, tokens in the order of its blocks; differentiated.
      trust: changes the loss where targets are not to be believed outright.
      chunk_logits: bound on the logits of a chunk on one device.

    Returns:
      The sum in nats, float32; divide by the sum of weights of the whole batch.
    """
    if mixed is None:  # blocks of one token, without lists
        num = len(target_ids)
        ids, values, mixing = ((num, 0, 0), jnp.int32), ((num, 0, 0), jnp.float32), ((num, 1, 0), jnp.float32)
        arrays = (*(jnp.zeros(*kind) for kind in (ids, values, mixing)), jnp.zeros((num, 1), jnp.float32))
    else:
        arrays = (mixed.item_ids, mixed.values, mixed.mixing, mixed.at_target)
    return _full_softmax(queries, target_ids, weights, vectors, bias, *arrays, num_rows, chunk_logits, trust)


@functools.partial(jax.custom_vjp, nondiff_argnums=(9, 10, 11))
def _full_softmax(*arguments):  # type: ignore[no-untyped-def]
    loss, _ = _forward(*arguments, with_gradient=False)
    return loss


def _forward_rule(*arguments):  # type: ignore[no-untyped-def]
    return _forward(*arguments, with_gradient=True)


def _backward_rule(num_rows, chunk_logits, trust, gradients, cotangent):  # type: ignore[no-untyped-def]
    d_queries, d_vectors, d_bias, *d_mixed = scaled(gradients, cotangent)
    return d_queries, None, None, d_vectors, d_bias, None, *d_mixed


_full_softmax.defvjp(_forward_rule, _backward_rule)


def _forward(  # type: ignore[no-untyped-def]
    queries, target_ids, weights, vectors, bias, list_ids, values, mixing, at_target, num_rows, chunk_logits,
    trust, *, with_gradient,
):  # fmt: skip
    rows_per_shard = vectors.shape[0] // num_shards()
    enough = min(MIN_CHUNK_TOKENS, queries.shape[0])
    local = functools.partial(
        _whole_rows if chunk_logits >= enough * rows_per_shard else _tiled_rows,
        num_rows=num_rows,
        chunk_logits=chunk_logits,
        trust=trust,
        with_gradient=with_gradient,
    )
    batch, row = spec("batch"), spec("row")
    # Tokens travel by blocks, which no chunk and no device may cut.
    blocks = lambda x: x.reshape(*mixing.shape[:2], *x.shape[1:])  # noqa: E731
    tokens = (blocks(queries), blocks(target_ids), blocks(weights.astype(jnp.float32)))
    loss, gradients = jax.shard_map(
        local,
        in_specs=((batch,) * 7, row, row),
        out_specs=(P(), ((batch,) * 4, row, row) if with_gradient else ()),
        check_vma=False,
    )((*tokens, list_ids, values, mixing, at_target), vectors, bias)
    if with_gradient:
        (d_queries, *d_mixed), d_vectors, d_bias = gradients
        d_queries = d_queries.reshape(queries.shape).astype(queries.dtype)
        gradients = (d_queries, d_vectors.astype(vectors.dtype), d_bias.astype(bias.dtype), *d_mixed)
    return loss, gradients


def _whole_rows(tokens, vectors, bias, *, num_rows, chunk_logits, trust, with_gradient):  # type: ignore[no-untyped-def]
    """One device's part. A column of ones beside the vectors makes the GEMMs deliver the sums as well."""
    rows, dim = vectors.shape
    vectors = vectors.astype(jnp.float32)
    ids = own_ids(jnp.arange(rows, dtype=jnp.int32))
    valid = (ids > 0) & (ids < num_rows)
    valid_bias = jnp.where(valid, bias.astype(jnp.float32), -jnp.inf)
    spread = trust.smoothing / max(1, num_rows - 1)
    with_ones = jnp.concatenate([vectors, jnp.ones((rows, 1), jnp.float32)], 1)

    def chunk(carry, part):  # type: ignore[no-untyped-def]
        d_with_ones, total = carry
        q, target, weight, at_target, places, values, mixing = _tokens_of(part, rows)
        index, mine = _own_targets(target, rows)
        logits = q @ vectors.T + valid_bias
        if places.size:
            logits, dense = mix(logits, places, values, mixing)
            logits = _add_at(logits, index, jnp.where(mine, at_target, 0.0))
        peak = max_of_all(jnp.max(logits, -1))
        unnormalised = jnp.exp(logits - peak[:, None])
        target_logit = sum_of_all(_at(logits, index, mine))
        mean_logit = sum_of_all(_row_sums(logits)) / (num_rows - 1) if spread else None
        if not with_gradient:
            log_z = jnp.log(sum_of_all(jnp.sum(unnormalised, -1))) + peak
            loss, _ = trust.of(log_z, target_logit, mean_logit)
            return (d_with_ones, total + jnp.sum(masked(weight, loss))), ()
        weighted = unnormalised @ with_ones
        normaliser = sum_of_all(weighted[:, dim])
        loss, trusted = trust.of(jnp.log(normaliser) + peak, target_logit, mean_logit)
        total += jnp.sum(masked(weight, loss))
        weight = masked(weight, trusted)
        scale = (weight / normaliser)[:, None]
        own = ((1.0 - trust.smoothing) * weight * mine)[:, None]
        d_query = weighted[:, :dim] * scale - own * vectors[index]
        d_with_ones += jax.lax.dot_general(
            unnormalised, jnp.concatenate([q * scale, scale], 1), (((0,), (0,)), ((), ()))
        )
        d_with_ones = d_with_ones.at[index].add(-own * jnp.concatenate([q, jnp.ones_like(scale)], 1))
        if spread:
            d_query -= spread * weight[:, None] * (valid @ vectors)
            d_with_ones -= spread * valid[:, None] * (weight @ jnp.concatenate([q, jnp.ones_like(scale)], 1))
        if places.size:
            d_logits = _add_at(unnormalised * scale, index, -own[:, 0]) - spread * weight[:, None] * valid
            d_mixed = *unmix(d_logits, dense, places, mixing), _at(d_logits, index, mine)
        else:
            d_mixed = jnp.zeros_like(values), jnp.zeros_like(mixing), jnp.zeros_like(at_target)
        return (d_with_ones, total), _to_devices(mixing.shape[1], d_query, *d_mixed)

    parts, cut_off = chunks(tokens, _blocks_of(tokens, chunk_logits // rows))
    start = (jnp.zeros((rows, dim + 1) if with_gradient else (0,), jnp.float32), jnp.float32(0))
    (d_with_ones, total), of_tokens = jax.lax.scan(chunk, start, parts)
    if not with_gradient:
        return total, ()
    return total, (cut_off(of_tokens), d_with_ones[:, :dim], d_with_ones[:, dim])


def _tiled_rows(tokens, vectors, bias, *, num_rows, chunk_logits, trust, with_gradient):  # type: ignore[no-untyped-def]
    """One device's part where its rows are many: a tile is about square in tokens and items."""
    rows, dim = vectors.shape
    side = max(1, math.isqrt(chunk_logits))
    items = min(rows, side)
    num_tiles = -(-rows // items)
    spread = trust.smoothing / max(1, num_rows - 1)

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
        q, target, weight, at_target, places, values, mixing = _tokens_of(part, rows)
        index, mine = _own_targets(target, rows)

        def score(number):  # type: ignore[no-untyped-def]
            """A tile's logits and lists; each token's target in it and whether it is there; its vectors and start."""
            vector, valid_bias, start = tile(number)
            here = mine & (index >= number * items) & (index < start + items)
            column = jnp.where(here, index - start, 0)
            logits, dense = q @ vector.T + valid_bias, None
            if places.size:
                logits, dense = mix(logits, places - start, values, mixing)
                logits = _add_at(logits, column, jnp.where(here, at_target, 0.0))
            return logits, dense, column, here, vector, start

        def scan_sums(number, sums):  # type: ignore[no-untyped-def]
            peak, normaliser, target_logit, mean_logit = sums
            logits, _, column, here, _, _ = score(number)
            # Finite even where every item so far is masked: exp(-inf - peak) must be 0, not NaN.
            new_peak = jnp.maximum(peak, jnp.maximum(jnp.max(logits, -1), LOWEST))
            scaled = normaliser * jnp.exp(peak - new_peak)
            normaliser = scaled + jnp.sum(jnp.exp(logits - new_peak[:, None]), -1)
            mean_logit += _row_sums(logits) / (num_rows - 1) if spread else 0.0
            return new_peak, normaliser, target_logit + _at(logits, column, here), mean_logit

        zeros = jnp.zeros(q.shape[0], jnp.float32)
        start = (jnp.full_like(zeros, LOWEST), zeros, zeros, zeros)
        own_peak, own_sum, target_logit, mean_logit = jax.lax.fori_loop(0, num_tiles, scan_sums, start)
        peak = max_of_all(own_peak)
        log_z = jnp.log(sum_of_all(own_sum * jnp.exp(own_peak - peak))) + peak
        loss, trusted = trust.of(log_z, sum_of_all(target_logit), sum_of_all(mean_logit) if spread else None)
        total += jnp.sum(masked(weight, loss))
        if not with_gradient:
            return ((d_vectors, d_bias), total), ()
        weight = masked(weight, trusted)

        def gradient(number, sums):  # type: ignore[no-untyped-def]
            d_vectors, d_bias, d_query, d_mixed = sums
            logits, dense, column, here, vector, start = score(number)
            share = (jnp.exp(logits - log_z[:, None]) - spread * ~jnp.isneginf(logits)) * weight[:, None]
            share = _add_at(share, column, jnp.where(here, -(1.0 - trust.smoothing) * weight, 0.0))
            d_vectors = _add_slice(d_vectors, share.T @ q, start)
            d_bias = _add_slice(d_bias, jnp.sum(share, 0), start)
            if places.size:
                found = *unmix(share, dense, places - start, mixing), _at(share, column, here)
                d_mixed = jax.tree.map(jnp.add, d_mixed, found)
            return d_vectors, d_bias, d_query + share @ vector, d_mixed

        none = jax.tree.map(jnp.zeros_like, (values, mixing, at_target))
        sums = (d_vectors, d_bias, jnp.zeros_like(q), none)
        d_vectors, d_bias, d_query, d_mixed = jax.lax.fori_loop(0, num_tiles, gradient, sums)
        return ((d_vectors, d_bias), total), _to_devices(mixing.shape[1], d_query, *d_mixed)

    parts, cut_off = chunks(tokens, _blocks_of(tokens, side))
    empty = (jnp.zeros((rows, dim) if with_gradient else (0,)), jnp.zeros(rows if with_gradient else 0))
    ((d_vectors, d_bias), total), of_tokens = jax.lax.scan(chunk, (empty, jnp.float32(0)), parts)
    if not with_gradient:
        return total, ()
    return total, (cut_off(of_tokens), d_vectors, d_bias)


def _tokens_of(part, rows):  # type: ignore[no-untyped-def]
    """A chunk of every device: tokens one after the other, lists by block with the local rows of their items."""
    q, target, weight, list_ids, values, mixing, at_target = (all_gather(x) for x in part)
    flat = functools.partial(jax.lax.collapse, start_dimension=0, stop_dimension=2)
    tokens = (flat(x) for x in (q.astype(jnp.float32), target, weight, at_target))
    return *tokens, places_of(list_ids, rows), values, mixing


def _to_devices(block, d_query, d_values, d_mixing, d_at_target):  # type: ignore[no-untyped-def]
    """Each device's part of the sums over devices, by blocks."""
    blocks = lambda x: x.reshape(-1, block, *x.shape[1:])  # noqa: E731
    return tuple(psum_scatter(x) for x in (blocks(d_query), d_values, d_mixing, blocks(d_at_target)))


def _own_targets(target_ids: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Local rows of the targets that this device owns (0 for the others), and which those are."""
    index = local_index(target_ids, rows)
    return jnp.where(index < rows, index, 0), index < rows


def _at(values: jax.Array, columns: jax.Array, mask: jax.Array) -> jax.Array:
    """Each token's value in its column, 0 where `mask` is False."""
    return jnp.where(mask, jnp.take_along_axis(values, columns[:, None], 1)[:, 0], 0.0)


def _row_sums(logits: jax.Array) -> jax.Array:
    """Sum of each token's logits, rows that are no items left out."""
    return jnp.sum(jnp.where(jnp.isneginf(logits), 0.0, logits), -1)


def _add_at(values: jax.Array, columns: jax.Array, added: jax.Array) -> jax.Array:
    """Adds to one column of each token."""
    return values.at[jnp.arange(len(values)), columns].add(added)


def _add_slice(array, part, start):  # type: ignore[no-untyped-def]
    old = jax.lax.dynamic_slice_in_dim(array, start, part.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(array, old + part, start, 0)


def _blocks_of(tokens, size):  # type: ignore[no-untyped-def]
    """Local blocks that hold so many tokens over all devices."""
    return size // (num_shards() * tokens[1].shape[1])
