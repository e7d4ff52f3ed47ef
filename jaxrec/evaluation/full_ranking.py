"""Full ranking: where does each query's target stand in the whole catalogue, which lies over every device?

Nothing is sampled, and no `[queries, items]` array of scores exists: each shard scores its own rows chunk by
chunk, counts the items that beat the target, and one `psum` adds the counts. Only the counts and, where they
are wanted, the `k` best candidates of each shard cross the network.

The rank of a target is `#(score > target's) + #(score == target's and lower item id)` over the items
1..num_items that are not masked: the same for any batch, any mesh and any order of the rows, *if* an item's
score is. A float32 matrix product does not grant that: how it groups the sum over the embedding dim depends
on the shapes and on an item's place in them. So the product is taken in integers that float32 holds exactly:
each vector is cut into three 8-bit slices below its own power of two, and slice products are summed where
every partial sum is below 2**24. Three such levels, added in a fixed order, give a score that is as accurate
as float32 and the same to the last bit on every mesh, for every batch, in every precision mode of the
hardware (bfloat16 and TF32 hold the slices exactly, too).
Source: Ozaki, Ogita, Oishi, Rump, Numerical Algorithms 2012 (error-free splitting of matrix products); the
slices here are of fixed width, and the terms below 2**-24 of the largest product are dropped.

N = shards (all devices), Q = queries, D = embed dim, R = physical rows of the catalogue, C = rows of a chunk,
S = seen pairs, T = top k, M = items with something added.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Bool, Float, Int

from jaxrec.core.mesh import ALL_AXES
from jaxrec.core.partition import spec
from jaxrec.core.sparse_logits import SparseLogits

Array = jax.Array | np.ndarray

_LEVELS = 3  # slices of a vector
_BASE = 256.0  # one slice holds 8 bits, signed
_EXACT_DIM = 256  # 3 * 256 products of at most 128 * 128 stay below 2**24
_FIXED_ONE, _MOST_ADDED = 1 << 20, 64.0  # of what is added to a score: thirty sums of the most fit 32 bits
_MASK_BYTES = 1 << 28  # bound of the mask of seen items on one device

Slices = tuple[Float[jax.Array, "n b 3 dim"], Float[jax.Array, " n"]]  # (slices, scales) of n vectors
Carry = tuple[jax.Array, tuple[jax.Array, jax.Array]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RankingCatalogue:
    """The item vectors, cut into slices once per evaluation; rows stay on the shard that owns them.

    Attributes:
      slices: whole numbers of at most 8 bits, least significant slice first.
      scales: a power of two per row.
      bias: per row, added after scaling.
      domains: per row; None = the catalogue is one.
    """

    slices: Float[jax.Array, "r blocks levels dim"]
    scales: Float[jax.Array, " r"]
    bias: Float[jax.Array, " r"]
    domains: Int[jax.Array, " r"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Ranking:
    """What `FullRanking.rank` returns, replicated over the mesh.

    Attributes:
      ranks: 0 = the target is the best of all items that are not masked.
      top_scores: best first; -inf where fewer than T items are left.
      top_item_ids: 0 where fewer than T items are left.
    """

    ranks: Int[jax.Array, " q"]
    top_scores: Float[jax.Array, "q t"]
    top_item_ids: Int[jax.Array, "q t"]


@dataclass(frozen=True, kw_only=True)
class FullRanking:
    """Ranks targets in, and takes the best k of, a catalogue whose rows lie over all devices of `mesh`.

    Attributes:
      mesh: its devices own the rows: the physical row of item `r` is `(r mod N) * (R / N) + r div N`.
      num_items: items are 1..num_items; row 0 and the rows past num_items never count.
      first_item: items below it never count either: a part of the catalogue is ranked by itself.
      top_k: best items to return per query; 0 = ranks only.
      chunk_items: rows that a device scores at a time; bounds the memory, changes no result. 0 = by platform.
      block_queries: queries that are scored at a time; bounds the memory, changes no result. 0 = by rows.
    """

    mesh: Mesh
    num_items: int
    first_item: int = 1
    top_k: int = 0
    chunk_items: int = 0
    block_queries: int = 0

    def __post_init__(self) -> None:
        for name in ("top_k", "chunk_items", "block_queries"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        if self.num_items < 1:
            raise ValueError(f"num_items={self.num_items}: an empty catalogue cannot be ranked.")
        if not 1 <= self.first_item <= self.num_items:
            raise ValueError(f"first_item={self.first_item} must lie in 1 .. num_items={self.num_items}.")

    @property
    def num_shards(self) -> int:
        return self.mesh.size

    def catalogue(
        self,
        vectors: Float[Array, "r d"],
        bias: Float[Array, " r"],
        item_domains: Int[np.ndarray, " n_plus_1"] | None = None,
    ) -> RankingCatalogue:
        """Cuts the item vectors into slices, on the devices that own them.

        Args:
          vectors: one per physical row, sharded over all axes of the mesh.
          bias: one per physical row.
          item_domains: by item id; None = the catalogue is one.

        Raises:
          ValueError: the rows do not divide the mesh or are too few for the items.
        """
        rows = vectors.shape[0]
        if rows % self.num_shards or rows <= self.num_items or bias.shape != (rows,):
            raise ValueError(
                f"item vectors {vectors.shape} and bias {bias.shape} do not fit {self.num_items} items on "
                f"{self.num_shards} shards; give at least {self.num_items + 1} rows, a multiple of the shards."
            )
        if item_domains is not None:
            item_domains = np.pad(item_domains, (0, rows - len(item_domains)))
        return _cut_catalogue(self.mesh, vectors, bias, item_domains)

    def rank(
        self,
        catalogue: RankingCatalogue,
        queries: Float[Array, "q d"],
        targets: Int[Array, " q"],
        seen_queries: Int[Array, " s"],
        seen_items: Int[Array, " s"],
        *,
        extra: SparseLogits | None = None,
        query_domains: Int[Array, " q"] | None = None,
    ) -> Ranking:
        """Ranks `targets` among all items but those seen.

        Args:
          catalogue: from `catalogue`.
          queries: the user's side of the score, already multiplied by W.
          targets: item ids; 0 = no target (the rank means nothing then). A target is never masked, even if
            it was seen.
          seen_queries: indices into `queries` of the pairs (query, item) to mask; give none to mask nothing.
          seen_items: item ids of the pairs; a pair of item 0 is padding.
          extra: added to the scores of a few items of each query, `[Q, M]`; None = nothing is.
          query_domains: items of other domains are masked, the target among them; for a catalogue with domains.
        """
        return _rank(self, catalogue, queries, targets, seen_queries, seen_items, extra, query_domains)

    def chunk_rows(self, rows_per_shard: int) -> int:
        """Rows of a chunk: even chunks, none above the limit."""
        # A CPU scores fastest while a chunk of scores stays in its second-level cache.
        limit = self.chunk_items or (512 if self.mesh.devices.flat[0].platform == "cpu" else 8192)
        num_chunks = -(-rows_per_shard // limit)
        return -(-rows_per_shard // num_chunks)


@functools.partial(jax.jit, static_argnums=0)
def _cut_catalogue(
    mesh: Mesh, vectors: jax.Array, bias: jax.Array, item_domains: jax.Array | None
) -> RankingCatalogue:
    def cut(vectors: jax.Array, bias: jax.Array, item_domains: jax.Array | None) -> RankingCatalogue:
        slices, scales = _slice_vectors(vectors.astype(jnp.float32))
        slices = slices[:, :, ::-1].astype(jnp.bfloat16)
        own_ids = jnp.arange(len(bias)) * mesh.size + lax.axis_index(ALL_AXES)
        domains = None if item_domains is None else item_domains[own_ids]
        return RankingCatalogue(slices=slices, scales=scales, bias=bias.astype(jnp.float32), domains=domains)

    row = spec("row")
    cut_shards = jax.shard_map(
        cut, mesh=mesh, in_specs=(row, row, PartitionSpec()), out_specs=row, check_vma=False
    )
    return cut_shards(vectors, bias, item_domains)


@functools.partial(jax.jit, static_argnums=0)
def _rank(
    ranking: FullRanking,
    catalogue: RankingCatalogue,
    queries: jax.Array,
    targets: jax.Array,
    seen_queries: jax.Array,
    seen_items: jax.Array,
    extra: SparseLogits | None,
    query_domains: jax.Array | None,
) -> Ranking:
    rows_per_shard = catalogue.scales.shape[0] // ranking.num_shards
    cell_bytes = 1 if extra is None else 5  # the mask of seen items, and what is added to a score
    block = ranking.block_queries or max(8, min(256, _MASK_BYTES // (rows_per_shard * cell_bytes)))
    fixed = None if extra is None else _to_fixed_point(extra)
    arguments = (queries, targets, seen_queries, seen_items, fixed, query_domains)
    return jax.shard_map(
        functools.partial(_rank_on_shard, ranking, block),
        mesh=ranking.mesh,
        in_specs=(spec("row"),) + (PartitionSpec(),) * len(arguments),
        out_specs=PartitionSpec(),
        check_vma=False,
    )(catalogue, *arguments)


def _rank_on_shard(
    ranking: FullRanking,
    block: int,
    catalogue: RankingCatalogue,
    queries: Float[jax.Array, "q d"],
    targets: Int[jax.Array, " q"],
    seen_queries: Int[jax.Array, " s"],
    seen_items: Int[jax.Array, " s"],
    extra: SparseLogits | None,
    query_domains: Int[jax.Array, " q"] | None,
) -> Ranking:
    """One shard's part: block by block of queries."""
    num_queries, num_shards = queries.shape[0], ranking.num_shards
    shard, rows_per_shard = lax.axis_index(ALL_AXES), catalogue.scales.shape[0]
    chunk = ranking.chunk_rows(rows_per_shard)
    num_chunks = -(-rows_per_shard // chunk)

    def in_chunks(x: jax.Array) -> jax.Array:
        pad_rows = num_chunks * chunk - rows_per_shard
        return jnp.pad(x, [(0, pad_rows)] + [(0, 0)] * (x.ndim - 1)).reshape(num_chunks, chunk, *x.shape[1:])

    chunks = jax.tree.map(in_chunks, catalogue)
    chunk_ids = (jnp.arange(num_chunks * chunk) * num_shards + shard).reshape(num_chunks, chunk)

    def own_rows(item_ids: jax.Array) -> jax.Array:
        """Rows on this shard, -1 for padding and for other shards' items."""
        return jnp.where((item_ids > 0) & (item_ids % num_shards == shard), item_ids // num_shards, -1)

    seen_rows = own_rows(seen_items)

    def rank_block(args: Any) -> Ranking:
        first, block_queries, block_targets, block_extra, block_domains = args
        query = _slice_vectors(block_queries.astype(jnp.float32))
        cells = (num_chunks, block_targets.shape[0], chunk)
        seen = _mask_of_seen(seen_queries - first, seen_rows, cells)
        target_scores = _target_scores(catalogue, query, block_targets, shard, num_shards)
        added = None
        if block_extra is not None:
            added = _added_scores(block_extra.values, own_rows(block_extra.item_ids), cells)
            named = block_extra.item_ids == block_targets[:, None]
            target_scores += _from_fixed_point(jnp.sum(jnp.where(named, block_extra.values, 0), axis=1))
        beaten_by, best = _scan_chunks(
            ranking, query, block_targets, target_scores, block_domains, (chunks, chunk_ids, seen, added)
        )
        top_scores, top_item_ids = _merge_shards(best, ranking.top_k)
        return Ranking(ranks=lax.psum(beaten_by, ALL_AXES), top_scores=top_scores, top_item_ids=top_item_ids)

    block = min(block, max(num_queries, 1))
    num_blocks = -(-num_queries // block)
    pad = num_blocks * block - num_queries

    def in_blocks(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)).reshape(num_blocks, block, *x.shape[1:])

    blocks = (
        jnp.arange(num_blocks) * block,
        *jax.tree.map(in_blocks, (queries, targets, extra, query_domains)),
    )
    ranked = lax.map(rank_block, blocks)
    return jax.tree.map(lambda x: x.reshape(num_blocks * block, *x.shape[2:])[:num_queries], ranked)


def _scan_chunks(
    ranking: FullRanking,
    query: Slices,
    targets: Int[jax.Array, " q"],
    target_scores: Float[jax.Array, " q"],
    query_domains: Int[jax.Array, " q"] | None,
    chunks: tuple[
        RankingCatalogue,
        Int[jax.Array, "chunks c"],
        Bool[jax.Array, "chunks q c"],
        Int[jax.Array, "chunks q c"] | None,
    ],
) -> tuple[Int[jax.Array, " q"], tuple[jax.Array, jax.Array]]:
    """How many of this shard's items beat each target, and the best `top_k` of them."""

    def score_chunk(carry: Carry, xs: Any) -> tuple[Carry, None]:
        beaten_by, best = carry
        rows, ids, seen, added = xs
        scores = _scores(query, rows)
        if added is not None:
            scores += _from_fixed_point(added)
        # A target that was seen before (a repeat) stays in the running.
        allowed = ((ids >= ranking.first_item) & (ids <= ranking.num_items))[None, :] & (
            ~seen | (ids[None, :] == targets[:, None])
        )
        if query_domains is not None:
            allowed &= rows.domains[None, :] == query_domains[:, None]
        # Written as "not behind", so that a NaN counts as beaten by all and never as a perfect rank.
        behind = (scores < target_scores[:, None]) | (
            (scores == target_scores[:, None]) & (ids[None, :] >= targets[:, None])
        )
        beaten_by += jnp.sum(allowed & ~behind, axis=1, dtype=jnp.int32)
        if ranking.top_k:
            best = _keep_best(best, jnp.where(allowed, scores, -jnp.inf), ids, ranking.top_k)
        return (beaten_by, best), None

    num_queries = targets.shape[0]
    best = (
        jnp.full((num_queries, ranking.top_k), -jnp.inf, jnp.float32),
        jnp.zeros((num_queries, ranking.top_k), jnp.int32),
    )
    return lax.scan(score_chunk, (jnp.zeros(num_queries, jnp.int32), best), chunks)[0]


def _slice_vectors(x: Float[jax.Array, "n d"]) -> Slices:
    """`x[n] = scales[n] * sum_i slices[n, :, i] * 256**-i` to 24 bits of the row's largest entry."""
    num_rows, dim = x.shape
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    exponent = jnp.frexp(largest)[1]
    rest = jnp.ldexp(x, 7 - exponent)
    slices = []
    for _ in range(_LEVELS):
        slices.append(jnp.round(rest))
        rest = (rest - slices[-1]) * _BASE
    num_blocks = -(-dim // _EXACT_DIM)
    block_dim = -(-dim // num_blocks)
    padded = jnp.pad(jnp.stack(slices, axis=1), ((0, 0), (0, 0), (0, num_blocks * block_dim - dim)))
    blocks = padded.reshape(num_rows, _LEVELS, num_blocks, block_dim).swapaxes(1, 2)
    return blocks, jnp.ldexp(jnp.ones(num_rows, jnp.float32), exponent[:, 0] - 7)


def _scores(query: Slices, rows: RankingCatalogue) -> Float[jax.Array, "q c"]:
    """Scores of all queries against all rows of a chunk: one exact matrix product per level and block."""
    query_slices, query_scales = query
    slices = rows.slices.astype(jnp.float32)

    def product(block: int, level: int) -> jax.Array:
        # Level 1 multiplies the leading slices; level i adds all pairs of slices whose places sum to i + 1.
        # The query's slices run from the leading one down, the catalogue's from the last one up: the pairs
        # stand opposite each other.
        q = query_slices[:, block, :level].reshape(query_slices.shape[0], -1)
        v = slices[:, block, _LEVELS - level :].reshape(slices.shape[0], -1)
        return lax.dot_general(q, v, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    scales = query_scales[:, None] * rows.scales[None, :]
    return _combine(product, slices.shape[1], scales, rows.bias[None, :])


def _target_scores(
    catalogue: RankingCatalogue,
    query: Slices,
    targets: Int[jax.Array, " q"],
    shard: jax.Array,
    num_shards: int,
) -> Float[jax.Array, " q"]:
    """The targets' scores, bit for bit those of `_scores`, from the rows that their owners send."""
    query_slices, query_scales = query
    mine = targets % num_shards == shard
    row = jnp.where(mine, targets // num_shards, 0)

    def fetch(x: jax.Array) -> jax.Array:
        values = x[row].astype(jnp.float32)
        return lax.psum(jnp.where(mine.reshape(-1, *[1] * (values.ndim - 1)), values, 0), ALL_AXES)

    slices, scales, bias = fetch(catalogue.slices), fetch(catalogue.scales), fetch(catalogue.bias)

    def product(block: int, level: int) -> jax.Array:
        pairs = query_slices[:, block, :level] * slices[:, block, _LEVELS - level :]
        return jnp.sum(pairs, axis=(1, 2))

    return _combine(product, slices.shape[1], query_scales * scales, bias)


def _combine(
    product: Callable[[int, int], jax.Array], num_blocks: int, scale: jax.Array, bias: jax.Array
) -> jax.Array:
    """Adds the levels' exact sums in a fixed order, then the bias."""
    levels = []
    for level in range(1, _LEVELS + 1):
        blocks = [product(block, level) for block in range(num_blocks)]
        levels.append(functools.reduce(operator.add, blocks))
    # Each factor is a power of two, so that a fused multiply-add rounds as the two operations do.
    return ((levels[2] / _BASE + levels[1]) / _BASE + levels[0]) * scale + bias


def _mask_of_seen(
    query: Int[jax.Array, " s"], row: Int[jax.Array, " s"], shape: tuple[int, int, int]
) -> Bool[jax.Array, "chunks q c"]:
    """True at the pairs (query, row) that lie in this block of queries and on this shard."""
    num_chunks, num_queries, chunk = shape
    here = (row >= 0) & (query >= 0) & (query < num_queries)
    outside = jnp.where(here, row // chunk, num_chunks)
    return jnp.zeros(shape, bool).at[outside, query, row % chunk].set(True, mode="drop")


def _to_fixed_point(extra: SparseLogits) -> SparseLogits:
    """Values as whole numbers: their sums are the same in any order."""
    values = jnp.round(jnp.clip(extra.values, -_MOST_ADDED, _MOST_ADDED) * _FIXED_ONE).astype(jnp.int32)
    return SparseLogits(jnp.asarray(extra.item_ids), values)


def _from_fixed_point(values: Int[jax.Array, "*q"]) -> Float[jax.Array, "*q"]:
    return values.astype(jnp.float32) * (1.0 / _FIXED_ONE)


def _added_scores(
    values: Int[jax.Array, "q m"], rows: Int[jax.Array, "q m"], shape: tuple[int, int, int]
) -> Int[jax.Array, "chunks q c"]:
    """What is added to each score of this shard (`rows` below 0 are other shards'), in fixed point."""
    num_chunks, num_queries, chunk = shape
    outside = jnp.where(rows >= 0, rows // chunk, num_chunks)
    query = jnp.broadcast_to(jnp.arange(num_queries)[:, None], rows.shape)
    return jnp.zeros(shape, jnp.int32).at[outside, query, rows % chunk].add(values, mode="drop")


def _keep_best(
    best: tuple[jax.Array, jax.Array], scores: Float[jax.Array, "q c"], ids: Int[jax.Array, " c"], top_k: int
) -> tuple[jax.Array, jax.Array]:
    """Merges a chunk into the running best. `top_k` prefers the lower index, which here is the lower id."""
    values, index = lax.top_k(scores, min(top_k, scores.shape[1]))
    values = jnp.concatenate([best[0], values], axis=1)
    candidates = jnp.concatenate([best[1], ids[index]], axis=1)
    values, index = lax.top_k(values, top_k)
    return values, jnp.take_along_axis(candidates, index, axis=1)


def _merge_shards(best: tuple[jax.Array, jax.Array], top_k: int) -> tuple[jax.Array, jax.Array]:
    """The best of all shards' best: higher score first, then lower id."""
    if not top_k:
        return best
    values = lax.all_gather(best[0], ALL_AXES, axis=1, tiled=True)
    ids = lax.all_gather(best[1], ALL_AXES, axis=1, tiled=True)
    negative, ids = lax.sort((-values, ids), dimension=1, num_keys=2)
    scores = -negative[:, :top_k]
    return scores, jnp.where(scores == -jnp.inf, 0, ids[:, :top_k])
