"""What a train step is made of."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax
from flax import nnx

from jaxrec.core.partition import Layout
from jaxrec.core.precision import ActivationDtype
from jaxrec.embedding.engine import Exchange
from jaxrec.embedding.row_optimizer import RowOptimizer
from jaxrec.embedding.table import TableSpec
from jaxrec.models.item_text import TextTower
from jaxrec.models.two_tower import TwoTower
from jaxrec.nn.layers import whole_parameters
from jaxrec.tasks.base import DataFacts, Task
from jaxrec.training.balance import Balance
from jaxrec.training.optimizer import OptimizerConfig
from jaxrec.training.rates import Rates
from jaxrec.training.state import merge_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What the step is made of; all static."""

    graphdef: nnx.GraphDef
    abstract: nnx.State
    layout: Layout
    gather_dtype: ActivationDtype
    tables: Mapping[str, TableSpec]
    tasks: Mapping[str, Task]
    balance: Balance
    facts: DataFacts
    text: TextTower | None
    optimizer: optax.GradientTransformation
    optimizer_config: OptimizerConfig
    rates: Rates
    row_optimizer: RowOptimizer
    exchange: Exchange
    num_train_steps: int
    accumulation_steps: int
    seed: int

    def model(self, dense: Any) -> TwoTower:
        """The model with these dense parameters, whole on every device."""
        whole = whole_parameters(dense, self.abstract, self.layout, self.gather_dtype)
        return merge_model(self.graphdef, self.abstract, whole)

    def key(self, step: jax.Array) -> jax.Array:
        """What a step draws from."""
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), 2), step)
