"""A random choice among the distinct ids of a batch, the same on every mesh.

T = ids of this device, C = ids that are chosen.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from jaxrec.core.hashing import hashed_rows
from jaxrec.core.partition import spec
from jaxrec.core.placement import all_gather
from jaxrec.embedding.exchange import NO_KEY, run_starts


def draw_distinct(ids: Int[Array, "b *l"], count: int, key: jax.Array) -> Int[Array, "c"]:
    """`count` of the distinct ids, every set of them as likely as another; rising, `NO_KEY` where there are fewer.

    Those whose hashes are the lowest: each device sends its own lowest `count`, among which all of the answer's are
    that it has.

    Args:
      ids: the leading dim is split over the devices; 0 = padding.
    """

    def local(ids: jax.Array) -> jax.Array:
        return _lowest(all_gather(_lowest(ids.reshape(-1), count, key)), count, key)

    chosen = jax.shard_map(local, in_specs=spec("batch"), out_specs=P(), check_vma=False)(ids)
    return jnp.sort(chosen)


def _lowest(ids: Int[Array, "t"], count: int, key: jax.Array) -> Int[Array, "c"]:
    real = (ids > 0) & (ids < NO_KEY)
    hashes = jnp.where(real, hashed_rows(key, ids.astype(jnp.uint32), ()), jnp.uint32(2**32 - 1))
    hashes, ids = jax.lax.sort((hashes, jnp.where(real, ids, NO_KEY)), num_keys=2)
    first = run_starts((hashes, ids))
    places = jnp.where(first & (ids < NO_KEY), jnp.cumsum(first) - 1, count)
    return jnp.full(count, NO_KEY, jnp.int32).at[places].set(ids, mode="drop")
