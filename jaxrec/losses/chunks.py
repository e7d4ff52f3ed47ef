"""Losses over many targets and shared negatives, in chunks that stay on the targets' own devices.

T = targets.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxrec.core.partition import spec
from jaxrec.core.placement import num_shards

Arrays = tuple[jax.Array, ...]
# Logits of one chunk on one device.
CHUNK_LOGITS = 1 << 24


def sum_over_targets(
    loss: Callable[[Arrays, Arrays], jax.Array],
    targets: Arrays,
    negatives: Arrays,
    chunk_targets: int,
) -> jax.Array:
    """Sums `loss(targets, negatives)` over the targets, each device over its own, a chunk at a time.

    Left to the compiler's partitioning, the chunks of targets that lie over many devices are gathered whole on each.

    Args:
      loss: the sum over some targets; those of weight 0 must add nothing.
      targets: arrays `[T, ...]`; filled up with zeros where T does not divide, so one of them must be a weight.
      negatives: what every target meets.
      chunk_targets: of a chunk on one device; more go through in chunks, each computed again in the backward pass.
    """
    chunk_targets = max(1, chunk_targets)
    if num_shards() == 1:
        return _sum_over_chunks(loss, targets, negatives, chunk_targets)
    batch = spec("batch")
    local_sums = jax.shard_map(
        lambda own, shared: _sum_over_chunks(loss, own, shared, chunk_targets)[None],
        in_specs=(batch, PartitionSpec()),
        out_specs=batch,
        check_vma=False,
    )(_padded(targets, num_shards()), negatives)
    return jnp.sum(local_sums)


def _sum_over_chunks(
    loss: Callable[[Arrays, Arrays], jax.Array],
    targets: Arrays,
    negatives: Arrays,
    chunk_targets: int,
) -> jax.Array:
    num_chunks = -(-len(targets[0]) // chunk_targets)
    if num_chunks <= 1:
        return loss(targets, negatives)
    parts = tuple(x.reshape(num_chunks, -1, *x.shape[1:]) for x in _padded(targets, num_chunks))

    def add(total: jax.Array, part: Arrays) -> tuple[jax.Array, None]:
        return total + jax.checkpoint(loss)(part, negatives), None

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), parts)[0]


def _padded(targets: Arrays, multiple: int) -> Arrays:
    """Fills the targets up to a multiple of a number, with weight 0."""
    missing = -len(targets[0]) % multiple
    return tuple(jnp.pad(x, ((0, missing), *((0, 0) for _ in x.shape[1:]))) for x in targets)
