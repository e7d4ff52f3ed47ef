"""Bytes of one chip by what they hold, from the arguments' shardings and the compiled program."""

import dataclasses
from collections.abc import Sequence

import jax

from jaxrec.embedding.exchange import SCOPE
from jaxrec.planning.liveness import Buffer, peak
from jaxrec.planning.program import Program, device_argument_bytes

SHOWN = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Where a chip's memory goes, in bytes.

    Attributes:
      by_kind: parts that add up to `total`.
      capacity: of a chip by its maker; 0 = not published (a CPU).
      largest: temporaries that live at the peak, of one device.
      replayed: sum of the temporaries at the peak by `liveness`, over what XLA says.
    """

    total: float
    capacity: float
    by_kind: dict[str, float]
    largest: Sequence[Buffer]
    replayed: float

    @property
    def share(self) -> float:
        """Of the capacity; NaN where that is not known."""
        return self.total / self.capacity if self.capacity else float("nan")


def measure_memory(program: Program) -> Memory:
    """See the module. Exchange buffers are the share of the peak's temporaries that the exchange made."""
    state, chip = program.state, program.case.topology.chip
    per_chip = chip.devices if chip else 1
    arguments = {
        "dense parameters": (state.dense, state.ema),
        "dense optimizer": state.dense_slots,
        **{f"table {name}": table for name, table in state.tables.items()},
        **{f"table {name}, optimizer": slots for name, slots in state.table_slots.items()},
        "text of the items": state.texts,
        "batch": (program.batch, state.step, state.failure),
    }
    kinds = {
        name: float(sum(device_argument_bytes(leaf) for leaf in jax.tree.leaves(tree)))
        for name, tree in arguments.items()
    }
    # Parts of the batch that no task reads are no arguments of the program; tiles round the others up.
    difference = program.argument_bytes - sum(kinds.values())
    kinds["batch"] += min(0.0, difference)
    kinds["padding of arguments"] = max(0.0, difference)
    buffers = peak(program.module)
    replayed = sum(buffer.num_bytes for buffer in buffers)
    exchange = sum(buffer.num_bytes for buffer in buffers if SCOPE in buffer.source)
    share = exchange / replayed if replayed else 0.0
    kinds["exchange buffers"] = share * program.temporary_bytes
    kinds["activations and other temporaries"] = (1 - share) * program.temporary_bytes
    kinds["code and outputs"] = float(program.other_bytes)
    return Memory(
        total=float(program.total_bytes * per_chip),
        capacity=chip.hbm_bytes if chip else 0.0,
        by_kind={name: size * per_chip for name, size in kinds.items() if size},
        largest=buffers[:SHOWN],
        replayed=replayed / program.temporary_bytes if program.temporary_bytes else float("nan"),
    )
