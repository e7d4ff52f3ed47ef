"""How long one user waits: the query from the history, a score for every item, the best of them; from codes alone.

The codes are arguments of the program: dense parameters are read back inside of it, of the tables the rows of the
history's events are, and scores are computed from codes where the score is a product.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.compression.files import SCAN, CompressedModel
from jaxrec.compression.parameters import DENSE, TABLE
from jaxrec.data.evaluation_batches import asked_users, split_ends
from jaxrec.evaluation.user_ranking import evaluation_rows
from jaxrec.models.two_tower import ITEM, ITEM_BIAS, USER
from jaxrec.runs import Run
from jaxrec.training.rates import by_path

TOP_K = 100
Program = Callable[[], Any]


def answer_program(run: Run, model: CompressedModel, split: str) -> Program:
    """Answers, of the users with a target in `split`, the one of the longest history; call it under the run's mesh.

    A memory of transitions is left out: it is a sparse sum that no method changes.

    Raises:
      ValueError: no user has a target in `split` and a history before it.
    """
    dataset, inference, setup = run.dataset, run.inference, run.setup
    users, (ends, _) = asked_users(dataset, split), split_ends(dataset, split)
    if not len(users):
        raise ValueError(
            f"dataset {dataset.metadata.name!r} has no user with a target in split {split!r} and a history before it; "
            "take another split."
        )
    longest = users[[np.argmax(ends[users])]]
    rows = evaluation_rows(run, split, rows_per_batch=1, user_indices=longest, with_seen=False)
    placed = inference.place(rows.build(0, 0, 1))
    leaves = list(by_path(tree := nnx.to_pure_dict(setup.step.abstract)))
    structure, scored = jax.tree.structure(tree), f"{TABLE}.{setup.model.scored_table}"
    is_product = setup.model.cosine is None and setup.model.mixture is None

    @jax.jit
    def answer(codes: Mapping[str, Any], placed: Any) -> tuple[jax.Array, jax.Array]:
        dense = jax.tree.unflatten(structure, [codes[f"{DENSE}.{name}"].decode() for name in leaves])
        whole, batch = inference.model_of(dense), placed["batch"]
        users = codes[f"{TABLE}.{USER}"].rows(batch.user_ids) if USER in setup.tables else None
        events = codes[f"{TABLE}.{ITEM}"].rows(batch.item_ids)
        query = inference.ask(whole, events, users, placed)[1][:1]

        def score(name: str) -> jax.Array:
            if is_product:
                return codes[name].scores(query[0].astype(jnp.float32))
            items = whole.candidate_vectors(codes[name].decode())
            return (query @ items.T if whole.score is None else whole.score.all_pairs(query, items))[0]

        bias = jnp.zeros(dataset.metadata.num_items + 1)
        if ITEM_BIAS in setup.tables:
            bias = codes[f"{TABLE}.{ITEM_BIAS}"].decode()[:, 0]
        scan = SCAN + scored if model.num_candidates else scored
        count = min(model.num_candidates or TOP_K, dataset.metadata.num_items)
        best, ids = jax.lax.top_k((score(scan) + bias)[1:], count)
        if not model.num_candidates:
            return best, ids + 1
        vectors = whole.candidate_vectors(codes[scored].rows(ids + 1))
        again = vectors @ query[0] + bias[ids + 1]
        best, order = jax.lax.top_k(again, min(TOP_K, count))
        return best, ids[order] + 1

    codes = jax.device_put(dict(model.codes))
    jax.block_until_ready(answer(codes, placed))  # compiles
    return lambda: jax.block_until_ready(answer(codes, placed))


def median_milliseconds(programs: Mapping[str, Program], repeats: int) -> dict[str, float]:
    """Of each program; they take turns, so that a busy moment of the machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
