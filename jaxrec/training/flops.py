"""Floating-point operations of the model by formula, and the peak that they are held against.

One multiply-add counts as two. A training step is taken as three forward passes (one forward, two backward).
"""

import time

import jax
import jax.numpy as jnp

from jaxrec.core.chips import chip_of
from jaxrec.losses import sampled, softmax
from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.base import Task


def keys_of_query(config: EncoderConfig, length: int) -> float:
    """Keys that each query of a row is scored against, masked ones included."""
    if config.compression is None or length <= config.compression.recent:
        return length
    recent, group = config.compression.recent, config.compression.group
    return 2 * (recent + group - 1) + length // group


def encoder_flops_per_row(config: EncoderConfig, length: int) -> float:
    """Forward operations of one packed row of `length` positions."""
    width, inner = config.embed_dim, config.mlp_dim
    if config.block == "hstu":
        kernels = 2 * width * width + 3 * width * inner
        attention = float(length * (width + inner))
    else:
        kernels = 4 * width * width + (3 if config.mlp == "gated" else 2) * width * inner
        attention = 2 * keys_of_query(config, length) * width
    return config.num_layers * length * 2.0 * (kernels + attention)


def step_flops(
    model: TwoTowerConfig,
    tasks: dict[str, Task],
    num_items: int,
    num_behaviours: int,
    batch_rows: int,
    length: int,
    num_text_tokens: int = 0,
) -> float:
    """Operations of one training step over `batch_rows` rows; each task says how many queries it scores.

    The heads judge every event once, for all tasks that ask them. Of the text of items it counts what is encoded with a
    gradient; the refresh of all vectors comes on top, every `refresh_every_steps`, and so do the few words of text
    queries.
    """
    modes = {name for task in tasks.values() for name in task.encodings}
    encoder = encoder_flops_per_row(model.encoder, length) * batch_rows * len(modes)
    scored = sum(task.scored_pairs(batch_rows, length, num_items) for task in tasks.values())
    if model.text is not None:
        texts = min(model.text.trained_items, num_items)
        passes = [task.masked_tokens(num_text_tokens) for task in tasks.values() if task.masked_tokens(1)]
        encoder += encoder_flops_per_row(model.text.encoder, num_text_tokens) * texts * (1 + len(passes))
        encoder += 2.0 * model.text.encoder.embed_dim * model.text.encoder.vocab_size * texts * sum(passes)
    outputs = [num_behaviours] * any(task.needs_behaviour_head for task in tasks.values())
    outputs += [1] * any(task.needs_value_head for task in tasks.values())
    head = 2.0 * batch_rows * length * sum(model.head.multiply_adds(model.item_dim, num) for num in outputs)
    return 3.0 * (encoder + 2.0 * model.item_dim * scored + head)


def tower_map_flops(model: TwoTowerConfig, batch_rows: int, length: int) -> float:
    """Operations of a step in the maps between rows, encoder and queries, which `step_flops` leaves out as small."""
    width = model.encoder.embed_dim
    inner = (model.item_dim if model.item_dim != width else 0) + model.user_dim
    outer = model.item_dim if model.projection else 0
    return 3.0 * 2.0 * batch_rows * length * width * (inner + outer)


def recomputed_flops(
    model: TwoTowerConfig, tasks: dict[str, Task], num_items: int, batch_rows: int, length: int, devices: int
) -> float:
    """Operations that a step does twice to save memory, beyond `step_flops`.

    A `remat` block computes everything again but its last product, whose result nobody needs. The logits of a softmax
    are computed again where they go through in chunks.
    """
    config = model.encoder
    again = 0.0
    if config.remat:
        modes = {name for task in tasks.values() for name in task.encodings}
        last = 2.0 * config.num_layers * length * config.embed_dim * config.mlp_dim
        again = len(modes) * batch_rows * (encoder_flops_per_row(config, length) - last)
    for task in tasks.values():
        pairs = task.scored_pairs(batch_rows, length, num_items)
        if pairs / devices > (softmax.CHUNK_LOGITS if task.needs_catalogue else sampled.CHUNK_LOGITS):
            again += 2.0 * model.item_dim * pairs
    return again


def peak_flops(kind: str) -> float:
    """Peak of one device: from the table, else (CPU) the fastest of a few float32 matrix products, all cores."""
    chip = chip_of(kind)
    if chip is not None:
        return chip.device_flops
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
