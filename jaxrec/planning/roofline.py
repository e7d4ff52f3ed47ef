"""The time that a step cannot beat on a machine: its operations and bytes over the chip's published peaks.

Each of the three resources is taken as fully used and fully overlapped with the others, so the step takes as long as
the busiest. What a program of fixed shapes moves is what it was compiled for; the ragged exchange's landing areas are
a little larger than what uniform ids put into them, which is told apart.
"""

import dataclasses
import math

from jaxrec.core.chips import Chip
from jaxrec.core.mesh import ALL_AXES
from jaxrec.core.precision import compute_dtype
from jaxrec.embedding.exchange import SCOPE
from jaxrec.planning.hlo import Collective
from jaxrec.planning.program import Program
from jaxrec.planning.topology import Topology
from jaxrec.planning.traffic import hbm_bytes
from jaxrec.training.flops import recomputed_flops, step_flops, tower_map_flops

EXCHANGE, DENSE = "exchange", "dense"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """A collective and where it runs.

    Attributes:
      part: EXCHANGE (ids, rows and their gradients) or DENSE (everything else).
      axis: the mesh axes along which its devices lie.
      device_bytes: that a device sends in a step.
      outside: the share of them that leaves the slice or the NVLink domain.
    """

    collective: Collective
    part: str
    axis: str
    device_bytes: float
    outside: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a step does; all devices' operations, one device's bytes.

    Attributes:
      model_flops: by the formula of the model: what utilisation is held against.
      compiled_flops: of the program's matrix products, recomputation and all.
      formula_flops: what `compiled_flops` should be by formula.
      hbm_bytes: by opcode.
      exchange_rows_bytes: what the exchange would carry if nothing but the ids' own rows and gradients travelled.
    """

    model_flops: float
    compiled_flops: float
    formula_flops: float
    hbm_bytes: dict[str, float]
    links: list[Link]
    exchange_rows_bytes: float

    def sent(self, part: str | None = None, axis: str | None = None) -> float:
        """Bytes that a device sends in a step."""
        return sum(
            link.device_bytes
            for link in self.links
            if part in (None, link.part) and axis in (None, link.axis)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """The least time of a step, in seconds, and what it hangs on.

    Attributes:
      events_per_second: of full rows, over the whole machine.
      mfu: model FLOPs over the peak in that time.
    """

    compute: float
    hbm: float
    interconnect: float
    events_per_second: float
    mfu: float

    @property
    def seconds(self) -> float:
        """Of a step."""
        return max(self.compute, self.hbm, self.interconnect)

    @property
    def resource(self) -> str:
        """The busiest."""
        times = {"compute": self.compute, "hbm": self.hbm, "interconnect": self.interconnect}
        return max(times, key=lambda name: times[name])


def measure_work(program: Program) -> Work:
    """See `Work`."""
    case, setup, module = program.case, program.setup, program.module
    config, devices = case.config, case.topology.num_devices
    tasks, rows, length = dict(config.tasks), config.global_batch_size, config.data.history_length
    facts = case.facts
    model_flops = step_flops(
        config.model, tasks, facts.num_items, len(facts.behaviours), rows, length, facts.num_text_tokens
    )
    extra = recomputed_flops(config.model, tasks, facts.num_items, rows, length, devices)
    links = [make_link(collective, case.topology, config.mesh_shape) for collective in module.collectives()]
    return Work(
        model_flops=model_flops,
        compiled_flops=module.flops() * devices,
        formula_flops=model_flops + extra + tower_map_flops(config.model, rows, length),
        hbm_bytes=hbm_bytes(module),
        links=links,
        exchange_rows_bytes=_rows_bytes(program, setup.tables),
    )


def _rows_bytes(program: Program, tables: dict) -> float:
    """Rows there and gradients back, float32, for every id of a device, less those that it owns itself."""
    case = program.case
    devices = case.topology.num_devices
    ids = case.config.global_batch_size // devices * case.config.data.history_length
    total = 0.0
    for table in tables.values():
        # Each ranking task looks its targets up as well.
        looked_up = ids * (1 + len(case.config.tasks) if table.keyed_by == "item" else 1)
        total += 2 * looked_up * table.dim * 4
    if (text := case.config.model.text) is not None:  # vectors of texts travel one way
        width = text.encoder.embed_dim * compute_dtype(text.encoder.dtype).itemsize
        total += ids * (1 + len(case.config.tasks)) * width
    return total * (devices - 1) / devices


def make_link(collective: Collective, topology: Topology, mesh_shape: tuple[int, int]) -> Link:
    """Where a collective runs."""
    domain = topology.domain_devices
    homes = [member // domain for member in collective.members]
    inside = homes.count(homes[0]) if homes else 1
    size = max(1, collective.group)
    if size == inside:
        outside = 0.0
    elif collective.kind in ("all-to-all", "ragged-all-to-all"):
        outside = (size - inside) / (size - 1)
    else:  # domain by domain: what enters a domain is shared by its members' links to the network
        domains = size / inside
        outside = (domains - 1) / domains / inside * size / (size - 1)
    return Link(
        collective=collective,
        part=EXCHANGE if SCOPE in collective.source or collective.kind.startswith("ragged") else DENSE,
        axis=axis_of(collective.members, resolve(mesh_shape, topology.num_devices)),
        device_bytes=collective.sent_bytes,
        outside=outside,
    )


def resolve(mesh_shape: tuple[int, int], devices: int) -> tuple[int, int]:
    """The mesh's sizes; -1 is what the other leaves."""
    data, model = mesh_shape
    return (devices // model, model) if data == -1 else (data, devices // data)


def axis_of(members: tuple[int, ...], mesh_shape: tuple[int, int]) -> str:
    """The mesh axes along which a group's members differ."""
    places = [divmod(member, mesh_shape[1]) for member in members]
    axes = [axis for i, axis in enumerate(ALL_AXES) if len({place[i] for place in places}) > 1]
    return "+".join(axes) or "none"


def bound(program: Program, work: Work) -> Bound | None:
    """The roofline of the chip; None for a machine without published peaks."""
    topology, config = program.case.topology, program.case.config
    chip = topology.chip
    if chip is None:
        return None
    compute = work.compiled_flops / (chip.flops * topology.num_chips)
    hbm = sum(work.hbm_bytes.values()) * chip.devices / chip.hbm_rate
    interconnect = sum(link_seconds(link, topology, chip) for link in work.links)
    found = Bound(compute=compute, hbm=hbm, interconnect=interconnect, events_per_second=0.0, mfu=0.0)
    return dataclasses.replace(
        found,
        events_per_second=config.global_batch_size * config.data.history_length / found.seconds,
        mfu=work.model_flops / found.seconds / (chip.flops * topology.num_chips),
    )


def link_seconds(link: Link, topology: Topology, chip: Chip) -> float:
    """Least time of a collective: the devices of a chip share its links."""
    sent = link.device_bytes * chip.devices
    is_swap = link.collective.kind in ("all-to-all", "ragged-all-to-all")
    rate = all_to_all_rate(topology, chip) if is_swap else chip.link_rate
    return max(sent * (1 - link.outside) / rate, sent * link.outside / chip.network_rate)


def all_to_all_rate(topology: Topology, chip: Chip) -> float:
    """Bytes a second that a chip of a torus gets rid of when all send to all.

    Half of the bytes cross the middle of the longest dim, of length A: N chips x bytes / 4 in a direction, over the
    2 N / A links of the cut (the torus is closed). A switched domain has no such middle.
    """
    if chip.is_gpu:
        return chip.link_rate
    dims = [size for size in topology.shape if size > 1]
    link = chip.link_rate / (2 * (3 if len(topology.shape) == 3 else 2))
    return min(chip.link_rate, 8 * link / max(dims)) if dims else math.inf
