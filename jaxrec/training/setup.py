"""From a config and a dataset to everything that a step needs. Training and inference both start here."""

import dataclasses
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxrec.core.partition import sharding
from jaxrec.data.dataset import PreparedDataset
from jaxrec.embedding.engine import Exchange
from jaxrec.embedding.placement_planner import PlacementPlan
from jaxrec.embedding.row_optimizer import RowOptimizer
from jaxrec.embedding.table import TableSpec
from jaxrec.models.item_text import TextTower
from jaxrec.models.two_tower import Outputs, TwoTowerConfig
from jaxrec.tasks.base import DataFacts, Task
from jaxrec.tasks.distillation import Distillation
from jaxrec.tasks.masked_text import MaskedText
from jaxrec.tasks.ranking import RankingTask
from jaxrec.training.balance import Balance, FixedWeights
from jaxrec.training.cached_tables import check_cache_rows
from jaxrec.training.lookups import whole_tables
from jaxrec.training.optimizer import OptimizerConfig, dense_optimizer
from jaxrec.training.rates import make_rates
from jaxrec.training.state import TrainState, abstract_state, init_state, split_model
from jaxrec.training.step_config import StepConfig

Tree = TypeVar("Tree")

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """The static parts of a run on one mesh.

    Attributes:
      tables: the sharded tables of the model.
      step: what the train step is made of.
      cache_rows: rows that the devices hold of each table that lives on the host.
      placement_plan: why the tables lie as they do; None = all by rows, unasked. See `placed_tables`.
    """

    mesh: Mesh
    model: TwoTowerConfig
    tables: dict[str, TableSpec]
    step: StepConfig
    outputs: Outputs
    cache_rows: Mapping[str, int]
    placement_plan: PlacementPlan | None = None

    @property
    def ranking_task(self) -> RankingTask:
        """The first task that ranks items, of those that count: recommendations are asked for as it is trained.

        Raises:
          ValueError: no task of the run ranks items.
        """
        ranking = [task for task in self.step.tasks.values() if isinstance(task, RankingTask)]
        if not ranking:
            raise ValueError(
                f"tasks={', '.join(self.step.tasks)}: none of them ranks items; add a NextItem or MaskedItem task "
                "to recommend."
            )
        return next((task for task in ranking if task.weight > 0), ranking[0])

    def init_state(self) -> TrainState:
        """A fresh state on the mesh."""
        return init_state(
            self.model,
            self.tables,
            outputs=self.outputs,
            seed=self.step.seed,
            optimizer=self.step.optimizer,
            row_optimizer=self.step.row_optimizer,
            averaged=self._averaged,
            cache_rows=self.cache_rows,
            num_text_tokens=self.step.facts.num_text_tokens,
            mesh=self.mesh,
        )

    def abstract_state(self) -> TrainState:
        """Shapes and shardings of the state that a step sees: the devices of the mesh need not be there."""
        return abstract_state(
            self.model,
            self.tables,
            abstract=self.step.abstract,
            optimizer=self.step.optimizer,
            row_optimizer=self.step.row_optimizer,
            averaged=self._averaged,
            cache_rows=self.cache_rows,
            num_text_tokens=self.step.facts.num_text_tokens,
            mesh=self.mesh,
        )

    @property
    def _averaged(self) -> list[str] | None:
        """The tables that are averaged; None = nothing is."""
        return whole_tables(self.tables, self.step.tasks) if self.step.optimizer_config.ema_decay else None


def dataset_facts(dataset: PreparedDataset) -> DataFacts:
    """What the static parts of a run need to know of its data."""
    metadata = dataset.metadata
    return DataFacts(
        name=metadata.name,
        num_items=metadata.num_items,
        num_users=metadata.num_users,
        behaviours=metadata.behaviours,
        item_counts=np.asarray(dataset.item_counts, np.float32),
        has_timestamps=metadata.has_timestamps,
        value=metadata.value,
        num_text_tokens=dataset.num_text_tokens,
        context=metadata.context,
        queries=None if dataset.queries is None else dataset.queries.pairs("train"),
        domains=metadata.domains,
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
    cache_rows: Mapping[str, int] = MappingProxyType({}),
    balance: Balance = FixedWeights(),
) -> Setup:
    """Derives the static parts.

    Raises:
      ValueError: a task or the model needs a column that the dataset lacks (names both), a table cannot live on the
        host, or a rate is of no parameter.
    """
    _check(model, tasks, facts)
    judges = any(task.needs_behaviour_head for task in tasks.values())
    outputs = Outputs(
        num_behaviours=len(facts.behaviours) if judges else 0,
        read_behaviours=len(facts.behaviours) if model.event_behaviours else 0,
        values=any(task.needs_value_head for task in tasks.values()),
        num_domains=len(facts.domains) if model.domain_adapters else 0,
        weighed_tasks=balance.weighed(tasks),
    )
    graphdef, abstract = split_model(model, outputs)
    tables = model.tables(facts.num_items, facts.num_users)
    check_cache_rows(cache_rows, tables, mesh)
    frozen = ("text.encoder.",) if model.text is not None and model.text.frozen else ()
    step = StepConfig(
        graphdef=graphdef,
        abstract=abstract,
        layout=model.encoder.layout,
        gather_dtype=model.encoder.gather_dtype,
        tables=tables,
        tasks=tasks,
        balance=balance,
        facts=facts,
        text=model.text,
        optimizer=dense_optimizer(optimizer, num_train_steps),
        optimizer_config=optimizer,
        rates=make_rates(optimizer, nnx.to_pure_dict(abstract), tables, frozen=frozen),
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
        outputs=outputs,
        cache_rows=cache_rows,
    )


def _check(model: TwoTowerConfig, tasks: Mapping[str, Task], facts: DataFacts) -> None:
    """What the towers read must be in the data, and what they do the tasks must be able to train."""
    if model.encoder.time_bias and not facts.has_timestamps:
        raise ValueError(
            f"model.encoder.time_bias=True needs the times of events, and dataset {facts.name!r} has none; name the "
            "column with data.columns.timestamp, or set time_bias to False."
        )
    if model.target_time:
        _check_target_time(tasks, facts)
    if model.event_behaviours and not facts.behaviours:
        raise ValueError(
            f"model.event_behaviours=True, but the events of dataset {facts.name!r} have no behaviours; declare one in "
            "the column map, or set it to False."
        )
    if model.domain_adapters and len(facts.domains) < 2:
        raise ValueError(
            f"model.domain_adapters={model.domain_adapters}, but dataset {facts.name!r} has one domain; join several "
            "with data.source=Domains, or set it to 0."
        )
    for task in tasks.values():
        task.check_data(facts)
        if isinstance(task, Distillation):
            _check_distillation(task, model, tasks)
    _check_behaviours(tasks, facts)
    _check_context(model, tasks, facts)
    if model.memory is not None:
        _check_memory(tasks)
    if model.mixture is not None:
        _check_mixture(tasks)
    if model.text is not None:
        _check_text(model.text, facts)
    _check_text_tasks(model.text, tasks)
    _check_queries(model.text, facts)


def _check_target_time(tasks: Mapping[str, Task], facts: DataFacts) -> None:
    if not facts.has_timestamps:
        raise ValueError(
            f"model.target_time=True needs the times of events, and dataset {facts.name!r} has none; name the column "
            "with data.columns.timestamp, or set it to False."
        )
    for name, task in tasks.items():
        if isinstance(task, RankingTask) and task.query_mode != "causal":
            raise ValueError(
                f"model.target_time=True, but task {name!r} ({type(task).__name__}) fills in blanks, whose time is "
                "hidden; use NextItem, or set it to False."
            )


def _check_behaviours(tasks: Mapping[str, Task], facts: DataFacts) -> None:
    for name, task in tasks.items():
        for other in (other for other in tasks if other != name):
            both = set(task.conditional_behaviours) & set(tasks[other].learned_behaviours(facts.behaviours))
            if both:
                raise ValueError(
                    f"task {name!r} ({type(task).__name__}) learns {min(both)!r} given another behaviour, and task "
                    f"{other!r} learns it too; leave it out of the behaviours of {other!r}."
                )


def _check_context(model: TwoTowerConfig, tasks: Mapping[str, Task], facts: DataFacts) -> None:
    if not model.context_rows:
        return
    if not facts.context:
        raise ValueError(
            f"model.context_rows={model.context_rows}, but the events of dataset {facts.name!r} have no context; name "
            "its columns with data.columns.context, or set it to 0."
        )
    if not any(task.needs_behaviour_head for task in tasks.values()):
        raise ValueError(
            f"model.context_rows={model.context_rows}, but no task predicts behaviours, which is what an event's "
            "context is read for; add a Behaviour task, or set it to 0."
        )


def _check_memory(tasks: Mapping[str, Task]) -> None:
    ranking = {name: task for name, task in tasks.items() if isinstance(task, RankingTask)}
    unable = [f"{name!r} ({type(task).__name__})" for name, task in ranking.items() if not task.takes_memory]
    if unable or not ranking:
        who = f"task {unable[0]} takes none" if unable else "no task ranks items"
        raise ValueError(
            f"model.memory is set, but {who}; use NextItem with FullSoftmax candidates, or set model.memory=none."
        )


def _check_distillation(distillation: Distillation, model: TwoTowerConfig, tasks: Mapping[str, Task]) -> None:
    """The scores that are taught must be those that the run is asked for."""
    if model.memory is not None:
        raise ValueError(
            "model.memory is set, and Distillation teaches the scores of the towers without it; set model.memory=none."
        )
    for name, task in tasks.items():
        if not isinstance(task, RankingTask):
            continue
        if task.query_mode != "causal":
            raise ValueError(
                f"task {name!r} ({type(task).__name__}) fills in blanks, and Distillation teaches what follows a "
                "history; use NextItem."
            )
        if task.temperature != distillation.student_temperature:
            raise ValueError(
                f"Distillation.student_temperature={distillation.student_temperature}, but task {name!r} ranks by "
                f"scores over {task.temperature}; set it to that."
            )


def _check_mixture(tasks: Mapping[str, Task]) -> None:
    unable = [f"{name!r} ({type(task).__name__})" for name, task in tasks.items() if not task.takes_mixture]
    if unable:
        raise ValueError(
            f"model.mixture is set, but task {unable[0]} scores by products; use NextItem or MaskedItem with sampled "
            "candidates and temperature 1, or set model.mixture to none."
        )


def _check_text(text: TextTower, facts: DataFacts) -> None:
    if not facts.num_text_tokens:
        raise ValueError(
            f"model.text is set, but dataset {facts.name!r} has no item text (item_tokens.npy); prepare it from an "
            "items table with text columns, or set model.text=none."
        )
    if text.encoder.max_positions < facts.num_text_tokens:
        raise ValueError(
            f"text.encoder.max_positions={text.encoder.max_positions} is less than the {facts.num_text_tokens} tokens "
            f"of an item of dataset {facts.name!r}; raise it, or prepare with a smaller data.text.max_tokens."
        )


def _check_text_tasks(text: TextTower | None, tasks: Mapping[str, Task]) -> None:
    readers = [f"{name!r} ({type(task).__name__})" for name, task in tasks.items() if task.masked_tokens(1)]
    if readers and (text is None or text.frozen or not text.masked_head):
        raise ValueError(
            f"task {readers[0]} trains the text encoder; it needs model.text with masked_head=true and "
            "trained_items of at least 1."
        )
    for task in tasks.values():
        if isinstance(task, MaskedText) and text is not None and task.mask_token >= text.encoder.vocab_size:
            raise ValueError(
                f"MaskedText.mask_token={task.mask_token} is no token of text.encoder.vocab_size="
                f"{text.encoder.vocab_size}; give the number of [MASK] in the vocabulary."
            )
    asked = [f"{name!r} ({type(task).__name__})" for name, task in tasks.items() if task.reads_queries]
    if asked and text is None:
        raise ValueError(
            f"task {asked[0]} reads texts; it needs model.text, the encoder that reads the items'."
        )
    if not readers and text is not None and text.masked_head:
        raise ValueError(
            "model.text.masked_head=True, but no task trains the head; add a MaskedText task, or set it to false."
        )


def _check_queries(text: TextTower | None, facts: DataFacts) -> None:
    """Items' tokens are checked where they are read; those of queries here."""
    if text is None or facts.queries is None:
        return
    if (largest := int(facts.queries.token_ids.max())) >= text.encoder.vocab_size:
        raise ValueError(
            f"text.encoder.vocab_size={text.encoder.vocab_size}, but the queries of dataset {facts.name!r} have the "
            f"token {largest}; prepare it with the encoder's own vocabulary: data.text.vocabulary."
        )


def describe(setup: Setup, dataset: PreparedDataset) -> None:
    """Logs the sizes that a user wants to see before the wait."""
    metadata = dataset.metadata
    logger.info(
        "%s: %d users, %d items, %d events, split %s",
        metadata.name, metadata.num_users, metadata.num_items, metadata.num_events, metadata.split,
    )  # fmt: skip
    dense = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(setup.step.abstract))
    logger.info("%d dense parameters", dense)
    for line in setup.step.rates.summary():
        logger.info("%s", line)
    whole = whole_tables(setup.tables, setup.step.tasks)
    for name, table in setup.tables.items():
        rows, parts = table.rows_per_shard(setup.mesh.size), table.placement.num_parts
        padding = rows * table.placement.shards(setup.mesh.size) - table.num_rows * parts
        logger.info(
            "table %s: %d rows x %d, %d rows x %d on each of %d devices (%d of padding), gradient %s",
            name, table.num_rows, table.dim, rows, table.dim // parts, setup.mesh.size, padding,
            "none: it is frozen" if not setup.step.rates.tables[name]
            else "dense and shard-local: a full softmax touches every row" if name in whole
            else "sparse: rows of the batch only",
        )  # fmt: skip
    if (plan := setup.placement_plan) is not None:
        logger.info("placement of the tables:\n%s", plan)
        if plan.held_share > 1:
            logger.warning(
                "the tables need %.0f%% of a device's memory; take more devices or a narrower dim, or keep the table "
                "of users on the host: cache_rows", 100 * plan.held_share,
            )  # fmt: skip


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
