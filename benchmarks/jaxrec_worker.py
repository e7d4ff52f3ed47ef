"""Ours in `train_throughput.py`: a process that trains, evaluates or multiplies matrices when asked.

    {"do": "train", "tokens": 600000} -> {"tokens": ..., "seconds": ..., "steps": ..., "loss": ..., "gflops": ...}
    {"do": "evaluate", "k": 10}       -> {"users": ..., "seconds": ..., "ndcg@10": ...}
    {"do": "gemm"}                    -> {"numpy": ..., "jax": ...}

It calls what the entries call: the packed pipeline, the train step and the full ranking. A training request
takes one warm-up step, which does not count, as RecTools' does not.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as parquet
from flops import gemm_gflops, training_flops

from jaxrec.config import TrainConfig
from jaxrec.core.batch import Batch
from jaxrec.core.mesh import make_mesh
from jaxrec.data.config import DataConfig
from jaxrec.data.dataset import UNKNOWN_TIME, Histories, PreparedDataset
from jaxrec.data.pipeline import TrainingRows, stream_batches
from jaxrec.embedding.row_optimizer import Adam
from jaxrec.evaluation.user_ranking import UserRanker
from jaxrec.metrics.ranking import mean_metrics
from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.runs import run_of_state, setup_run
from jaxrec.tasks.next_item import NextItem
from jaxrec.training.optimizer import OptimizerConfig
from jaxrec.training.setup import place_batch
from jaxrec.training.step import make_train_step

HISTORIES = 128
HISTORY_LENGTH = 200
DROPOUT_RATE = 0.2  # RecTools' default, at RecTools' places


def get_config(batch_rows: int, seed: int) -> TrainConfig:
    """RecTools' model and optimizer, said in our words."""
    return TrainConfig(
        name="train_throughput",
        data=DataConfig(history_length=HISTORY_LENGTH),
        model=TwoTowerConfig(
            encoder=EncoderConfig(
                embed_dim=64,
                num_layers=2,
                num_heads=1,
                mlp_dim=64,
                max_positions=HISTORY_LENGTH,
                norm_position="pre",
                activation="relu",
                dropout_rate=DROPOUT_RATE,
                attention_dropout_rate=DROPOUT_RATE,
                mlp_dropout_rate=DROPOUT_RATE,
                embedding_dropout_rate=DROPOUT_RATE,
                layer_norm_epsilon=1e-5,
                dtype="float32",
            ),
            item_dim=64,
            projection=False,
            item_bias=False,
        ),
        tasks={"next_item": NextItem()},
        optimizer=OptimizerConfig(learning_rate=1e-3, beta2=0.98),
        row_optimizer=Adam(learning_rate=1e-3, beta2=0.98),
        num_train_steps=1,
        global_batch_size=batch_rows,
        seed=seed,
    )


def load_dataset(path: str) -> PreparedDataset:
    """The ML-1M histories in memory; ids by falling training count, as `prepare` assigns them."""
    table = parquet.read_table(f"{path}/events.parquet", columns=["user_id", "item_id", "order"])
    users, items, order = (table[name].to_numpy() for name in ("user_id", "item_id", "order"))
    place = np.lexsort((order, users))
    users, items = users[place], items[place]
    offsets = np.append(np.flatnonzero(np.diff(users, prepend=users[0] - 1)), len(users)).astype(np.int64)
    _, codes = np.unique(items, return_inverse=True)
    from_end = np.repeat(offsets[1:], np.diff(offsets)) - np.arange(len(items))
    counts = np.bincount(codes[from_end > 2], minlength=codes.max() + 1)
    item_ids = np.empty(len(counts), np.int32)
    item_ids[np.argsort(-counts, kind="stable")] = np.arange(1, len(counts) + 1)
    unknown = np.full(len(items), UNKNOWN_TIME)
    histories = Histories(offsets, item_ids[codes], unknown, np.zeros((len(items), 0), np.int8))
    return PreparedDataset.from_histories(histories, name="ml-1m-sasrec")


def count_targets(batch: Batch) -> int:
    """Real tokens: events whose successor is in the same history."""
    segments = np.asarray(batch.segment_ids)
    return int(((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)).sum())


class Ours:
    """The state and its data, and the three measured requests."""

    def __init__(self, arguments: argparse.Namespace):
        dataset = self.dataset = load_dataset(arguments.data)
        self.rows = TrainingRows.make(dataset, history_length=HISTORY_LENGTH, seed=arguments.seed)
        # As many packed rows as hold RecTools' 128 histories on average.
        batch_rows = round(HISTORIES * self.rows.num_rows / dataset.metadata.num_users)
        self.config = get_config(batch_rows, arguments.seed)
        self.setup = setup_run(self.config, dataset, make_mesh())
        self.next_step = 0
        self.ranker: UserRanker | None = None
        with jax.set_mesh(self.setup.mesh):
            self.state = self.setup.init_state()
            self.train_step = make_train_step(self.setup.step, self.state, self.setup.mesh)

    def train(self, tokens: int) -> dict[str, Any]:
        """One warm-up step, then steps until `tokens` real tokens are done."""
        batches = stream_batches(
            self.rows,
            global_batch_size=self.config.global_batch_size,
            start_step=self.next_step,
            stop_step=np.iinfo(np.int32).max,
        )
        place = functools.partial(place_batch, mesh=self.setup.mesh)
        metrics: dict[str, jax.Array] = {}
        done = steps = 0
        with jax.set_mesh(self.setup.mesh):
            self.state, _ = self.train_step(self.state, place(next(batches)))
            jax.block_until_ready(self.state)
            started, started_cpu = time.perf_counter(), time.process_time()
            while done < tokens:
                batch = next(batches)
                done += count_targets(batch)
                steps += 1
                self.state, metrics = self.train_step(self.state, place(batch))
            jax.block_until_ready(self.state)
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
        self.next_step += steps + 1
        flops = training_flops(
            steps * self.config.global_batch_size * HISTORY_LENGTH,
            HISTORY_LENGTH,
            done,
            dim=self.config.model.item_dim,
            mlp_dim=self.config.model.encoder.mlp_dim,
            num_layers=self.config.model.encoder.num_layers,
            num_items=self.dataset.metadata.num_items,
        )
        return {
            "tokens": done,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "steps": steps,
            "loss": float(metrics["loss"]),
            "gflops": flops / seconds / 1e9,
        }

    def evaluate(self, k: int) -> dict[str, Any]:
        """Rank of the test target and the best `k` of all items that were not seen, for every user.

        The first request compiles on a copy of the state (the step donates its own); the time runs from the
        packing of the histories to the last list on the host.
        """
        with jax.set_mesh(self.setup.mesh):
            if self.ranker is None:
                state = jax.tree.map(jnp.copy, self.state)
                self.ranker = UserRanker(
                    run_of_state(self.config, self.dataset, self.setup, state, self.next_step), top_k=k
                )
                rows = self.ranker.rows("test", rows_per_batch=self.config.evaluation.rows_per_batch)
                next(self.ranker.batches(rows))
            started, started_cpu = time.perf_counter(), time.process_time()
            rows = self.ranker.rows("test", rows_per_batch=self.config.evaluation.rows_per_batch)
            parts = list(self.ranker.batches(rows))
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
        ranks = np.concatenate([part.ranks for part in parts])
        ndcg = mean_metrics(ranks, (10,))["ndcg@10"]
        return {"users": len(ranks), "seconds": seconds, "cpu_seconds": cpu_seconds, "ndcg@10": ndcg}

    def ready(self) -> dict[str, Any]:
        """What was set up."""
        return {
            "ready": True,
            "jax": jax.__version__,
            "rows_per_batch": self.config.global_batch_size,
            "rows": self.rows.num_rows,
            "fill": self.rows.plan.fill_fraction,
        }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Answers requests until standard input ends; everything else goes to standard error."""
    answers, sys.stdout = sys.stdout, sys.stderr
    ours = Ours(parse_arguments())
    print(json.dumps(ours.ready()), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        work = request.pop("do")
        if work == "train":
            answer = ours.train(**request)
        elif work == "evaluate":
            answer = ours.evaluate(**request)
        elif work == "gemm":
            answer = gemm_gflops()
        else:
            raise ValueError(f"do={work!r} is unknown; ask for 'train', 'evaluate' or 'gemm'.")
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
