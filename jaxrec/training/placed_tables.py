"""How a run's tables lie: what the config settles, what must lie by rows, and the planner for the rest."""

import dataclasses
from collections.abc import Iterator, Mapping

import jax

from jaxrec.core.chips import CHIPS, chip_of
from jaxrec.embedding.placement import Columns, Placement, Rows
from jaxrec.embedding.placement_planner import Machine, plan_placements
from jaxrec.models.two_tower import ITEM
from jaxrec.training.lookups import lookup_sizes, whole_tables
from jaxrec.training.setup import Setup


def place_tables(
    setup: Setup, given: Mapping[str, Placement], *, global_batch_size: int, history_length: int
) -> Setup:
    """The setup with a placement of every table; the results of the run do not depend on it.

    Args:
      given: the config's choices; the planner makes the others.

    Raises:
      ValueError: every choice of the config that cannot be, with the reason and the remedy.
    """
    kept = dict.fromkeys(whole_tables(setup.tables, setup.step.tasks), "a full softmax reads it whole")
    kept |= dict.fromkeys(setup.cache_rows, "the devices hold a cache of it")
    if setup.model.text is not None:
        kept |= {ITEM: "the vectors of its items' text lie as it does"}
    if setup.model.memory is not None:
        kept |= {ITEM: "the memory of transitions lies as it does"}
    problems = list(_problems(setup, given, kept))
    if problems:
        raise ValueError("; ".join(problems))
    mesh, facts = setup.mesh, setup.step.facts
    batch = facts.abstract_batch(global_batch_size, history_length)
    with jax.set_mesh(mesh):
        asked = lookup_sizes(setup.step, batch)
        transport = setup.step.exchange.lanes(1).transport
    chip = chip_of(mesh.devices.flat[0].device_kind)
    # A device whose memory is not published (a CPU) counts as the smallest that is.
    hbm_bytes = min(one.device_hbm_bytes for one in ([chip] if chip else CHIPS.values()))
    plan = plan_placements(
        setup.tables,
        {keyed_by: -(-count // mesh.size) for keyed_by, count in asked.items()},
        setup.step.row_optimizer,
        Machine(devices=mesh.size, hbm_bytes=hbm_bytes, transport=transport),
        given=given,
        kept=kept,
    )
    tables = plan.tables
    step = dataclasses.replace(setup.step, tables=tables)
    return dataclasses.replace(setup, tables=tables, step=step, placement_plan=plan)


def _problems(setup: Setup, given: Mapping[str, Placement], kept: Mapping[str, str]) -> Iterator[str]:
    optimizer = setup.step.row_optimizer
    for name, placement in given.items():
        value = f"placement[{name!r}]={placement}"
        if name not in setup.tables:
            yield f"{value}: the model has no such table; it has {', '.join(setup.tables)}."
        elif name in kept and not isinstance(placement, Rows):
            yield f"{value}: {kept[name]}, and so it must lie by Rows; leave it out."
        elif isinstance(placement, Columns) and not optimizer.elementwise:
            yield (
                f"{value}: {type(optimizer).__name__} keeps one float a row, and each part of a row would have its "
                "own: another optimizer than the one asked for. Take Rows, or Adam, Momentum or Sgd."
            )
        else:
            try:
                dataclasses.replace(setup.tables[name], placement=placement)
            except ValueError as error:
                yield f"placement[{name!r}]: {error}"
