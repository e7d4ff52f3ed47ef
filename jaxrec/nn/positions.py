"""Where and when events are, as attention sees it: rotated queries and keys, and biases on the scores.

Both look at differences only. The events of a segment lie side by side, so columns differ as places in it do.
B = rows (1 = alike for all), H = heads, Q = query positions, L = key positions, K = width of a head, N = buckets.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxrec.core.batch import NUM_TIME_GAPS, UNKNOWN_SECONDS
from jaxrec.nn.layers import parameter
from jaxrec.nn.visibility import Places

ROTARY_BASE = 10_000.0
# Distances below this have a bucket each, longer ones four an octave; from 4,096 on they share the last.
EXACT_DISTANCES = 16
NUM_DISTANCES = EXACT_DISTANCES + 4 * 8

Tables = dict[str, jax.Array]  # "distance", "time": the biases by bucket, [B, H, N]


def rotate(x: Float[Array, "b h l k"], columns: Int[Array, "#b l"]) -> Float[Array, "b h l k"]:
    """Turns entry i and entry i + K/2 of each head by column / base^(2i/K): products then see differences.

    Source: Su et al., arXiv 2021 (RoFormer); the pairs lie half a head apart.
    """
    half = x.shape[-1] // 2
    speed = ROTARY_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = columns[:, None, :, None].astype(jnp.float32) * speed
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    one, other = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([one * cos - other * sin, other * cos + one * sin], axis=-1).astype(x.dtype)


class RelativeBias(nnx.Module):
    """What is added to a head's score of two events, by the distance between them and by the time between them.

    Source: Raffel et al., JMLR 2020 (T5: buckets of the distance); Zhai et al., ICML 2024 (HSTU: buckets of the
    logarithm of the time). Here every layer has its own numbers, and the future has buckets apart from the past.
    """

    def __init__(self, num_heads: int, *, distance: bool, time: bool):
        """With neither it holds nothing and adds nothing."""
        if distance:
            self.distance = parameter(jnp.zeros((num_heads, 2 * NUM_DISTANCES), jnp.float32), "heads", None)
        if time:
            self.time = parameter(jnp.zeros((num_heads, 2 * NUM_TIME_GAPS), jnp.float32), "heads", None)

    def tables(self, num_rows: int) -> Tables:
        """The numbers, repeated for each row: a device sums the gradients of its own rows before they travel."""
        there = {name: getattr(self, name)[...] for name in ("distance", "time") if hasattr(self, name)}
        return {name: jnp.broadcast_to(table, (num_rows, *table.shape)) for name, table in there.items()}


def score_bias(tables: Tables, queries: Places, keys: Places) -> Float[Array, "#b h q l"] | None:
    """The sum of the biases of each pair; None without tables."""
    bias = None
    for name, table in tables.items():
        buckets = distance_buckets(queries, keys) if name == "distance" else time_buckets(queries, keys)
        # Whichever is not 1; sizes may be symbolic, which have no maximum that is a number.
        num_rows = table.shape[0] if buckets.shape[0] == 1 else buckets.shape[0]
        table, buckets = (jnp.broadcast_to(x, (num_rows, *x.shape[1:])) for x in (table, buckets))
        found = jax.vmap(lambda row, at: jnp.take(row, at, axis=1, mode="clip"))(table, buckets)
        bias = found if bias is None else bias + found
    return bias


def distance_buckets(queries: Places, keys: Places) -> Int[Array, "#b q l"]:
    """The bucket of the columns from key to query; keys in the future have `NUM_DISTANCES` more."""
    steps = queries.columns[:, :, None] - keys.columns[:, None, :]
    distance = jnp.abs(steps)
    octave = bit_lengths(distance) - 1
    quarter = jnp.right_shift(distance, jnp.maximum(octave - 2, 0)) & 3
    # The first octave past the exact distances begins at 16 = 2^4.
    bucket = jnp.where(distance < EXACT_DISTANCES, distance, EXACT_DISTANCES + 4 * (octave - 4) + quarter)
    return jnp.minimum(bucket, NUM_DISTANCES - 1) + NUM_DISTANCES * (steps < 0)


def time_buckets(queries: Places, keys: Places) -> Int[Array, "b q l"]:
    """The bucket of the seconds from key to query, as in `core.batch`; later keys have `NUM_TIME_GAPS` more."""
    assert queries.times is not None and keys.times is not None, "the encoder has asked for them"
    later, earlier = queries.times[:, :, None], keys.times[:, None, :]
    unknown = (later <= UNKNOWN_SECONDS) | (earlier <= UNKNOWN_SECONDS)
    seconds = later - earlier
    bucket = jnp.minimum(bit_lengths(jnp.abs(seconds)) + 1, NUM_TIME_GAPS - 1) + NUM_TIME_GAPS * (seconds < 0)
    return jnp.where(unknown, 0, bucket)


def bit_lengths(x: Int[Array, "*n"]) -> Int[Array, "*n"]:
    """The bit length: 0 for 0, 1 + floor(log2(x)) above."""
    return 32 - jax.lax.clz(x)
