"""From a config to the static parts of its run: the one place where a config's fields become a setup's."""

from jax.sharding import Mesh

from jaxrec.config.train_config import TrainConfig
from jaxrec.tasks.base import DataFacts
from jaxrec.training.placed_tables import place_tables
from jaxrec.training.setup import Setup, make_setup


def setup_of(config: TrainConfig, facts: DataFacts, mesh: Mesh) -> Setup:
    """The static parts of a run, with every table placed; the devices of the mesh need not be there.

    Raises:
      ValueError: config, data and devices do not fit.
    """
    setup = make_setup(
        facts=facts,
        mesh=mesh,
        model=config.model,
        tasks=config.tasks,
        balance=config.balance,
        optimizer=config.optimizer,
        row_optimizer=config.row_optimizer,
        exchange=config.exchange,
        num_train_steps=config.num_train_steps,
        accumulation_steps=config.accumulation_steps,
        seed=config.seed,
        cache_rows=config.cache_rows,
    )
    return place_tables(
        setup,
        config.placement,
        global_batch_size=config.global_batch_size,
        history_length=config.data.history_length,
    )
