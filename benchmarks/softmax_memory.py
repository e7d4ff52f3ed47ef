"""What a full softmax over a million items needs: 8,192 tokens, 64 dims, value and both gradients, one device.

Compiled temporaries and outputs, the item gradient included; table and queries are arguments. The dense logits alone
would take 33 GB. Then one step runs, for its time and the process' peak. Docs: docs/embedding.md.

    python benchmarks/softmax_memory.py    # about a minute
"""

from __future__ import annotations

import argparse
import sys
import time

import jax
import jax.numpy as jnp
import record

from jaxrec.core.mesh import make_mesh
from jaxrec.losses.softmax import full_softmax


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

    def loss(queries: jax.Array, vectors: jax.Array, bias: jax.Array, targets: jax.Array) -> jax.Array:
        return full_softmax(queries, targets, jnp.ones(tokens), vectors, bias, num_rows=items)

    def value_and_gradients(queries: jax.Array, vectors: jax.Array, bias: jax.Array, targets: jax.Array):  # type: ignore[no-untyped-def]
        return jax.value_and_grad(loss, (0, 1))(queries, vectors, bias, targets)

    with jax.set_mesh(make_mesh()):
        keys = jax.random.split(jax.random.key(0), 3)
        batch = (
            jax.random.normal(keys[0], (tokens, dim)),
            0.1 * jax.random.normal(keys[1], (items, dim)),
            jnp.zeros(items),
            jax.random.randint(keys[2], (tokens,), 1, items),
        )
        compiled = jax.jit(value_and_gradients).lower(*batch).compile()
        memory = compiled.memory_analysis()
        assert memory is not None, "the compiler says nothing of its memory"
        before = record.peak_bytes()
        begin = time.perf_counter()
        value, _ = jax.block_until_ready(compiled(*batch))
        seconds = time.perf_counter() - begin
    figures = {
        "items": items,
        "tokens": tokens,
        "dim": dim,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "dense_logits_bytes": 4 * items * tokens,
        "loss_per_token": float(value) / tokens,
        "seconds": seconds,
        "gflops_per_second": 4 * 2 * items * tokens * dim / seconds / 1e9,
        "peak_bytes_before_and_after": [before, record.peak_bytes()],
    }
    megabytes = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20
    bars = [record.Bar(name="temporaries and outputs, MiB", value=megabytes, limit=512, at_most=True)]
    return record.finish("softmax_memory", figures, bars)


if __name__ == "__main__":
    sys.exit(main())
