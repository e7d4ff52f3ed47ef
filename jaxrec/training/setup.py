"""From a config and a dataset to everything that a step needs. Training and inference both start here."""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrec.core.partition import sharding
from jaxrec.data.dataset import PreparedDataset
from jaxrec.embedding.engine import Exchange
from jaxrec.embedding.row_optimizer import RowOptimizer
from jaxrec.embedding.table import TableSpec
from jaxrec.models.two_tower import TwoTowerConfig
from jaxrec.tasks.base import DataFacts, Task
from jaxrec.tasks.ranking import RankingTask
from jaxrec.training.optimizer import OptimizerConfig, dense_optimizer
from jaxrec.training.state import TrainState, init_state, split_model
from jaxrec.training.step import StepConfig, whole_tables

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """The static parts of a run on one mesh.

    Attributes:
      tables: the sharded tables of the model.
      step: what the train step is made of.
    """

    mesh: Mesh
    model: TwoTowerConfig
    tables: dict[str, TableSpec]
    step: StepConfig
    num_behaviours: int

    @property
    def ranking_task(self) -> RankingTask:
        """The first task that ranks items: recommendations are asked for as it is trained.

        Raises:
          ValueError: no task of the run ranks items.
        """
        ranking = [task for task in self.step.tasks.values() if isinstance(task, RankingTask)]
        if not ranking:
            raise ValueError(
                f"tasks={', '.join(self.step.tasks)}: none of them ranks items; add a NextItem or MaskedItem task "
                "to recommend."
            )
        return ranking[0]

    def init_state(self) -> TrainState:
        """A fresh state on the mesh."""
        return init_state(
            self.model,
            self.tables,
            num_behaviours=self.num_behaviours,
            seed=self.step.seed,
            optimizer=self.step.optimizer,
            row_optimizer=self.step.row_optimizer,
            averaged=whole_tables(self.tables, self.step.tasks)
            if self.step.optimizer_config.ema_decay
            else None,
            mesh=self.mesh,
        )


def dataset_facts(dataset: PreparedDataset) -> DataFacts:
    """What the static parts of a run need to know of its data."""
    metadata = dataset.metadata
    return DataFacts(
        name=metadata.name,
        num_items=metadata.num_items,
        num_users=metadata.num_users,
        behaviours=metadata.behaviours,
        item_counts=np.asarray(dataset.item_counts, np.float32),
    )


def make_setup(
    *,
    facts: DataFacts,
    mesh: Mesh,
    model: TwoTowerConfig,
    tasks: Mapping[str, Task],
    optimizer: OptimizerConfig,
    row_optimizer: RowOptimizer,
    exchange: Exchange,
    num_train_steps: int,
    accumulation_steps: int,
    seed: int,
) -> Setup:
    """Derives the static parts.

    Raises:
      ValueError: a task needs a column that the dataset lacks; names both.
    """
    for task in tasks.values():
        task.check_data(facts)
    num_behaviours = len(facts.behaviours) if any(task.needs_behaviour_head for task in tasks.values()) else 0
    graphdef, abstract = split_model(model, num_behaviours)
    tables = model.tables(facts.num_items, facts.num_users)
    step = StepConfig(
        graphdef=graphdef,
        abstract=abstract,
        tables=tables,
        tasks=tasks,
        facts=facts,
        optimizer=dense_optimizer(optimizer, num_train_steps),
        optimizer_config=optimizer,
        row_optimizer=row_optimizer,
        exchange=exchange,
        num_train_steps=num_train_steps,
        accumulation_steps=accumulation_steps,
        seed=seed,
    )
    return Setup(
        mesh=mesh,
        model=model,
        tables=tables,
        step=step,
        num_behaviours=num_behaviours,
    )


def place_batch(batch: Tree, mesh: Mesh) -> Tree:
    """Puts this process' rows of a batch (or of one of its arrays) on its devices; together they are the global one."""
    where = sharding(mesh, "batch")
    if jax.process_count() == 1:
        return jax.device_put(batch, where)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, x), batch)


def evaluation_parameters(state: TrainState) -> tuple[dict, dict[str, jax.Array]]:
    """Dense parameters and tables to evaluate with: the averages where the run keeps them."""
    return (
        (state.ema["dense"], state.tables | state.ema["tables"]) if state.ema else (state.dense, state.tables)
    )


def table_bias(tables: Mapping[str, jax.Array], name: str, like: jax.Array) -> jax.Array:
    """b_y of every physical row, zeros where the model has none."""
    return tables[name][:, 0] if name in tables else jnp.zeros(like.shape[0], jnp.float32)
