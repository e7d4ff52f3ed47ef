"""Floating point operations, by formula, and what this machine's matrix product reaches.

Counted is what the model needs: two operations per multiply-add of every matrix product, the backward pass
twice the forward one. Nothing recomputed, no normalisation, no softmax counts. B = rows, L = positions of a
row, D = width, F = width of the MLP, V = items, T = targets.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

GEMM_SIZE = 2048
GEMM_REPEATS = 7


def encoder_flops(positions: int, length: int, *, dim: int, mlp_dim: int, num_layers: int) -> float:
    """Forward operations of the encoder: four D x D projections, the MLP, scores and values over L keys."""
    per_position = 8 * dim * dim + 4 * dim * mlp_dim + 4 * length * dim
    return float(positions) * num_layers * per_position


def training_flops(
    positions: int, length: int, targets: int, *, dim: int, mlp_dim: int, num_layers: int, num_items: int
) -> float:
    """Operations of training on `positions` that hold `targets` predicted over `num_items`."""
    softmax = 2.0 * targets * dim * num_items
    encoder = encoder_flops(positions, length, dim=dim, mlp_dim=mlp_dim, num_layers=num_layers)
    return 3 * (encoder + softmax)


def gemm_gflops() -> dict[str, float]:
    """Median GFLOP/s of a square float32 matrix product, by NumPy and by JAX."""
    draw = np.random.default_rng(0)
    a, b = (draw.standard_normal((GEMM_SIZE, GEMM_SIZE)).astype(np.float32) for _ in range(2))
    on_device = jnp.asarray(a), jnp.asarray(b)
    product = jax.jit(jnp.matmul)
    return {
        "numpy": _median_gflops(lambda: a @ b),
        "jax": _median_gflops(lambda: product(*on_device).block_until_ready()),
    }


def _median_gflops(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(GEMM_REPEATS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return 2 * GEMM_SIZE**3 / statistics.median(seconds) / 1e9
