"""A run that is no model: it recommends by the vector of the last event, so that every rank can be checked."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.core.mesh import make_mesh
from jaxrec.core.partition import sharding
from jaxrec.data.config import DataConfig
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.histories import Histories
from jaxrec.evaluation.config import EvaluationConfig
from jaxrec.tasks.next_item import NextItem

NUM_USERS, NUM_ITEMS, DIM = 60, 45, 8


@dataclasses.dataclass
class LastItemRun:
    """Scores item `y` by `vectors[last item] . vectors[y] + bias[y]`."""

    dataset: PreparedDataset
    mesh: jax.sharding.Mesh
    config: types.SimpleNamespace
    vectors: np.ndarray
    bias: np.ndarray
    history: tuple = ()
    step: int = 7
    appends_slot: bool = False
    with_behaviours: bool = False
    score: None = None  # scores are products

    def query_fn(self, batch):
        last = np.asarray(batch.batch.item_ids)[batch.rows, batch.columns]
        return jnp.asarray(self.vectors[last]), None

    def catalogue(self):
        shards = self.mesh.size
        rows_per_shard = -(-len(self.vectors) // shards)
        ids = np.arange(len(self.vectors))
        where = ids % shards * rows_per_shard + ids // shards
        vectors = np.zeros((rows_per_shard * shards, self.vectors.shape[1]), np.float32)
        bias = np.zeros(len(vectors), np.float32)
        vectors[where], bias[where] = self.vectors, self.bias
        return (
            jax.device_put(vectors, sharding(self.mesh, "row", None)),
            jax.device_put(bias, sharding(self.mesh, "row")),
        )

    def behaviour_logits(self, batch):
        last = np.asarray(batch.batch.item_ids)[batch.rows, batch.columns]
        logits = self.vectors[last, :1] + self.vectors[np.asarray(batch.targets), :1]
        return np.repeat(logits, len(self.dataset.metadata.behaviours), axis=1)


def random_dataset(seed=0, filter_seen=True, lengths=None, repeats=True):
    """Users with 0 to 30 events."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 31, NUM_USERS) if lengths is None else np.asarray(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    num_events = offsets[-1]
    item_ids = np.minimum(rng.geometric(0.08, num_events), NUM_ITEMS).astype(np.int32)
    if not repeats:
        item_ids = np.concatenate([rng.permutation(NUM_ITEMS)[:n] + 1 for n in lengths]).astype(np.int32)
    return PreparedDataset.from_histories(
        Histories(
            offsets.astype(np.int64),
            item_ids,
            np.arange(num_events, dtype=np.int64),
            rng.integers(-1, 2, (num_events, 2)).astype(np.int8),
        ),
        num_items=NUM_ITEMS,
        item_titles=[f"Film {i} & Söhne" if i % 5 else "" for i in range(1, NUM_ITEMS + 1)],
        behaviours=["like", "finish"],
        filter_seen=filter_seen,
        name="small",
    )


def make_run(mesh_shape=(2, 4), seed=0, dataset=None, evaluation=None, **options):
    rng = np.random.default_rng(seed)
    mesh = make_mesh(mesh_shape, jax.devices()[: mesh_shape[0] * mesh_shape[1]])
    config = types.SimpleNamespace(
        name="last_item",
        tasks={"next_item": NextItem()},
        data=DataConfig(history_length=12),
        evaluation=evaluation or EvaluationConfig(ks=(1, 5, 10), rows_per_batch=8, bootstrap_samples=100),
    )
    return LastItemRun(
        dataset=dataset or random_dataset(),
        mesh=mesh,
        config=config,
        vectors=rng.normal(size=(NUM_ITEMS + 1, DIM)).astype(np.float32),
        bias=rng.normal(size=NUM_ITEMS + 1).astype(np.float32),
        **options,
    )


@pytest.fixture(scope="session")
def make_last_item_run():
    """Builds a `LastItemRun`."""
    return make_run


@pytest.fixture(scope="session")
def make_small_dataset():
    """Builds a dataset of a few users."""
    return random_dataset
