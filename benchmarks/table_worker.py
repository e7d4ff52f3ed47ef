"""One table that trains when asked, for `table_scaling.py` and `exchange.py`.

    python benchmarks/table_worker.py --rows=1000000 --mode=row_adagrad --devices=1 --ids=uniform
    {"do": "steps", "count": 5} -> {"milliseconds": [...], "peak_bytes": ..., "extra_rounds": ...}

A step looks up 100,000 ids, takes the gradient of a squared error to fixed targets, and updates the rows. Modes:
`row_adagrad`, `lazy_adam` and `sgd` are the engine's; `dense_adam` is optax.adam on the whole table, as a framework
without sparse tables trains it; `gspmd` is the same sparse row-wise Adagrad on global arrays, left to the compiler's
partitioning.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import record

from jaxrec.core.mesh import make_mesh
from jaxrec.core.partition import sharding
from jaxrec.embedding.engine import collect, look_up, update
from jaxrec.embedding.exchange import merge
from jaxrec.embedding.row_optimizer import Adam, RowAdagrad, RowOptimizer, Sgd
from jaxrec.embedding.table import TableSpec, init_table

DIM, IDS, BATCHES = 64, 100_000, 4
OPTIMIZERS: dict[str, RowOptimizer] = {
    "row_adagrad": RowAdagrad(learning_rate=0.1),
    "lazy_adam": Adam(learning_rate=1e-3),
    "sgd": Sgd(learning_rate=0.1),
}
State = tuple[jax.Array, Any]


def draw_ids(kind: str, rows: int, seed: int) -> np.ndarray:
    """IDS ids in [1, rows]: unique, uniform, Zipf(1.2) over a count-sorted vocabulary, or the last sorted."""
    random = np.random.default_rng(seed)
    if kind == "unique":
        return random.choice(rows, IDS, replace=False).astype(np.int32) + 1
    if kind == "uniform":
        return random.integers(1, rows + 1, IDS).astype(np.int32)
    ids = np.minimum(random.zipf(1.2, IDS), rows).astype(np.int32)
    return np.sort(ids) if kind == "sorted" else ids


def engine_step(optimizer: RowOptimizer, per_shard: int) -> Callable[..., tuple[State, jax.Array]]:
    """Look-up, gradient and update by the engine."""

    def step(state: State, ids: jax.Array, targets: jax.Array) -> tuple[State, jax.Array]:
        table, slots = state
        found, route, rounds = look_up({"table": table}, {"ids": ids})
        gradients = jax.grad(row_loss)(found["table"]["ids"], targets)
        sparse = collect(route, {"ids": gradients}, rows_per_shard=per_shard)
        table, slots, more = update(optimizer, table, slots, sparse, rate=optimizer.learning_rate)
        return (table, slots), rounds + more

    return step


def dense_step(optimizer: optax.GradientTransformation) -> Callable[..., tuple[State, jax.Array]]:
    """The table as a parameter like any other."""

    def step(state: State, ids: jax.Array, targets: jax.Array) -> tuple[State, jax.Array]:
        table, slots = state
        gradient = jax.grad(lambda table: row_loss(table[ids], targets))(table)
        updates, slots = optimizer.update(gradient, slots, table)
        return (optax.apply_updates(table, updates), slots), jnp.int32(0)

    return step


def compiler_step(rate: float) -> Callable[..., tuple[State, jax.Array]]:
    """Sparse row-wise Adagrad in global terms; where rows and ids lie is the compiler's business."""

    def step(state: State, ids: jax.Array, targets: jax.Array) -> tuple[State, jax.Array]:
        table, slots = state
        gradients = jax.grad(row_loss)(table[ids], targets)
        owned = merge(ids, gradients, table.shape[0])
        total = slots.at[owned.rows].get(mode="fill", fill_value=0) + jnp.mean(jnp.square(owned.sums), -1)
        moved = -rate * owned.sums / (jnp.sqrt(total) + 1e-8)[:, None]
        keep: Any = {"mode": "drop", "unique_indices": True, "indices_are_sorted": True}
        table = table.at[owned.rows].add(moved, **keep)
        return (table, slots.at[owned.rows].set(total, **keep)), jnp.int32(0)

    return step


def row_loss(rows: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean squared error."""
    return jnp.mean(jnp.square(rows - targets))


def main() -> int:
    """Compiles, says so, and serves requests until its input ends."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--mode", choices=[*OPTIMIZERS, "dense_adam", "gspmd"], required=True)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--ids", choices=["unique", "uniform", "zipf", "sorted"], default="unique")
    parser.add_argument("--platform", choices=["cpu", "gpu"], default="cpu")
    arguments = parser.parse_args()
    if arguments.platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", arguments.devices)
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        spec = TableSpec(num_rows=arguments.rows + 1, dim=DIM, init_scale=0.01)
        rows = sharding(mesh, "row")
        table = init_table(spec, jax.random.key(0), mesh)
        if arguments.mode in OPTIMIZERS:
            optimizer = OPTIMIZERS[arguments.mode]
            slots = jax.jit(optimizer.init, out_shardings=rows)(table)
            step = engine_step(optimizer, spec.rows_per_shard(mesh.size))
        elif arguments.mode == "dense_adam":
            slots = jax.jit(optax.adam(1e-3).init)(table)
            step = dense_step(optax.adam(1e-3))
        else:
            slots = jax.jit(lambda: jnp.zeros(table.shape[0]), out_shardings=rows)()
            step = compiler_step(0.1)
        where = sharding(mesh, "batch")
        batches = [
            jax.device_put(
                (
                    draw_ids(arguments.ids, arguments.rows, seed),
                    np.random.default_rng(seed).normal(size=(IDS, DIM)).astype(np.float32),
                ),
                where,
            )
            for seed in range(BATCHES)
        ]
        keep = jax.tree.map(lambda x: x.sharding, (table, slots))
        compiled = (
            jax.jit(functools.partial(step), donate_argnums=0, out_shardings=(keep, None))
            .lower((table, slots), *batches[0])
            .compile()
        )
        memory = compiled.memory_analysis()
        assert memory is not None, "the compiler says nothing of its memory"
        say(rows=arguments.rows, mode=arguments.mode, devices=mesh.size, ids=arguments.ids,
            temporary_bytes=memory.temp_size_in_bytes)  # fmt: skip
        state, done = (table, slots), 0
        del table, slots
        for line in sys.stdin:
            request = json.loads(line)
            times, rounds = [], 0
            for _ in range(request["count"]):
                begin = time.perf_counter()
                state, extra = compiled(state, *batches[done % BATCHES])
                jax.block_until_ready(state)
                times.append(1e3 * (time.perf_counter() - begin))
                rounds, done = rounds + int(extra), done + 1
            peak = record.peak_bytes()
            say(milliseconds=times, extra_rounds=rounds, peak_bytes=peak)
    return 0


def say(**answer: Any) -> None:
    """One line of JSON to whoever asked."""
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    sys.exit(main())
