"""Full ranking: where does each query's target stand in the whole catalogue, which lies over every device?

Nothing is sampled, and no `[queries, items]` array of scores exists: each shard scores its own rows chunk by
chunk, counts the items that beat the target, and one `psum` adds the counts. Only the counts and, where they
are wanted, the `k` best candidates of each shard cross the network.

The rank of a target is `#(score > target's) + #(score == target's and lower item id)` over the items
1..num_items that are not masked: the same for any batch, any mesh and any order of the rows, *if* an item's
score is, which `exact_scores` sees to.

N = shards (all devices), Q = queries, D = embed dim, R = physical rows of the catalogue, C = rows of a chunk,
S = seen pairs, T = top k, M = items with something added.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Bool, Float, Int

from jaxrec.core.mesh import ALL_AXES
from jaxrec.core.mixture_score import MixtureScore
from jaxrec.core.partition import spec
from jaxrec.core.placement import own_ids
from jaxrec.core.sparse_logits import SparseLogits
from jaxrec.evaluation.exact_scores import Sides, all_scores, cut_queries, cut_rows, pair_scores

Array = jax.Array | np.ndarray

_FIXED_ONE, _MOST_ADDED = 1 << 20, 64.0  # of what is added to a score: thirty sums of the most fit 32 bits
_MASK_BYTES = 1 << 28  # bound of the mask of seen items on one device

Carry = tuple[jax.Array, tuple[jax.Array, jax.Array]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RankingCatalogue:
    """The item vectors, cut into slices once per evaluation; rows stay on the shard that owns them.

    Attributes:
      items: what is scored.
      bias: per row, added to the score.
      domains: per row; None = the catalogue is one.
    """

    items: Sides
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
      score: of a query and a row; None = their product.
    """

    mesh: Mesh
    num_items: int
    first_item: int = 1
    top_k: int = 0
    chunk_items: int = 0
    block_queries: int = 0
    score: MixtureScore | None = None

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
        return _cut_catalogue(self.mesh, self.score, vectors, bias, item_domains)

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


@functools.partial(jax.jit, static_argnums=(0, 1))
def _cut_catalogue(
    mesh: Mesh,
    score: MixtureScore | None,
    vectors: jax.Array,
    bias: jax.Array,
    item_domains: jax.Array | None,
) -> RankingCatalogue:
    def cut(vectors: jax.Array, bias: jax.Array, item_domains: jax.Array | None) -> RankingCatalogue:
        domains = None if item_domains is None else item_domains[own_ids(jnp.arange(len(bias)))]
        return RankingCatalogue(
            items=cut_rows(vectors, score), bias=bias.astype(jnp.float32), domains=domains
        )

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
    rows_per_shard = catalogue.bias.shape[0] // ranking.num_shards
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
    shard, rows_per_shard = lax.axis_index(ALL_AXES), catalogue.bias.shape[0]
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
        query = cut_queries(block_queries, ranking.score)
        cells = (num_chunks, block_targets.shape[0], chunk)
        seen = _mask_of_seen(seen_queries - first, seen_rows, cells)
        rows, bias = _rows_of_targets(catalogue, block_targets, shard, num_shards)
        target_scores = pair_scores(query, rows, ranking.score) + bias
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
    query: Sides,
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
        scores = all_scores(query, rows.items, ranking.score) + rows.bias[None, :]
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
        if ranking.score is not None:  # the target's own score may round otherwise than here
            behind |= (ids[None, :] == targets[:, None]) & ~jnp.isnan(target_scores)[:, None]
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


def _rows_of_targets(
    catalogue: RankingCatalogue, targets: Int[jax.Array, " q"], shard: jax.Array, num_shards: int
) -> tuple[Sides, Float[jax.Array, " q"]]:
    """The targets' rows and biases, which their owners send."""
    mine = targets % num_shards == shard
    row = jnp.where(mine, targets // num_shards, 0)

    def fetch(x: jax.Array) -> jax.Array:
        values = x[row].astype(jnp.float32)
        return lax.psum(jnp.where(mine.reshape(-1, *[1] * (values.ndim - 1)), values, 0), ALL_AXES)

    return jax.tree.map(fetch, (catalogue.items, catalogue.bias))


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
