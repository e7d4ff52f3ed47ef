"""Floating-point operations of the model by formula, and the peak that they are held against.

One multiply-add counts as two. A training step is taken as three forward passes (one forward, two backward).
"""

import time

import jax
import jax.numpy as jnp

from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.base import Task
from jaxrec.tasks.ranking import RankingTask

# Dense bfloat16 peaks in FLOP/s of one device. Sources: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e), NVIDIA's
# datasheets (A100, H100, H200).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def encoder_flops_per_row(config: EncoderConfig, length: int) -> float:
    """Forward operations of one packed row of `length` positions."""
    width = config.embed_dim
    kernels = 4 * width * width + 2 * width * config.mlp_dim
    attention = 2 * length * width
    return config.num_layers * length * 2.0 * (kernels + attention)


def step_flops(
    model: TwoTowerConfig, tasks: dict[str, Task], num_items: int, batch_rows: int, length: int
) -> float:
    """Operations of one training step over `batch_rows` rows; each task says how many queries it scores."""
    modes = {task.query_mode if isinstance(task, RankingTask) else "causal" for task in tasks.values()}
    encoder = encoder_flops_per_row(model.encoder, length) * batch_rows * len(modes)
    scored = sum(task.scored_pairs(batch_rows, length, num_items) for task in tasks.values())
    return 3.0 * (encoder + 2.0 * model.item_dim * scored)


def peak_flops(kind: str) -> float:
    """Peak of one device: from the table, else (CPU) the fastest of a few float32 matrix products, all cores."""
    for name in sorted(PEAK_FLOPS, key=len, reverse=True):
        if kind.startswith(name):
            return PEAK_FLOPS[name]
    size = 1024
    square = jax.jit(lambda x: x @ x)
    x = jnp.ones((size, size), jnp.float32)
    square(x).block_until_ready()
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        square(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds)
