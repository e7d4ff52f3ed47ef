"""The small dense model of equal bytes: what a compressed model must beat to be worth its codes."""

from collections.abc import Mapping

import jax
import numpy as np

from jaxrec.compression.parameters import abstract_parameters, serving_setup
from jaxrec.config import TrainConfig, apply_overrides
from jaxrec.data.dataset import PreparedDataset

FLOAT_BYTES = 4


def dense_bytes(config: TrainConfig, dataset: PreparedDataset, mesh: jax.sharding.Mesh) -> int:
    """Bytes of a run's arrays in float32 (and int32, which are as wide)."""
    with jax.set_mesh(mesh):
        shapes = abstract_parameters(serving_setup(config, dataset, mesh))
    return FLOAT_BYTES * sum(int(np.prod(shape)) for shape in shapes.values())


def equal_bytes_overrides(
    config: TrainConfig, dataset: PreparedDataset, mesh: jax.sharding.Mesh, num_bytes: int
) -> dict[str, int] | None:
    """The widths of the widest model of the run's kind that weighs at most `num_bytes`; None = none is narrow enough.

    All widths shrink alike; layers and heads stay, where the width holds as many heads.
    """
    encoder = config.model.encoder
    unit = 2 * encoder.num_heads  # an even head, for rotary positions

    def narrower(count: int) -> dict[str, int]:
        share = count * unit / encoder.embed_dim
        item_dim = (
            count * unit if not config.model.projection else max(1, round(config.model.item_dim * share))
        )
        mlp_dim = max(
            encoder.num_heads, round(encoder.mlp_dim * share / encoder.num_heads) * encoder.num_heads
        )
        return {
            "model.encoder.embed_dim": count * unit,
            "model.encoder.mlp_dim": mlp_dim,
            "model.item_dim": item_dim,
        }

    low, high = 0, max(1, encoder.embed_dim // unit)
    while low < high:
        middle = (low + high + 1) // 2
        if dense_bytes(with_widths(config, narrower(middle)), dataset, mesh) <= num_bytes:
            low = middle
        else:
            high = middle - 1
    return narrower(low) if low else None


def with_widths(config: TrainConfig, overrides: Mapping[str, int]) -> TrainConfig:
    """The config with these fields, as a command line gives them."""
    return apply_overrides(config, [f"--config.{name}={value}" for name, value in overrides.items()])
