"""Reading a compiled program: operations and bytes of collectives, loop bodies counted as often as they run.

XLA's own cost analysis counts the body of a loop once. This walks the text of the optimised module instead, from the
entry through fusions, calls and loops with the product of the trip counts. Shapes in a partitioned module are those
of one device, hence so is everything here.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator

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
      groups: their ids, one group (None where the text does not spell them out).
      source: the JAX operation that it came from, as the metadata say.
    """

    kind: str
    result_bytes: float
    count: int
    group: int
    source: str

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
        self.entry = ""
        current: dict[str, Instruction] | None = None
        for line in text.splitlines():
            header = _COMPUTATION.match(line)
            if header:
                current = self.computations[header.group(2)] = {}
                if header.group(1):
                    self.entry = header.group(2)
            elif line.startswith("}"):
                current = None
            elif current is not None and (instruction := _read(line)):
                current[instruction.name] = instruction

    def walk(self) -> Iterator[tuple[str, Instruction, int]]:
        """Every instruction that runs, with its computation and how often."""
        yield from self._walk(self.entry, 1)

    def _walk(self, name: str, times: int) -> Iterator[tuple[str, Instruction, int]]:
        for instruction in self.computations.get(name, {}).values():
            yield name, instruction, times
            if instruction.opcode == "while":
                body = instruction.attribute("body")
                if body:
                    yield from self._walk(body, times * self.trip_count(instruction))
            elif instruction.opcode in ("fusion", "call", "async-start", "call-start", "custom-call"):
                inner = instruction.attribute("calls") or instruction.attribute("to_apply")
                if inner:
                    yield from self._walk(inner, times)
            elif instruction.opcode == "conditional":
                for inner in re.findall(r"%([\w.\-]+)", instruction.rest.split("branch_computations=")[-1]):
                    if inner in self.computations:
                        yield from self._walk(inner, times)

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
        total = 0.0
        for computation, instruction, times in self.walk():
            if instruction.opcode in ("dot", "convolution"):
                total += times * self._product_flops(computation, instruction)
        return total

    def _product_flops(self, computation: str, instruction: Instruction) -> float:
        scope = self.computations[computation]
        shapes = [dims(scope[name].shape) for name in instruction.operands if name in scope]
        output = float(math.prod(dims(instruction.shape)))
        if instruction.opcode == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
            sizes = [shapes[0][int(d)] for d in contracted.group(1).split(",") if d] if contracted else []
            return 2.0 * output * math.prod(sizes)
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
        found: dict[tuple[str, float, int, str], int] = defaultdict(int)
        for _, instruction, times in self.walk():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES or not times:
                continue
            size = nbytes(instruction.shape)
            if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
                size -= nbytes(" ".join(self._operand_shapes(instruction)))  # the type holds the operand too
            source = re.search(r'op_name="([^"]*)"', instruction.rest)
            key = (kind, size, self._group_size(instruction.rest), source.group(1) if source else "")
            found[key] += times
        return [
            Collective(kind, size, count, group, source)
            for (kind, size, group, source), count in found.items()
        ]

    def _operand_shapes(self, instruction: Instruction) -> list[str]:
        for scope in self.computations.values():
            if scope.get(instruction.name) is instruction:
                return [scope[name].shape for name in instruction.operands if name in scope]
        return []

    def _group_size(self, text: str) -> int:
        """Devices of one replica group, in the three ways that XLA writes them."""
        if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
            sizes = dict(re.findall(r"'([^']+)'=(\d+)", named.group(1)))
            return math.prod(
                int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named.group(2)) if axis in sizes
            )
        if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text):
            return int(iota.group(2))
        if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
            return listed.group(1).count(",") + 1
        return self.num_devices


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
