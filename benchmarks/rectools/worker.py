"""RecTools' SASRec as a measured peer: a process that trains or recommends when asked, and idles otherwise.

Runs in RecTools' own environment (`requirements.txt` beside this file). It reads one JSON request a line
from standard input and answers one JSON line on standard output:

    {"do": "train", "steps": 48}   ->  {"tokens": ..., "seconds": ..., "steps": ..., "loss": ...}
    {"do": "recommend"}            ->  {"users": ..., "seconds": ...}
    {"do": "recommend", "one_by_one": 20}  ->  {"seconds_each": [...]}

Everything runs through RecTools' public calls (`fit_partial`, `recommend`) at its defaults; the time of a
training step is read by a Lightning callback, so that building the data set, Lightning's start-up and the
first step (warm-up) do not count.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from typing import Any

import pandas as pd
import pytorch_lightning as lightning
import torch
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

HELD_OUT = 2  # protocol A: the last two events of a user are the test and the validation target


class StepClock(lightning.Callback):
    """Counts real tokens and the time between the ends of training steps; the first step is warm-up."""

    def __init__(self) -> None:
        self.tokens = 0
        self.steps = 0
        self.losses: list[float] = []
        self.started = 0.0
        self.ended = 0.0
        self.started_cpu = 0.0
        self.ended_cpu = 0.0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Takes the time; a token is real where it has a target."""
        self.ended, self.ended_cpu = time.perf_counter(), time.process_time()
        self.losses.append(float(outputs["loss"]))
        if self.started == 0.0:
            self.started, self.started_cpu = self.ended, self.ended_cpu
            return
        self.steps += 1
        self.tokens += int((batch["y"] != 0).sum())


def load_events(path: str) -> pd.DataFrame:
    """The events as RecTools wants them: the order becomes a time stamp, each event weighs one."""
    events = pd.read_parquet(f"{path}/events.parquet").sort_values(["user_id", "order"], kind="stable")
    return pd.DataFrame(
        {
            Columns.User: events["user_id"].to_numpy(),
            Columns.Item: events["item_id"].to_numpy(),
            Columns.Weight: 1.0,
            Columns.Datetime: pd.Timestamp("2000-01-01")
            + pd.to_timedelta(events["order"].to_numpy(), unit="s"),
        }
    )


class Peer:
    """The model, its data and the two measured calls."""

    def __init__(self, arguments: argparse.Namespace):
        events = load_events(arguments.data)
        newest_first = events.groupby(Columns.User).cumcount(ascending=False)
        self.train_data = Dataset.construct(events[newest_first >= HELD_OUT].reset_index(drop=True))
        # The test query of a user is everything before the test target, as in our evaluation.
        self.query_data = Dataset.construct(events[newest_first >= HELD_OUT - 1].reset_index(drop=True))
        self.users = events[Columns.User].unique()
        self.steps = 0
        lightning.seed_everything(arguments.seed, verbose=False)
        self.model = SASRecModel(
            n_factors=arguments.embed_dim,
            n_blocks=arguments.num_layers,
            n_heads=arguments.num_heads,
            session_max_len=arguments.history_length,
            dropout_rate=arguments.dropout_rate,
            batch_size=arguments.histories,
            loss="softmax",
            get_trainer_func=self.trainer,
        )

    def trainer(self, **_: Any) -> lightning.Trainer:
        """A quiet trainer of RecTools' default settings."""
        return lightning.Trainer(
            max_epochs=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            logger=False,
            devices=1,
            accelerator="cpu",
        )

    def train(self, steps: int) -> dict[str, Any]:
        """Trains one warm-up step and `steps` measured ones (an epoch's end may come earlier)."""
        clock = StepClock()
        trainer = self.model.fit_trainer if self.model.is_fitted else self.model._trainer
        assert trainer is not None, "a model has a trainer from its construction on"
        trainer.callbacks[:] = [c for c in trainer.callbacks if not isinstance(c, StepClock)] + [clock]
        trainer.limit_train_batches = steps + 1
        self.model.fit_partial(self.train_data, min_epochs=1, max_epochs=1)
        # RecTools copies the trainer, and with it the callback, before the first fit.
        clock = next(c for c in self.model.fit_trainer.callbacks if isinstance(c, StepClock))
        return {
            "tokens": clock.tokens,
            "seconds": clock.ended - clock.started,
            "cpu_seconds": clock.ended_cpu - clock.started_cpu,
            "steps": clock.steps,
            "loss": sum(clock.losses) / len(clock.losses),
        }

    def recommend_one_by_one(self, k: int, num_users: int) -> dict[str, Any]:
        """Top-k for one user a call, the first `num_users` of them."""
        seconds = []
        for user in self.users[:num_users]:
            before = time.perf_counter()
            self.model.recommend([user], self.query_data, k=k, filter_viewed=True)
            seconds.append(time.perf_counter() - before)
        return {"seconds_each": seconds}

    def recommend(self, k: int) -> dict[str, Any]:
        """Top-k of the whole catalogue for every user, viewed items left out."""
        before, before_cpu = time.perf_counter(), time.process_time()
        found = self.model.recommend(self.users, self.query_data, k=k, filter_viewed=True)
        seconds, cpu_seconds = time.perf_counter() - before, time.process_time() - before_cpu
        users = int(found[Columns.User].nunique())
        return {"users": users, "rows": len(found), "seconds": seconds, "cpu_seconds": cpu_seconds}


def parse_arguments() -> argparse.Namespace:
    """The model's shape comes from the benchmark, so that both sides are told the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--embed_dim", type=int, default=64)
    parser.add_argument("--num_layers", type=int, default=2)
    parser.add_argument("--num_heads", type=int, default=1)
    parser.add_argument("--history_length", type=int, default=200)
    parser.add_argument("--histories", type=int, default=128)
    parser.add_argument("--dropout_rate", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Answers requests until standard input ends; everything else goes to standard error."""
    answers, sys.stdout = sys.stdout, sys.stderr
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    peer = Peer(parse_arguments())
    ready = {"ready": True, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "train":
            answer = peer.train(request["steps"])
        elif request["do"] == "recommend" and "one_by_one" in request:
            answer = peer.recommend_one_by_one(request["k"], request["one_by_one"])
        elif request["do"] == "recommend":
            answer = peer.recommend(request["k"])
        else:
            raise ValueError(f"do={request['do']!r} is unknown; ask for 'train' or 'recommend'.")
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
