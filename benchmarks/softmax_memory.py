"""What a full softmax over a million items needs: 8,192 tokens, 64 dims, value and both gradients, one device.

Compiled temporaries and outputs, the item gradient included; table and queries are arguments. The dense logits alone
would take 33 GB. Then one step runs, for its time and the process' peak. Docs: docs/embedding.md.

    python benchmarks/softmax_memory.py    # about a minute
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import plots
import record

from jaxrec.core.mesh import make_mesh
from jaxrec.losses.softmax import full_softmax


def arguments_of(items: int, tokens: int, dim: int) -> tuple[jax.Array, ...]:
    """Queries, item vectors, biases and targets."""
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        jax.random.normal(keys[0], (tokens, dim)),
        0.1 * jax.random.normal(keys[1], (items, dim)),
        jnp.zeros(items),
        jax.random.randint(keys[2], (tokens,), 1, items),
    )


def compiled_for(batch: tuple[Any, ...]) -> Any:
    """The value and the gradients of queries and item vectors; `batch` may be shapes alone."""
    (tokens, _), (items, _) = batch[0].shape, batch[1].shape

    def loss(queries: jax.Array, vectors: jax.Array, bias: jax.Array, targets: jax.Array) -> jax.Array:
        return full_softmax(queries, targets, jnp.ones(tokens), vectors, bias, num_rows=items)

    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*batch).compile()


def needed_bytes(compiled: Any) -> int:
    """Temporaries and outputs."""
    memory = compiled.memory_analysis()
    assert memory is not None, "the compiler says nothing of its memory"
    return int(memory.temp_size_in_bytes + memory.output_size_in_bytes)


def main() -> int:
    """Compiles, measures, runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=64)
    arguments = parser.parse_args()
    items, tokens, dim = arguments.items, arguments.tokens, arguments.dim
    jax.config.update("jax_platforms", "cpu")

    with jax.set_mesh(make_mesh()):
        batch = arguments_of(items, tokens, dim)
        compiled = compiled_for(batch)
        before = record.peak_bytes()
        begin = time.perf_counter()
        value, _ = jax.block_until_ready(compiled(*batch))
        seconds = time.perf_counter() - begin
        sizes = {
            size: needed_bytes(compiled_for(jax.eval_shape(lambda n=size: arguments_of(n, tokens, dim))))
            for size in (items // 100, items // 10, items)
        }
    memory = compiled.memory_analysis()
    figures = {
        "items": items,
        "tokens": tokens,
        "dim": dim,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_and_output_bytes_by_items": sizes,
        "dense_logits_bytes": 4 * items * tokens,
        "loss_per_token": float(value) / tokens,
        "seconds": seconds,
        "gflops_per_second": 4 * 2 * items * tokens * dim / seconds / 1e9,
        "peak_bytes_before_and_after": [before, record.peak_bytes()],
    }
    plots.draw_lines(
        record.RESULTS / "softmax_memory.svg",
        f"Full softmax of {tokens:,} tokens, {dim} dims, with both gradients",
        {
            "dense logits alone": [(size, 4 * size * tokens / 2**20) for size in sizes],
            "ours: temporaries and outputs": [(size, found / 2**20) for size, found in sizes.items()],
            "the item gradient, which is an output": [(size, 4 * size * dim / 2**20) for size in sizes],
        },
        xlabel="items",
        ylabel="MiB",
        xscale="log",
        yscale="log",
    )
    megabytes = needed_bytes(compiled) / 2**20
    bars = [record.Bar(name="temporaries and outputs, MiB", value=megabytes, limit=512, at_most=True)]
    return record.finish("softmax_memory", figures, bars)


if __name__ == "__main__":
    sys.exit(main())
