"""Scores that are the same to the last bit on every mesh, for every batch and in any order of the rows.

A float32 matrix product does not grant that: how it groups the sum over the embedding dim depends on the shapes and on
an item's place in them. So the product is taken in integers that float32 holds exactly: each vector is cut into three
8-bit slices below its own power of two, and slice products are summed where every partial sum is below 2**24. Three
such levels, added in a fixed order, give a score that is as accurate as float32 and the same to the last bit on every
mesh, for every batch, in every precision mode of the hardware (bfloat16 and TF32 hold the slices exactly, too).
Source: Ozaki, Ogita, Oishi, Rump, Numerical Algorithms 2012 (error-free splitting of matrix products); the slices here
are of fixed width, and the terms below 2**-24 of the largest product are dropped.

A mixture of several vectors a side takes each of its products like that. What mixes them is float32, so that two scores
that differ in the last bit alone may change places from mesh to mesh.

Q = queries, R = rows, D = width of a side, K = vectors of a side (1 = scores are products).
"""

import dataclasses
import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from jaxrec.core.mixture_score import MixtureScore

_LEVELS = 3  # slices of a vector
_BASE = 256.0  # one slice holds 8 bits, signed
_EXACT_DIM = 256  # 3 * 256 products of at most 128 * 128 stay below 2**24


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sides:
    """Queries, or rows of a catalogue, cut into slices.

    Attributes:
      slices: whole numbers of at most 8 bits; of queries the leading slice first, of rows the last one first: the pairs
        that are multiplied then stand opposite each other.
      scales: a power of two per vector.
      mixing: of a mixture, the whole side in float32, for its gates; None = scores are products.
    """

    slices: Float[jax.Array, "n k blocks levels dim"]
    scales: Float[jax.Array, "n k"]
    mixing: Float[jax.Array, "n d"] | None


def cut_queries(x: Float[jax.Array, "q d"], score: MixtureScore | None) -> Sides:
    """Queries, ready to be scored."""
    x = x.astype(jnp.float32)
    vectors = x[:, None] if score is None else score.vectors(x)
    slices, scales = jax.vmap(_slice_vectors, in_axes=1, out_axes=1)(vectors)
    return Sides(slices=slices, scales=scales, mixing=None if score is None else x)


def cut_rows(x: Float[jax.Array, "r d"], score: MixtureScore | None) -> Sides:
    """Rows of a catalogue; bfloat16 holds the slices of 8 bits."""
    sides = cut_queries(x, score)
    return dataclasses.replace(sides, slices=sides.slices[..., ::-1, :].astype(jnp.bfloat16))


def all_scores(queries: Sides, rows: Sides, score: MixtureScore | None) -> Float[jax.Array, "q r"]:
    """Scores of all queries against all rows: one exact matrix product per level and block, of each pair of vectors."""

    def products(k: int, j: int) -> jax.Array:
        ours, theirs = queries.slices[:, k], rows.slices[:, j].astype(jnp.float32)

        def product(block: int, level: int) -> jax.Array:
            # Level 1 multiplies the leading slices; level i adds all pairs of slices whose places sum to i + 1.
            q = ours[:, block, :level].reshape(len(ours), -1)
            v = theirs[:, block, _LEVELS - level :].reshape(len(theirs), -1)
            return lax.dot_general(q, v, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

        return _combine(product, theirs.shape[1], queries.scales[:, k, None] * rows.scales[None, :, j])

    if score is None:
        return products(0, 0)
    query_side, row_side = _mixing(queries)[:, None], _mixing(rows)[None]
    return score.mix(
        _pairs(products, score), score.gates(query_side), score.gates(row_side), query_side[..., -1]
    )


def pair_scores(queries: Sides, rows: Sides, score: MixtureScore | None) -> Float[jax.Array, " q"]:
    """Score of each query with its own row; of products, bit for bit that of `all_scores`."""

    def products(k: int, j: int) -> jax.Array:
        ours, theirs = queries.slices[:, k], rows.slices[:, j].astype(jnp.float32)

        def product(block: int, level: int) -> jax.Array:
            return jnp.sum(ours[:, block, :level] * theirs[:, block, _LEVELS - level :], axis=(1, 2))

        return _combine(product, theirs.shape[1], queries.scales[:, k] * rows.scales[:, j])

    if score is None:
        return products(0, 0)
    query_side, row_side = _mixing(queries), _mixing(rows)
    return score.mix(
        _pairs(products, score), score.gates(query_side), score.gates(row_side), query_side[..., -1]
    )


def _mixing(sides: Sides) -> jax.Array:
    assert sides.mixing is not None, "cut with the mixture's score"
    return sides.mixing


def _pairs(products: Callable[[int, int], jax.Array], score: MixtureScore) -> Float[jax.Array, "*q k k"]:
    count = range(score.num_vectors)
    return jnp.stack([jnp.stack([products(k, j) for j in count], axis=-1) for k in count], axis=-2)


def _slice_vectors(
    x: Float[jax.Array, "n d"],
) -> tuple[Float[jax.Array, "n b 3 dim"], Float[jax.Array, " n"]]:
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


def _combine(product: Callable[[int, int], jax.Array], num_blocks: int, scale: jax.Array) -> jax.Array:
    """Adds the levels' exact sums in a fixed order; a bias comes after that."""
    levels = []
    for level in range(1, _LEVELS + 1):
        blocks = [product(block, level) for block in range(num_blocks)]
        levels.append(functools.reduce(operator.add, blocks))
    # Each factor is a power of two, so that a fused multiply-add rounds as the two operations do.
    return ((levels[2] / _BASE + levels[1]) / _BASE + levels[0]) * scale
