"""Reading a compiled program: matrix products and collectives, loop bodies counted as often as they run.

XLA's own cost analysis counts the body of a loop once. This walks the text of the optimised module instead, from the
entry through fusions, calls and loops with the product of the trip counts. Shapes in a partitioned module are those
of one device, hence so is everything here.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

ITEM_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "f16": 2,
    "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8,
}  # fmt: skip
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      shape: the text of its type.
      rest: what follows the opcode: operands and attributes.
    """

    name: str
    shape: str
    opcode: str
    rest: str

    def attribute(self, name: str) -> str | None:
        """The computation that an attribute such as `body` names."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else None

    @property
    def source(self) -> str:
        """The JAX operation that it came from, as the metadata say; "" where they do not."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else ""

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        depth, end = 1, 0
        for end, character in enumerate(self.rest):  # noqa: B007  the position is what is wanted
            depth += (character == "(") - (character == ")")
            if not depth:
                break
        return re.findall(r"%([\w.\-]+)", self.rest[:end])


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of the program.

    Attributes:
      result_bytes: of its result on one device, once.
      count: times it runs.
      group: devices that take part together.
      source: the JAX operation that it came from, as the metadata say.
      members: one such group, by the devices' places in the mesh.
    """

    kind: str
    result_bytes: float
    count: int
    group: int
    source: str
    members: tuple[int, ...] = ()

    @property
    def sent_bytes(self) -> float:
        """Bytes that a device sends, all runs, by the bandwidth-optimal algorithm of each kind."""
        n, size = max(1, self.group), self.result_bytes * self.count
        share = (n - 1) / n
        if self.kind == "all-reduce":
            return 2 * size * share
        if self.kind == "reduce-scatter":
            return size * (n - 1)
        return size if self.kind == "collective-permute" else size * share


class Module:
    """A compiled module's text, read once."""

    def __init__(self, text: str, num_devices: int):
        self.num_devices = num_devices
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, str] = {}
        self._flops: dict[str, float] = {}
        self.entry = name = ""
        current: dict[str, Instruction] | None = None
        for line in text.splitlines():
            header = _COMPUTATION.match(line)
            if header:
                name = header.group(2)
                current = self.computations[name] = {}
                if header.group(1):
                    self.entry = name
            elif line.startswith("}"):
                current = None
            elif current is not None and (instruction := _read(line)):
                current[instruction.name] = instruction
                if line.lstrip().startswith("ROOT "):
                    self.roots[name] = instruction.name

    def walk(self, *, into_fusions: bool = True) -> Iterator[tuple[str, Instruction, int]]:
        """Every instruction that runs, with its computation and how often."""
        yield from self._walk(self.entry, 1, into_fusions)

    def _walk(self, name: str, times: int, into_fusions: bool) -> Iterator[tuple[str, Instruction, int]]:
        for instruction in self.computations.get(name, {}).values():
            yield name, instruction, times
            if into_fusions or instruction.opcode != "fusion":
                for inner, count in self.inner(instruction):
                    yield from self._walk(inner, times * count, into_fusions)

    def inner(self, instruction: Instruction) -> list[tuple[str, int]]:
        """The computations that an instruction runs, and how often."""
        if instruction.opcode == "while":
            body = instruction.attribute("body")
            return [(body, self.trip_count(instruction))] if body in self.computations else []
        if instruction.opcode in ("fusion", "call", "async-start", "call-start", "custom-call"):
            called = self.called(instruction)
            return [(called, 1)] if called else []
        return (
            [(name, 1) for name in self.branches(instruction)] if instruction.opcode == "conditional" else []
        )

    def called(self, instruction: Instruction) -> str | None:
        """The computation of a fusion or a call."""
        name = instruction.attribute("calls") or instruction.attribute("to_apply")
        return name if name in self.computations else None

    def branches(self, instruction: Instruction) -> list[str]:
        """The computations of a conditional."""
        named = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
        texts = named.group(1) if named else " ".join(
            re.findall(r"(?:true|false)_computation=(%?[\w.\-]+)", instruction.rest)
        )  # fmt: skip
        return [name for name in re.findall(r"%?([\w.\-]+)", texts) if name in self.computations]

    def trip_count(self, loop: Instruction) -> int:
        """How often a loop runs; 0 for one whose end is data: the further rounds of an exchange, which are rare."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known.group(1))
        condition = self.computations.get(loop.attribute("condition") or "", {})
        compares = [i for i in condition.values() if i.opcode == "compare"]
        fused = [i.attribute("calls") for i in condition.values() if i.opcode == "fusion"]
        for inner in fused:
            compares += [i for i in self.computations.get(inner or "", {}).values() if i.opcode == "compare"]
        bounds = [
            int(found.group(1))
            for i in condition.values()
            if i.opcode == "constant"
            and (found := re.match(r"(\d+)\)", i.rest))
            and i.shape.startswith("s32[]")
        ]
        if len(bounds) == 1 and any("direction=LT" in i.rest for i in compares):
            return bounds[0]
        return 0

    def flops(self) -> float:
        """Operations of all matrix products and convolutions; a multiply-add counts as two."""
        return self._flops_in(self.entry)

    def flops_of(self, computation: str, instruction: Instruction) -> float:
        """The same of one run of an instruction."""
        if instruction.opcode in ("dot", "convolution") or "__cublas$" in instruction.rest:
            return self._product_flops(computation, instruction)
        return sum(count * self._flops_in(inner) for inner, count in self.inner(instruction) if count)

    def _flops_in(self, computation: str) -> float:
        if computation not in self._flops:
            self._flops[computation] = sum(
                self.flops_of(computation, one) for one in self.computations[computation].values()
            )
        return self._flops[computation]

    def _product_flops(self, computation: str, instruction: Instruction) -> float:
        scope = self.computations[computation]
        shapes = [dims(scope[name].shape) for name in instruction.operands if name in scope]
        output = float(math.prod(dims(instruction.shape)))
        if instruction.opcode == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
            sizes = [shapes[0][int(d)] for d in contracted.group(1).split(",") if d] if contracted else []
            return 2.0 * output * math.prod(sizes)
        if instruction.opcode == "custom-call":  # a GPU's library; the dims stand in its settings
            contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.rest)
            places = re.findall(r"\d+", contracted.group(1)) if contracted else []
            return 2.0 * output * math.prod(shapes[0][int(d)] for d in places)
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
        assert labels is not None, f"a convolution without dim_labels: {instruction.rest[:80]}"
        lhs, rhs, out = labels.groups()
        features = shapes[1][rhs.index("i")]
        groups = re.search(r"batch_group_count=(\d+)", instruction.rest)
        pairs = 1.0
        for position in sorted(set(rhs) - {"i", "o"}):
            pairs *= _valid_pairs(
                instruction.rest, int(position), shapes[0][lhs.index(position)],
                shapes[1][rhs.index(position)], dims(instruction.shape)[out.index(position)],
            )  # fmt: skip
            output /= dims(instruction.shape)[out.index(position)]
        return 2.0 * output * features * pairs / (int(groups.group(1)) if groups else 1)

    def collectives(self) -> list[Collective]:
        """Every collective, those of loop bodies once with their count."""
        found: dict[tuple[str, float, tuple[int, ...], str], int] = defaultdict(int)
        for computation, instruction, times in self.walk():
            one = self.collective(computation, instruction)
            if one and times:
                found[one.kind, one.result_bytes, one.members, one.source] += times
        return [
            Collective(kind, size, count, len(members), source, members)
            for (kind, size, members, source), count in found.items()
        ]

    def collective(self, computation: str, instruction: Instruction) -> Collective | None:
        """One run of a collective; None for another instruction."""
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return None
        size = nbytes(instruction.shape)
        scope = self.computations[computation]
        operands = [scope[name] for name in instruction.operands if name in scope]
        if instruction.opcode.endswith("-start") and kind != "all-reduce":  # the type holds the operands too
            size -= sum(nbytes(operand.shape) for operand in operands)
        # Where the compiler made a collective asynchronous it may forget its name; its operands remember.
        source = next((one.source for one in [instruction, *operands] if one.source), "")
        members = self._members(instruction.rest)
        return Collective(kind, size, 1, len(members), source, members)

    def scope_of(self, instruction: Instruction) -> dict[str, Instruction]:
        """The computation that an instruction stands in."""
        return next(
            (scope for scope in self.computations.values() if scope.get(instruction.name) is instruction), {}
        )

    def _members(self, text: str) -> tuple[int, ...]:
        """One replica group, in the three ways that XLA writes them."""
        if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
            sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named.group(1))}
            chosen = re.findall(r"'([^']+)'", named.group(2))
            ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
            first = ids[tuple(slice(None) if axis in chosen else 0 for axis in sizes)]
            return tuple(int(i) for i in first.reshape(-1))
        if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
            shape = [int(size) for size in iota.group(3).split(",")]
            ids = np.arange(math.prod(shape)).reshape(shape)
            if iota.group(4):
                ids = ids.transpose([int(axis) for axis in iota.group(4).split(",")])
            return tuple(int(i) for i in ids.reshape(-1)[: int(iota.group(2))])
        if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
            return tuple(int(i) for i in listed.group(1).split(","))
        return tuple(range(self.num_devices))


def _read(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if not found:
        return None
    opcode = _OPCODE.search(found.group(2))
    if not opcode:
        return None
    text = found.group(2)
    return Instruction(found.group(1), text[: opcode.start(1)].strip(), opcode.group(1), text[opcode.end() :])


def dims(shape: str) -> list[int]:
    """Sizes of the first array in a type."""
    found = _SHAPE.search(shape)
    return [int(size) for size in found.group(2).split(",") if size] if found else []


def nbytes(shape: str) -> float:
    """Bytes of all arrays in a type, without padding."""
    return sum(
        ITEM_BYTES.get(kind, 0) * math.prod(int(size) for size in sizes.split(",") if size)
        for kind, sizes in _SHAPE.findall(shape)
    )


def in_hbm(layout: str) -> bool:
    """Whether an array with this layout lies in the device's main memory; a TPU's fast memory is space 1."""
    return not ("T(" in layout and "S(1)" in layout) and "S(2)" not in layout


def device_bytes(shape: str) -> float:
    """Bytes of main memory that all arrays of a type take, with the padding of their tiles."""
    return sum(
        _padded(dims_, layout) * ITEM_BYTES.get(kind, 0)
        for kind, dims_, layout in ((k, _sizes(d), lay or "") for k, d, lay in _ARRAY.findall(shape))
        if in_hbm(layout)
    )


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size]


def _padded(sizes: list[int], layout: str) -> float:
    """Elements of an array, the dims that a tile covers rounded up to it."""
    order, _, rest = layout.partition(":")
    tile = _TILE.search(rest)
    if tile is None or not sizes:
        return float(math.prod(sizes))
    minor_to_major = [int(dim) for dim in order.split(",") if dim]
    padded = list(sizes)
    for dim, multiple in zip(minor_to_major, reversed(_sizes(tile.group(1))), strict=False):
        padded[dim] = -(-padded[dim] // multiple) * multiple
    return float(math.prod(padded))


def _valid_pairs(attributes: str, position: int, size: int, kernel: int, output: int) -> float:
    """(output, kernel) positions of one spatial dim that meet an element: batch dims of a matrix product are written
    as spatial ones with dilations that let each kernel position meet one element only."""

    def per_dim(name: str, default: str) -> str:
        found = re.search(rf"\b{name}=([\w\-]+)", _window(attributes))
        return found.group(1).split("x")[position] if found else default

    stride, dilation = int(per_dim("stride", "1")), int(per_dim("lhs_dilate", "1"))
    kernel_dilation, low = int(per_dim("rhs_dilate", "1")), int(per_dim("pad", "0_0").split("_")[0])
    count = 0
    for out in range(output):
        for k in range(kernel):
            at = out * stride - low + k * kernel_dilation
            count += at >= 0 and at % dilation == 0 and at // dilation < size
    return float(count)


def _window(attributes: str) -> str:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    return found.group(1) if found else ""
