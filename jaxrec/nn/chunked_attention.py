"""Attention in memory that grows with the length and not with its square: tile by tile, in plain JAX.

JAX has kernels of this kind for TPUs and GPUs alone. This one runs everywhere, drops attention weights, and takes
single query columns; it equals `attention.attend`, dropped weights included.
B = rows, H = heads, Q = query positions, L = key positions, K = width of a head; N = chunks, C = positions in one.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxrec.nn.dropout import dropout
from jaxrec.nn.positions import Tables, score_bias
from jaxrec.nn.visibility import MASKED, Visibility, may_see

CHUNK = 256
NOBODY = -1  # the segment of what fills the last chunk: no position of a row bears it


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attend_in_chunks(
    query: Float[Array, "b h q k"],
    key: Float[Array, "b h l k"],
    value: Float[Array, "b h l k"],
    seen: Visibility,
    dropout_key: jax.Array | None = None,
    dropout_rate: float = 0.0,
    chunk: int = CHUNK,
    tables: Tables | None = None,
) -> Float[Array, "b h q k"]:
    """`attend` without an array `[b, h, q, l]`: one loop over the tiles of `chunk` x `chunk` scores.

    A query keeps its highest score so far, the sum of its weights relative to that, and their product with the
    values; the backward pass makes the weights anew from the saved logarithm of their sum. Tiles that lie in the
    future of all their queries are left out.

    Args:
      dropout_key: of the dropout on the weights; None = no dropout.
      chunk: the side of a tile, at most.
      tables: of the bias on the scores, `[b, h, n]` each, which is made tile by tile; None = no bias.

    Source: Rabe and Staats, arXiv 2021 (chunks of queries and of keys); Dao et al., NeurIPS 2022 (backward from the
    output and the log-sum-exp). Here the gradients share one loop, so that a tile is made anew once and not twice.
    """
    return _forward(query, key, value, seen, dropout_key, dropout_rate, chunk, tables)[0]


def _forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: Visibility,
    dropout_key: jax.Array | None,
    dropout_rate: float,
    chunk: int,
    tables: Tables | None,
) -> tuple[jax.Array, tuple]:
    tiles = _Tiles(query.shape, seen, dropout_key, dropout_rate, chunk)
    queries = tiles.split_queries(query * (1.0 / math.sqrt(query.shape[-1])))
    keys, values = tiles.split_keys(key), tiles.split_keys(value)

    def add(state: tuple, tile: tuple[jax.Array, jax.Array]) -> tuple[tuple, None]:
        i, j = tile
        peak, total, mixed = _at(state, i)
        scores = tiles.scores(_at(queries, i), _at(keys, j), i, j, tables)
        scores = jnp.where(tiles.seen(i, j), scores, MASKED)
        higher = jnp.maximum(peak, jnp.max(scores, axis=-1, keepdims=True))
        weights, fade = jnp.exp(scores - higher), jnp.exp(peak - higher)
        total = total * fade + jnp.sum(weights, axis=-1, keepdims=True)
        kept = tiles.drop(weights.astype(value.dtype), i, j)
        mixed = mixed * fade + _product("bhql,bhlk->bhqk", kept, _at(values, j))
        return _put(state, (higher, total, mixed), i), None

    zeros = jnp.zeros(queries.shape, jnp.float32)
    state = (jnp.full_like(zeros[..., :1], -jnp.inf), zeros[..., :1], zeros)
    (peak, total, mixed), _ = jax.lax.scan(add, state, tiles.pairs)
    mixed = _join(mixed / total, query.shape[2]).astype(value.dtype)
    log_total = _join(peak + jnp.log(total), query.shape[2])
    return mixed, (query, key, value, seen, dropout_key, tables, mixed, log_total)


def _backward(dropout_rate: float, chunk: int, residuals: tuple, g: jax.Array) -> tuple:
    """With P the weights and D the dropout: dP = D(g V'), dS = P (dP - sum(g O)), dQ = dS K, dK = dS' Q."""
    query, key, value, seen, dropout_key, tables, mixed, log_total = residuals
    tiles = _Tiles(query.shape, seen, dropout_key, dropout_rate, chunk)
    scale = 1.0 / math.sqrt(query.shape[-1])
    along = jnp.sum(g.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1, keepdims=True)
    of_queries = tuple(tiles.split_queries(x) for x in (query * scale, g, log_total, along))
    of_keys = tuple(tiles.split_keys(x) for x in (key, value))

    def add(state: tuple, tile: tuple[jax.Array, jax.Array]) -> tuple[tuple, None]:
        i, j = tile
        d_query, (d_key, d_value), d_tables = _at(state[0], i), _at(state[1:3], j), state[3]
        (query, g, log_total, along), (key, value) = _at(of_queries, i), _at(of_keys, j)
        scores = jnp.where(tiles.seen(i, j), tiles.scores(query, key, i, j, tables), MASKED)
        weights = jnp.exp(scores - log_total)
        d_value += _product("bhql,bhqk->bhlk", tiles.drop(weights.astype(value.dtype), i, j), g)
        d_weights = tiles.drop(_product("bhqk,bhlk->bhql", g, value), i, j)
        d_scores = weights * (d_weights - along)
        d_tables = jax.tree.map(jnp.add, d_tables, tiles.table_gradients(d_scores, i, j, tables))
        d_scores = d_scores.astype(value.dtype)
        d_query += _product("bhql,bhlk->bhqk", d_scores, key)
        d_key += _product("bhql,bhqk->bhlk", d_scores, query)
        return (_put(state[0], d_query, i), *_put(state[1:3], (d_key, d_value), j), d_tables), None

    sums = tuple(jnp.zeros(x.shape, jnp.float32) for x in (of_queries[0], *of_keys))
    state = (*sums, jax.tree.map(jnp.zeros_like, tables))
    (d_query, d_key, d_value, d_tables), _ = jax.lax.scan(add, state, tiles.pairs)
    return (
        _join(d_query * scale, query.shape[2]).astype(query.dtype),
        _join(d_key, key.shape[2]).astype(key.dtype),
        _join(d_value, value.shape[2]).astype(value.dtype),
        None,
        None,
        d_tables,
    )


attend_in_chunks.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def mix_in_chunks(
    query: Float[Array, "b h q k"],
    key: Float[Array, "b h l k"],
    value: Float[Array, "b h l v"],
    seen: Visibility,
    dropout_key: jax.Array | None = None,
    dropout_rate: float = 0.0,
    chunk: int = CHUNK,
    tables: Tables | None = None,
) -> Float[Array, "b h q v"]:
    """`hstu.mix` without an array `[b, h, q, l]`: a sum over tiles, each of which is made anew for its gradients.

    Args:
      dropout_key, chunk, tables: as in `attend_in_chunks`.
    """
    return _mix_forward(query, key, value, seen, dropout_key, dropout_rate, chunk, tables)[0]


def _mix_forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: Visibility,
    dropout_key: jax.Array | None,
    dropout_rate: float,
    chunk: int,
    tables: Tables | None,
) -> tuple[jax.Array, tuple]:
    tiles = _Tiles(query.shape, seen, dropout_key, dropout_rate, chunk)
    queries, keys, values = tiles.split_queries(query), tiles.split_keys(key), tiles.split_keys(value)

    def add(mixed: jax.Array, tile: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        i, j = tile
        part = tiles.mixed(i, j, _at(queries, i), _at(keys, j), _at(values, j), tables)
        return _put(mixed, _at(mixed, i) + part, i), None

    mixed = jnp.zeros((*queries.shape[:-1], value.shape[-1]), jnp.float32)
    mixed, _ = jax.lax.scan(add, mixed, tiles.pairs)
    mixed = _join(mixed, query.shape[2]).astype(value.dtype)
    return mixed, (query, key, value, seen, dropout_key, tables)


def _mix_backward(dropout_rate: float, chunk: int, residuals: tuple, g: jax.Array) -> tuple:
    query, key, value, seen, dropout_key, tables = residuals
    tiles = _Tiles(query.shape, seen, dropout_key, dropout_rate, chunk)
    queries, keys, values = tiles.split_queries(query), tiles.split_keys(key), tiles.split_keys(value)
    gradients = tiles.split_queries(g.astype(jnp.float32))

    def add(sums: tuple, tile: tuple[jax.Array, jax.Array]) -> tuple[tuple, None]:
        i, j = tile
        parts = (_at(queries, i), _at(keys, j), _at(values, j), tables)
        _, pull = jax.vjp(functools.partial(tiles.mixed, i, j), *parts)
        d_query, *d_keys, d_tables = pull(_at(gradients, i))
        of_queries, of_keys, of_tables = sums
        of_queries = _put(of_queries, _at(of_queries, i) + d_query, i)
        of_keys = _put(of_keys, jax.tree.map(jnp.add, _at(of_keys, j), d_keys), j)
        return (of_queries, of_keys, jax.tree.map(jnp.add, of_tables, d_tables)), None

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)  # noqa: E731
    start = (zeros(queries), [zeros(keys), zeros(values)], jax.tree.map(zeros, tables))
    (d_query, (d_key, d_value), d_tables), _ = jax.lax.scan(add, start, tiles.pairs)
    arrays = zip((d_query, d_key, d_value), (query, key, value), strict=True)
    return *(_join(d, x.shape[2]).astype(x.dtype) for d, x in arrays), None, None, d_tables


mix_in_chunks.defvjp(_mix_forward, _mix_backward)


class _Tiles:
    """The scores of one attention, cut into tiles: tile (i, j) is chunk i of the queries by chunk j of the keys."""

    def __init__(
        self,
        shape: tuple[int, ...],
        seen: Visibility,
        dropout_key: jax.Array | None,
        dropout_rate: float,
        chunk: int,
    ):
        batch, heads, num_queries, _ = shape
        num_keys = seen.segment_ids.shape[1]
        self.causal, self.dropout_key, self.dropout_rate = seen.causal, dropout_key, dropout_rate
        self.whole = (batch, heads, num_queries, num_keys)
        self.sizes = even_chunk(num_queries, chunk), even_chunk(num_keys, chunk)
        self.queries = jax.tree.map(functools.partial(self.split_queries, axis=1, fill=NOBODY), seen.queries)
        self.keys = jax.tree.map(functools.partial(self.split_keys, axis=1, fill=NOBODY), seen.keys)
        i, j = np.indices((len(self.queries.segments), len(self.keys.segments)), np.int32).reshape(2, -1)
        somebody = (j <= i) | (not seen.causal or seen.query_positions is not None)
        self.pairs = jnp.asarray(i[somebody]), jnp.asarray(j[somebody])

    def split_queries(self, x: jax.Array, axis: int = 2, fill: int = 0) -> jax.Array:
        return _split(x, self.sizes[0], axis, fill)

    def split_keys(self, x: jax.Array, axis: int = 2, fill: int = 0) -> jax.Array:
        return _split(x, self.sizes[1], axis, fill)

    def scores(
        self,
        query: Float[Array, "b h q k"],
        key: Float[Array, "b h l k"],
        i: jax.Array,
        j: jax.Array,
        tables: Tables | None,
    ) -> Float[Array, "b h q l"]:
        """Of tile (i, j), with their bias."""
        scores = _product("bhqk,bhlk->bhql", query, key)
        return scores + self._bias(i, j, tables) if tables else scores

    def seen(self, i: jax.Array, j: jax.Array) -> Bool[Array, "b 1 q l"]:
        """Who may be seen in tile (i, j)."""
        return may_see(_at(self.queries, i), _at(self.keys, j), causal=self.causal)[:, None]

    def mixed(
        self,
        i: jax.Array,
        j: jax.Array,
        query: Float[Array, "b h q k"],
        key: Float[Array, "b h l k"],
        value: Float[Array, "b h l v"],
        tables: Tables | None,
    ) -> Float[Array, "b h q v"]:
        """What the values of tile (i, j) add to its queries, weighted by the SiLU of their scores."""
        weights = jnp.where(self.seen(i, j), jax.nn.silu(self.scores(query, key, i, j, tables)), 0.0)
        return _product("bhql,bhlv->bhqv", self.drop(weights.astype(value.dtype), i, j), value)

    def table_gradients(
        self, d_scores: Float[Array, "b h q l"], i: jax.Array, j: jax.Array, tables: Tables | None
    ) -> Tables | None:
        """What the scores' gradients of tile (i, j) say to the bias."""
        if not tables:
            return tables
        return jax.vjp(functools.partial(self._bias, i, j), tables)[1](d_scores)[0]

    def _bias(self, i: jax.Array, j: jax.Array, tables: Tables) -> Float[Array, "b h q l"]:
        bias = score_bias(tables, _at(self.queries, i), _at(self.keys, j))
        assert bias is not None
        return bias

    def drop(self, x: Float[Array, "b h q l"], i: jax.Array, j: jax.Array) -> Float[Array, "b h q l"]:
        """Drops from tile (i, j) what `attend` drops there."""
        starts = (0, i * self.sizes[0], j * self.sizes[1])
        return dropout(x, self.dropout_rate, self.dropout_key, whole=self.whole, starts=starts)


def even_chunk(length: int, chunk: int) -> int:
    """The size of chunks, `chunk` at most, that fill `length` with little to spare: a multiple of 8 if `chunk` is."""
    size = -(-length // -(-length // chunk))
    multiple = math.gcd(8, chunk)
    return -(-size // multiple) * multiple


def _split(x: Array, size: int, axis: int, fill: int) -> Array:
    """`[..., L, ...] -> [N, ..., C, ...]`, filled up."""
    count = -(-x.shape[axis] // size)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count * size - x.shape[axis])
    x = jnp.pad(x, widths, constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)


def _join(x: Float[Array, "n b h c k"], length: int) -> Float[Array, "b h l k"]:
    count, batch, heads, size, width = x.shape
    return jnp.moveaxis(x, 0, 2).reshape(batch, heads, count * size, width)[:, :, :length]


def _at(stacks: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stacks)


def _put(stacks: Any, parts: Any, index: jax.Array) -> Any:
    return jax.tree.map(
        lambda x, part: jax.lax.dynamic_update_index_in_dim(x, part, index, axis=0), stacks, parts
    )


def _product(subscripts: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32)
