"""What a compiled schedule hides: collectives that are on their way while the cores work.

XLA writes a device's program as one list, in the order in which it runs. A collective that it made asynchronous is on
its way from its `-start` to its `-done`, beside whatever stands between the two; any other holds everything up. This
walks the list with the roofline's times: each kernel in between hides as much of the oldest collective on its way as
it lasts itself, so that no kernel is counted twice. A loop counts with all its rounds; what is on its way inside of
one is matched inside.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator

from jaxrec.core.chips import Chip
from jaxrec.planning.hlo import Collective, Instruction, Module
from jaxrec.planning.program import Program
from jaxrec.planning.roofline import link_seconds, make_link
from jaxrec.planning.traffic import bytes_of


@dataclasses.dataclass
class Hidden:
    """Bytes that a device sends in a step, and how many of them the schedule hides.

    Attributes:
      asynchronous: of the collectives that have a start and a done.
      behind_kernels: sent while any kernel runs.
      behind_products: sent while kernels with matrix products run, by the time of the products alone.
    """

    sent: float = 0.0
    asynchronous: float = 0.0
    behind_kernels: float = 0.0
    behind_products: float = 0.0


@dataclasses.dataclass
class _Flight:
    """A collective on its way: the seconds that it takes, and those that are not hidden yet."""

    part: str
    num_bytes: float
    seconds: float
    left: dict[str, float]


def measure_overlap(program: Program) -> dict[str, Hidden] | None:
    """By part (`roofline.EXCHANGE`, `roofline.DENSE`); None for a machine without published peaks."""
    topology, chip = program.case.topology, program.case.topology.chip
    if chip is None:
        return None

    def take_off(collective: Collective) -> _Flight:
        link = make_link(collective, topology, program.case.config.mesh_shape)
        seconds = link_seconds(link, topology, chip)
        left = {"behind_kernels": seconds, "behind_products": seconds}
        return _Flight(link.part, link.device_bytes, seconds, left)

    replay = _Replay(program.module, chip, take_off)
    for computation, times in _computations(program.module, program.module.entry, 1):
        replay.run(computation, times)
    return dict(replay.found)


def _computations(module: Module, name: str, times: int) -> Iterator[tuple[str, int]]:
    """Every list of kernels that runs, and how often."""
    yield name, times
    for instruction in module.computations[name].values():
        if instruction.opcode != "fusion" and not instruction.opcode.endswith("-start"):
            for inner, count in module.inner(instruction):
                if count:
                    yield from _computations(module, inner, times * count)


class _Replay:
    def __init__(self, module: Module, chip: Chip, take_off: Callable[[Collective], _Flight]):
        self.module, self.chip, self.take_off = module, chip, take_off
        self.found: dict[str, Hidden] = defaultdict(Hidden)
        self._times: dict[str, dict[str, float]] = {}

    def run(self, computation: str, times: int) -> None:
        """Replays one list of kernels that runs `times` times."""
        flying: dict[str, _Flight] = {}
        for instruction in self.module.computations[computation].values():
            opcode = instruction.opcode
            before = next((name for name in instruction.operands if name in flying), None)
            if before is not None and opcode.endswith("-update"):
                flying[instruction.name] = flying.pop(before)
            elif before is not None and opcode.endswith("-done"):
                self._land(flying.pop(before), times, asynchronous=True)
            elif collectives := self._collectives(computation, instruction):
                for number, collective in enumerate(collectives):
                    flight = self.take_off(collective)
                    if opcode.endswith("-start"):
                        flying[instruction.name if number == 0 else f"{instruction.name}/{number}"] = flight
                    else:  # alone, or fused with products that run beside it
                        work = self._seconds(computation, instruction) if opcode == "fusion" else {}
                        _work([flight], work)
                        self._land(flight, times, asynchronous=opcode == "fusion")
            elif flying:
                _work(list(flying.values()), self._seconds(computation, instruction))
        for flight in flying.values():
            self._land(flight, times, asynchronous=True)

    def _collectives(self, computation: str, instruction: Instruction) -> list[Collective]:
        own = self.module.collective(computation, instruction)
        if own:
            return [own]
        if instruction.opcode not in ("fusion", "async-start", "call-start"):
            return []
        return [
            found
            for inner, _ in self.module.inner(instruction)
            for one in self.module.computations[inner].values()
            for found in self._collectives(inner, one)
        ]

    def _seconds(self, computation: str, instruction: Instruction) -> dict[str, float]:
        """Least time of one run of an instruction: of its kernels, and of its matrix products alone."""
        products = self.module.flops_of(computation, instruction) / self.chip.device_flops
        if instruction.opcode == "fusion" or not self.module.inner(instruction):
            rate = self.chip.hbm_rate / self.chip.devices
            moved = bytes_of(self.module, computation, instruction) / rate
            return {"behind_kernels": max(products, moved), "behind_products": products}
        total = {"behind_kernels": 0.0, "behind_products": products}
        for inner, count in self.module.inner(instruction):
            if inner not in self._times:
                every = [self._seconds(inner, one) for one in self.module.computations[inner].values()]
                self._times[inner] = {name: sum(one[name] for one in every) for name in total}
            total["behind_kernels"] += count * self._times[inner]["behind_kernels"]
        return total

    def _land(self, flight: _Flight, times: int, *, asynchronous: bool) -> None:
        hidden = self.found[flight.part]
        sent = times * flight.num_bytes
        hidden.sent += sent
        if asynchronous:
            hidden.asynchronous += sent
        for name, left in flight.left.items():
            share = 1 - left / flight.seconds if flight.seconds else 1.0
            setattr(hidden, name, getattr(hidden, name) + sent * share)


def _work(flying: list[_Flight], seconds: dict[str, float]) -> None:
    """Lets kernels of so many seconds hide what is on its way, the oldest first."""
    for name, available in seconds.items():
        for flight in flying:
            used = min(available, flight.left[name])
            flight.left[name] -= used
            available -= used
