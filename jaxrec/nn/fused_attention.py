"""Attention by the kernels that JAX brings for TPUs and GPUs: no scores in memory at all.

They read segment ids and a causal flag, take whole rows (every column a query), and drop no weights. A kernel is
opaque to the partitioner, so each device is given its rows, or its heads of them, by `shard_map`.
B = rows, H = heads, L = positions, K = width of a head.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxrec.core import partition
from jaxrec.core.mesh import DATA, MODEL, platform
from jaxrec.core.partition import Layout

LANES = 128  # both kernels take lengths in multiples of it
NOBODY = -1  # the segment of what fills a row up: no position of a row bears it


def attend_fused(
    query: Float[Array, "b h l k"],
    key: Float[Array, "b h l k"],
    value: Float[Array, "b h l k"],
    segment_ids: Int[Array, "b l"],
    *,
    causal: bool,
    layout: Layout = "replicated",
    kernel: Callable[..., jax.Array] | None = None,
) -> Float[Array, "b h l k"]:
    """`attend` by the kernel of the platform.

    Args:
      layout: of the encoder's parameters; says how the mesh shares rows and heads.
      kernel: `splash` or `flash`; None = the platform's.

    Raises:
      ValueError: the platform has none.
    """
    if kernel is None:
        kernel = {"tpu": splash, "gpu": flash}.get(platform())
    if kernel is None:
        raise ValueError(
            f"attention='fused' needs a TPU or a GPU, and this mesh is of {platform()} devices; use 'auto'."
        )
    length = query.shape[2]
    spare = -length % LANES
    query, key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, spare), (0, 0))) for x in (query, key, value))
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, spare)), constant_values=NOBODY)
    run: Callable[..., jax.Array] = functools.partial(kernel, causal=causal)
    if not jax.sharding.get_abstract_mesh().empty:
        rows = PartitionSpec(DATA) if layout == "tensor" else partition.spec("batch")
        heads = PartitionSpec(DATA, MODEL) if layout == "tensor" else rows
        specs = (heads, heads, heads, rows)
        run = jax.shard_map(run, in_specs=specs, out_specs=heads, check_vma=False)
    return run(query * (1.0 / math.sqrt(query.shape[-1])), key, value, segment_ids)[:, :, :length]


def splash(
    query: Float[Array, "b h l k"],
    key: Float[Array, "b h l k"],
    value: Float[Array, "b h l k"],
    segment_ids: Int[Array, "b l"],
    *,
    causal: bool,
    interpret: bool = False,
) -> Float[Array, "b h l k"]:
    """JAX's splash attention for TPUs: tiles in everybody's future are never visited."""
    # Imported where it is used: the kernels' modules take their time, and most runs need neither.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    num_heads, length = query.shape[1:3]
    block = next(size for size in (512, 256, 128) if length % size == 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    square = (length, length)
    mask = splash_attention_mask.CausalMask(square) if causal else splash_attention_mask.FullMask(square)
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * num_heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    segments = splash_attention_kernel.SegmentIds(segment_ids, segment_ids)
    return jax.vmap(kernel)(query, key, value, segments)


def flash(
    query: Float[Array, "b h l k"],
    key: Float[Array, "b h l k"],
    value: Float[Array, "b h l k"],
    segment_ids: Int[Array, "b l"],
    *,
    causal: bool,
    interpret: bool = False,
) -> Float[Array, "b h l k"]:
    """JAX's flash attention for GPUs, in Triton. cuDNN's takes no segments through JAX's interface but as a bias."""
    from jax.experimental.pallas.ops.gpu.attention import mha

    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    return jnp.swapaxes(mha(query, key, value, segment_ids, causal=causal, interpret=interpret), 1, 2)
