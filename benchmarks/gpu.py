"""One GPU: are its numbers a CPU's, is a restart bit-equal, does a table's size cost anything, and how fast is it?

    python benchmarks/gpu.py        # above five minutes, 40 GB of GPU memory; an error where there is no GPU

- The attention kernel against plain attention: output and gradients, and the time of both passes.
- `configs/debug.py` on the GPU and on the CPU: the losses of 30 steps.
- The same twice, and once killed and resumed: with XLA's defaults, and with its deterministic scatters.
- A row-wise Adagrad step of 100,000 ids on tables of 1 and of 100 million rows, in turns.
- Events a second: `configs/ml1m_sasrec.py`, and an encoder of the size of BERT-base in bfloat16 by each attention.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share the GPU

import jax
import jax.numpy as jnp
import numpy as np
import record
import training_runs
import turns
from kill_resume import CONFIG, OVERRIDES, differences
from worker_process import Worker, start_table

from jaxrec.core.mesh import DETERMINISTIC
from jaxrec.nn.attention import attend
from jaxrec.nn.fused_attention import attend_fused

ROWS = (1_000_000, 100_000_000)
KILLED_AT = 14  # of the steps of kill_resume.py
LENGTHS = (200, 512, 2048)
POSITIONS, HEADS, WIDTH = 32_768, 12, 64
BASE_SIZE = (
    "model.encoder.embed_dim=768",
    "model.encoder.num_layers=12",
    "model.encoder.num_heads=12",
    "model.encoder.mlp_dim=3072",
    "model.encoder.dtype=bfloat16",
    "model.encoder.norm_position=pre",
    "model.encoder.attention_dropout_rate=0",
    "model.encoder.scan_layers=True",  # compiled once, not twelve times
    "model.item_dim=768",
)
SPEEDS: dict[str, tuple[str, ...]] = {
    "ml1m_sasrec": ("num_train_steps=400",),
    **{
        f"12 x 768, bfloat16, rows of {length}, {path}": (
            *BASE_SIZE,
            f"data.history_length={length}",
            f"model.encoder.max_positions={length}",
            f"model.encoder.attention={path}",
            f"global_batch_size={POSITIONS // length}",
            "num_train_steps=60",
        )
        for length, path in (
            (256, "full"),
            (256, "fused"),
            (1024, "full"),
            (1024, "chunked"),
            (1024, "fused"),
        )
    },
}


def attention() -> tuple[dict[str, Any], list[record.Bar]]:
    """The kernel against plain attention: largest error over the largest value, and milliseconds of both passes."""
    figures: dict[str, Any] = {}
    worst = 0.0
    for length in LENGTHS:
        rows = POSITIONS // length
        keys = jax.random.split(jax.random.key(length), 4)
        shape = (rows, HEADS, length, WIDTH)
        query, key, value, weight = (jax.random.normal(k, shape, jnp.bfloat16) for k in keys)
        # Three histories of unequal lengths a row, and spare columns.
        ends = np.sort(np.random.default_rng(length).integers(1, length, (rows, 3)), axis=1)
        segments = jnp.asarray((np.arange(length)[None, :, None] >= ends[:, None, :]).sum(-1) + 1)
        segments = jnp.where(segments == 4, 0, segments).astype(jnp.int32)
        columns = jnp.arange(length)
        seen = (columns[:, None] >= columns[None, :]) & (segments[:, :, None] == segments[:, None, :])
        paths: dict[str, Callable[..., jax.Array]] = {
            "full": lambda q, k, v, seen=seen: attend(q, k, v, seen),
            "fused": functools.partial(attend_fused, segment_ids=segments, causal=True),
        }
        real = (segments > 0)[:, None, :, None]

        def loss(q: Any, k: Any, v: Any, *, run: Any, real: Any = real, weight: Any = weight) -> Any:
            out = jnp.where(real, run(q, k, v), 0)
            return jnp.sum((out * weight).astype(jnp.float32)), out

        found, milliseconds = {}, {}
        for name, run in paths.items():
            both = jax.jit(jax.grad(functools.partial(loss, run=run), argnums=(0, 1, 2), has_aux=True))
            found[name] = jax.block_until_ready(both(query, key, value))
            times = []
            for _ in range(10):
                started = time.perf_counter()
                jax.block_until_ready(both(query, key, value))
                times.append(1e3 * (time.perf_counter() - started))
            milliseconds[name] = statistics.median(times)
        errors = [
            float(jnp.max(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32))) / jnp.max(jnp.abs(a)))
            for a, b in zip(jax.tree.leaves(found["full"]), jax.tree.leaves(found["fused"]), strict=True)
        ]
        worst = max(worst, *errors)
        figures[f"{rows} rows of {length}"] = {"errors": errors, "milliseconds": milliseconds}
        print(f"attention, {rows} rows of {length}: error {max(errors):.4f}, ms {milliseconds}", flush=True)
    return figures, [
        record.Bar(name="attention kernel: error in bfloat16", value=worst, limit=0.02, at_most=True)
    ]


def small_run(base: Path, name: str) -> training_runs.Run:
    """A run of kill_resume.py."""
    return training_runs.Run(config=CONFIG, workdir=base / name, overrides=OVERRIDES)


def killed(run: training_runs.Run, environment: dict[str, str]) -> None:
    """Kills a run once a checkpoint of its middle is written, and resumes it."""
    process = run.start(environment=environment)
    while process.poll() is None and not (run.workdir / "checkpoints" / str(KILLED_AT)).exists():
        time.sleep(0.01)
    assert process.poll() is None, "the run ended before it could be killed"
    process.kill()
    process.wait()
    run.finish(environment=environment)


def numbers(base: Path) -> tuple[dict[str, Any], list[record.Bar]]:
    """Losses of both platforms, and whether repeated and resumed runs are bit-equal."""
    small_run(base, "prepared").finish(environment={"JAX_PLATFORMS": "cpu"})
    on_cpu = training_runs.losses(base / "prepared")
    kinds = {"defaults": {}, "deterministic": {"XLA_FLAGS": DETERMINISTIC}}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = []
        for kind, environment in kinds.items():
            for name in ("once", "again", "killed"):
                run = small_run(base, f"{kind}-{name}")
                shutil.copytree(base / "prepared" / "data", run.workdir / "data")
                one = functools.partial(run.finish, environment=environment)
                waiting.append(
                    pool.submit(functools.partial(killed, run, environment) if name == "killed" else one)
                )
        for each in waiting:
            each.result()
    figures: dict[str, Any] = {}
    for kind in kinds:
        once, again, resumed = (small_run(base, f"{kind}-{name}") for name in ("once", "again", "killed"))
        figures[kind] = {
            "a second run differs in": differences(once, again),
            "a killed and resumed run differs in": differences(once, resumed),
        }
        for name, places in figures[kind].items():
            print(f"{kind}: {name} {len(places)} places", flush=True)
    on_gpu = training_runs.losses(base / "defaults-once")
    error = max(abs(on_gpu[step] / on_cpu[step] - 1) for step in on_cpu)
    print(f"losses: at most {error:.2e} from the CPU's, relative", flush=True)
    figures["losses"] = {"cpu": on_cpu, "gpu": on_gpu, "largest relative difference": error}
    unequal = sum(len(places) for places in figures["deterministic"].values())
    return figures, [
        record.Bar(name="losses of 30 steps against a CPU, relative", value=error, limit=0.01, at_most=True),
        record.Bar(
            name="deterministic: differences of repeated and resumed runs",
            value=unequal,
            limit=0,
            at_most=True,
        ),
    ]


def start_rows(rows: int) -> Worker:
    """A table on the GPU."""
    return start_table(["--mode=row_adagrad", f"--rows={rows}", "--ids=uniform", "--platform=gpu"])


def tables() -> tuple[dict[str, Any], list[record.Bar]]:
    """A hundred times the rows against one."""
    found = turns.run({"100M rows over 1M": ROWS}, start_rows, pairs=7, steps=20)
    ratio = found["100M rows over 1M"]["ratio"]
    return found, [
        record.Bar(name="100M rows over 1M, ratio of a step", value=ratio, limit=1.5, at_most=True)
    ]


def speeds(base: Path, data: Path) -> dict[str, Any]:
    """Events a second and the share of the peak, each the median over the reports after the first."""
    figures: dict[str, dict[str, Any]] = {}
    for name, overrides in SPEEDS.items():
        run = training_runs.Run(
            config="configs/ml1m_sasrec.py",
            workdir=base / "_".join(name.replace(",", "").split()),
            overrides=(*overrides, f"data.path={data}", "evaluation.every_steps=0", "log_every_steps=10"),
        )
        run.finish()
        reports = [line for line in training_runs.metrics(run.workdir) if "events_per_second" in line][1:]
        figures[name] = {
            field: statistics.median(line[field] for line in reports)
            for field in (
                "events_per_second",
                "steps_per_second",
                "flops_utilisation",
                "gflops_per_second",
                "input_wait_share",
                "peak_memory_bytes",
            )
            if field in reports[0]
        }
        figures[name]["last_loss"] = reports[-1]["loss"]
        print(f"{name}: {figures[name]}", flush=True)
    return figures


def main() -> int:
    """All of it; the timed parts have the GPU for themselves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = Path(os.environ.get("JAXREC_DATA") or record.SHARED_DATA) / "ml-1m-sasrec"
    parser.add_argument("--data", type=Path, default=data, help=f"ML-1M (default: {data})")
    given = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error(
            f"JAX found no GPU here but {jax.devices()}; install jax[cuda] and see what JAX_PLATFORMS says."
        )
    device = jax.devices()[0]
    figures: dict[str, Any] = {"device": device.device_kind}
    bars: list[record.Bar] = []
    base = Path(tempfile.mkdtemp(prefix="gpu-"))
    parts: dict[str, Callable[[], tuple[dict[str, Any], list[record.Bar]]]] = {
        "numbers": functools.partial(numbers, base),
        "attention": attention,
        "tables": tables,
    }
    for name, part in parts.items():
        figures[name], of_part = part()
        bars += of_part
    figures["speeds"] = speeds(base, given.data.resolve())
    shutil.rmtree(base)
    return record.finish("gpu", figures, bars)


if __name__ == "__main__":
    sys.exit(main())
