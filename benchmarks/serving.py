"""How fast the server answers: one client, sixteen, a million items, and RecTools beside it.

    python benchmarks/serving.py                       # about 12 minutes on 2 cores
    python benchmarks/serving.py --workdir=runs/ml1m   # with a trained model; speed does not depend on it

`configs/ml1m.py` is trained a few steps, exported with histories, and served by `python -m jaxrec.serve` in a process
of its own; `serving_load.py` asks from a second one. Every request is another user's with the whole history that the
model reads, three items to leave out, a category to leave out and a cap on categories, seen items left out: nothing is
cached between requests. RecTools' SASRec recommends to one user at a time within its own process, in turns with one
client of ours.

The index of a million items is held against the exact products on a table that was trained: implicit matrix
factorisation of events drawn around a thousand tastes; queries are its users.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import record
import scipy.sparse as sparse
import served
import training_runs
from worker_process import start_rectools

from jaxrec.export.catalogue import HISTORIES_FILE, ITEMS_FILE
from jaxrec.export.item_index import ItemIndex
from jaxrec.serving.candidates import best

CONFIG, DATA = "configs/ml1m.py", "ml-1m-sasrec"
P50_ONE, P99_ONE = 5.0, 12.0  # milliseconds
CLIENTS, PER_SECOND, P99_MANY = 16, 400.0, 80.0
OVER_RECTOOLS = 5.0
RECALL = 0.95
TURNS, USERS_A_TURN = 5, 20
DIM, TASTES, USERS, EVENTS_A_USER = 64, 1_000, 200_000, 50


def main() -> int:
    """Measures, and holds it against the bars."""
    given = parse_arguments()
    speeds = [machine_speed()]
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        version = export(given, place)
        bodies = write_requests(version, place / "requests.jsonl", given.seed)
        with served.Server(version, str(place / "state.db"), place / "serve.log") as server:
            server.wait_ready()
            load(server, bodies, clients=CLIENTS, seconds=5)  # what the first requests do once
            one = load(server, bodies, clients=1, seconds=given.seconds)
            many = load(server, bodies, clients=CLIENTS, seconds=given.seconds)
            turns = beside_rectools(given, server, bodies) if given.turns else []
    speeds.append(machine_speed())
    million = index_of(given.items, given.seed)
    bars = [
        record.Bar(name="one client, p50 ms", value=one["p50_ms"], limit=P50_ONE, at_most=True),
        record.Bar(name="one client, p99 ms", value=one["p99_ms"], limit=P99_ONE, at_most=True),
        record.Bar(
            name=f"{CLIENTS} clients, requests/s", value=many["requests_per_second"], limit=PER_SECOND
        ),
        record.Bar(name=f"{CLIENTS} clients, p99 ms", value=many["p99_ms"], limit=P99_MANY, at_most=True),
        record.Bar(name="answers that are no lists", value=failed(one) + failed(many), limit=0, at_most=True),
        record.Bar(
            name=f"recall@100 of the index, {given.items:,} items", value=million["recall"], limit=RECALL
        ),
    ]
    if turns:
        ratio = statistics.median(turn["ratio"] for turn in turns)
        bars.append(
            record.Bar(name="times RecTools' recommend for one user", value=ratio, limit=OVER_RECTOOLS)
        )
    figures = {
        "speed_before_and_after": speeds,
        "one_client": one,
        f"{CLIENTS}_clients": many,
        "rectools": turns,
        "index": million,
    }
    return record.finish("serving", figures, bars)


def machine_speed() -> dict[str, float]:
    """What this machine does in a fixed time now: shared machines differ by more than programs do."""
    matrix = np.ones((1024, 1024), np.float32)
    loops, products = [], []
    for _ in range(5):
        started = time.perf_counter()
        sum(range(2_000_000))
        middle = time.perf_counter()
        matrix @ matrix
        loops.append(middle - started)
        products.append(time.perf_counter() - middle)
    return {
        "loop_ms": 1e3 * statistics.median(loops),
        "gemm_gflops": 2 * 1.024**3 / statistics.median(products),
    }


def export(given: argparse.Namespace, place: Path) -> Path:
    """The version that is served."""
    workdir = given.workdir
    if workdir is None:
        few = ("num_train_steps=2", "checkpoint_every_steps=2", "evaluation.every_steps=0")
        run = training_runs.Run(
            config=CONFIG, workdir=place / "run", overrides=(*few, f"data.path={given.data / DATA}")
        )
        run.finish()
        workdir = run.workdir
    out = place / "exports"
    options = [f"--workdir={workdir}", f"--out={out}", "--version=v1", "--no-saved-model", "--histories"]
    subprocess.run([sys.executable, "-m", "jaxrec.export", *options], check=True, cwd=record.ROOT)
    return out / "v1"


def write_requests(version: Path, path: Path, seed: int) -> Path:
    """A body for each user, in random order."""
    rng = np.random.default_rng(seed)
    users = pq.read_table(version / HISTORIES_FILE, columns=["user_id"])["user_id"].to_pylist()
    items = pq.read_table(version / ITEMS_FILE, columns=["item_id", "categories"])
    keys = items["item_id"].to_pylist()
    names = sorted({name for row in items["categories"].to_pylist() for name in row})
    with path.open("w", encoding="utf-8") as file:
        for user in rng.permutation(len(users)).tolist():
            body = {
                "user_id": users[user],
                "k": 10,
                "exclude": [keys[item] for item in rng.integers(0, len(keys), 3)],
                "filter": {"none_of": rng.choice(names, 1).tolist() if names else [], "max_per_category": 4},
            }
            file.write(json.dumps(body) + "\n")
    return path


def load(
    server: served.Server, bodies: Path, *, clients: int, seconds: float, first: int = 0
) -> dict[str, Any]:
    """What the clients saw, and the processor time of both sides."""
    before = server.processor_seconds
    command = [
        *(sys.executable, str(record.ROOT / "benchmarks" / "serving_load.py"), f"--port={server.port}"),
        *(f"--requests={bodies}", f"--clients={clients}", f"--seconds={seconds}", f"--first={first}"),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    found["clients"] = clients
    found["server_processor_ms_a_request"] = 1e3 * (server.processor_seconds - before) / found["answers"]
    found["generator_processor_ms_a_request"] = 1e3 * found["generator_processor_seconds"] / found["answers"]
    found["load_average"] = record.load_average()
    print(
        f"{clients} client(s): {found['requests_per_second']:.0f} requests/s, p50 {found['p50_ms']:.2f} ms, "
        f"p99 {found['p99_ms']:.2f} ms; processor ms a request: server {found['server_processor_ms_a_request']:.2f}, "
        f"generator {found['generator_processor_ms_a_request']:.2f}",
        flush=True,
    )
    return found


def failed(found: dict[str, Any]) -> int:
    """Answers that were no lists."""
    return sum(count for status, count in found["statuses"].items() if status != "200")


def beside_rectools(given: argparse.Namespace, server: served.Server, bodies: Path) -> list[dict[str, Any]]:
    """One user at a time, in turns."""
    turns = []
    with start_rectools(["--data", str(given.data / DATA), "--seed", str(given.seed)]) as rectools:
        rectools.ask(do="train", steps=1)
        rectools.ask(do="recommend", k=10, one_by_one=3)
        for turn in range(given.turns):
            theirs = rectools.ask(do="recommend", k=10, one_by_one=USERS_A_TURN)
            ours = load(server, bodies, clients=1, seconds=3, first=1_000 * (turn + 1))
            median = 1e3 * statistics.median(theirs["seconds_each"])
            turns.append({"rectools_ms": median, "ours_ms": ours["p50_ms"], "ratio": median / ours["p50_ms"]})
            print(
                f"turn {turn + 1}: RecTools {median:.1f} ms, ours through HTTP {ours['p50_ms']:.2f} ms",
                flush=True,
            )
    return turns


def index_of(num_items: int, seed: int) -> dict[str, Any]:
    """Exact products against the index, on a trained table."""
    rows, queries = trained_table(num_items, seed)
    bias = np.zeros(len(rows), np.float32)
    started = time.perf_counter()
    index, _ = ItemIndex.build(rows, bias, queries[:500])
    built = time.perf_counter() - started
    asked = queries[500:]  # others than those that the index was set by
    exact, approximate, hits = [], [], []
    for query in asked:
        started = time.perf_counter()
        scores = rows @ query + bias
        scores[0] = -np.inf
        wanted = best(scores, 100)
        middle = time.perf_counter()
        found = index.search(query, 100)
        exact.append(middle - started)
        approximate.append(time.perf_counter() - middle)
        hits.append(np.isin(wanted, found).mean())
    figures = {
        "items": num_items,
        "dim": rows.shape[1],
        "queries": len(asked),
        "build_seconds": built,
        "probes": index.num_probes,
        "recall": float(np.mean(hits)),
        "exact_ms": 1e3 * statistics.median(exact),
        "index_ms": 1e3 * statistics.median(approximate),
    }
    print(
        f"{num_items:,} items: exact {figures['exact_ms']:.1f} ms, index {figures['index_ms']:.2f} ms with recall "
        f"{figures['recall']:.3f}, built in {built:.0f} s",
        flush=True,
    )
    return figures


def trained_table(num_items: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors of items (row 0 is padding) and of users, of events around tastes."""
    from implicit.cpu.als import AlternatingLeastSquares

    rng = np.random.default_rng(seed)
    num_users = USERS * num_items // 1_000_000
    taste_of_item = rng.integers(0, TASTES, num_items)
    by_taste = np.argsort(taste_of_item, kind="stable")
    starts = np.searchsorted(taste_of_item[by_taste], np.arange(TASTES + 1))
    of_user = rng.integers(0, TASTES, (num_users, 3))
    users = np.repeat(np.arange(num_users), EVENTS_A_USER)
    tastes = of_user[users, rng.integers(0, 3, len(users))]
    # Within a taste the first items are the popular ones; every tenth event is of any item.
    width = starts[tastes + 1] - starts[tastes]
    items = by_taste[starts[tastes] + (width * rng.random(len(users)) ** 2).astype(np.int64)]
    items = np.where(rng.random(len(users)) < 0.1, rng.integers(0, num_items, len(users)), items)
    events = sparse.csr_matrix(
        (np.ones(len(users), np.float32), (users, items)), shape=(num_users, num_items)
    )
    model = AlternatingLeastSquares(
        factors=DIM, alpha=10.0, regularization=1.0, iterations=5, random_state=seed
    )
    model.fit(events, show_progress=False)
    rows = np.vstack([np.zeros((1, DIM), np.float32), model.item_factors])
    drawn = rng.permutation(num_users)[:1_000]
    return rows.astype(np.float32), model.user_factors[drawn].astype(np.float32)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = Path(os.environ.get("JAXREC_DATA") or record.SHARED_DATA)
    parser.add_argument("--data", type=Path, default=data, help="where the data sets lie")
    parser.add_argument("--workdir", type=Path, help="a trained run; default: a few steps of configs/ml1m.py")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each load")
    parser.add_argument("--turns", type=int, default=TURNS, help="beside RecTools; 0 = leave it out")
    parser.add_argument("--items", type=int, default=1_000_000, help="of the large catalogue")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
