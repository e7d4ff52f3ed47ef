"""What lives in a device's memory when a compiled program needs most of it: the temporaries by name.

XLA says how many bytes its temporaries take together, not which. This replays the schedule: a result lives from the
instruction that makes it to the last that reads it; views, loop carries and updates in place are the array that they
change; results of the program and of a loop's body lie where the argument or the carry lay. XLA packs better than
that at some places and worse at others, so the report says how far the two sums are apart.
"""

import dataclasses
import re
from typing import Any

from jaxrec.planning.hlo import Instruction, Module, device_bytes
from jaxrec.planning.traffic import root_of

_ALIASES = {"bitcast", "optimization-barrier", "opt-barrier", "add-dependency", "domain"}
Value = Any  # a frozenset of buffer names, or a list of values for a tuple
_NOTHING: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffer:
    """A temporary.

    Attributes:
      shape: as XLA writes it, without the layout.
      num_bytes: on one device, with padding.
      source: the JAX operation that made it.
    """

    shape: str
    num_bytes: float
    source: str


def peak(module: Module) -> list[Buffer]:
    """The temporaries that live together when their sum is largest, largest first."""
    _, buffers = _peak_of(module, module.entry)
    return sorted(buffers, key=lambda buffer: -buffer.num_bytes)


def _peak_of(module: Module, computation: str) -> tuple[float, list[Buffer]]:
    scope = list(module.computations[computation].values())
    outputs = _outputs(module, computation)
    values: dict[str, Value] = {}
    made: dict[str, tuple[int, Buffer]] = {}
    last: dict[str, int] = {}
    inner: dict[int, list[Buffer]] = {}
    for place, instruction in enumerate(scope):
        operands = [values.get(name, _NOTHING) for name in instruction.operands]
        value, new = _value(module, instruction, operands)
        if new and instruction.name not in outputs:
            shape = re.sub(r"\{[^}]*\}", "", instruction.shape)
            made[instruction.name] = (
                place,
                Buffer(shape=shape, num_bytes=new, source=instruction.source or instruction.name),
            )
        values[instruction.name] = value
        if instruction.opcode not in ("tuple", "get-tuple-element", "bitcast"):
            last.update(dict.fromkeys(_flat(operands), place))
        called = _called(module, instruction)
        if called:
            inner[place] = max((_peak_of(module, name) for name in called), key=lambda found: found[0])[1]
    best, buffers = 0.0, []
    events: dict[int, list[Buffer]] = {}
    for name, (place, buffer) in made.items():
        for moment in (place, last.get(name, place) + 1):
            events.setdefault(moment, []).append(buffer)
    live: dict[int, Buffer] = {}
    for place in range(len(scope)):
        for buffer in events.get(place, []):
            if live.pop(id(buffer), None) is None:
                live[id(buffer)] = buffer
        now = [*live.values(), *inner.get(place, [])]
        total = sum(buffer.num_bytes for buffer in now)
        if total > best:
            best, buffers = total, now
    return best, buffers


def _called(module: Module, instruction: Instruction) -> list[str]:
    """Computations that run while the instruction does, with temporaries of their own."""
    if instruction.opcode == "while":
        body = instruction.attribute("body")
        return [body] if body in module.computations else []
    if instruction.opcode == "conditional":
        return module.branches(instruction)
    if instruction.opcode in ("call", "async-start", "call-start"):
        name = module.called(instruction)
        return [name] if name else []
    return []


def _value(module: Module, instruction: Instruction, operands: list[Value]) -> tuple[Value, float]:
    """What an instruction's name stands for, and the bytes that it takes anew."""
    opcode = instruction.opcode
    first: Value = operands[0] if operands else _NOTHING
    if opcode in ("parameter", "constant"):
        return _NOTHING, 0.0  # arguments are counted apart
    if opcode == "tuple":
        return operands, 0.0
    if opcode == "get-tuple-element":
        index = re.search(r"index=(\d+)", instruction.rest)
        assert index is not None, "every get-tuple-element has an index"
        if isinstance(first, list) and int(index.group(1)) < len(first):
            return first[int(index.group(1))], 0.0
        return frozenset(_flat([first])), 0.0
    if opcode in _ALIASES or opcode == "while" or opcode.endswith(("-done", "-update")):
        return first, 0.0
    own = frozenset([instruction.name])
    size = device_bytes(instruction.shape)
    if opcode.endswith("-start"):  # its type holds the operands too
        return own, max(0.0, size - _operand_bytes(module, instruction))
    changed = _changed_in_place(module, instruction)
    if changed is not None and changed < len(operands):
        return operands[changed], 0.0
    return own, size


def _operand_bytes(module: Module, instruction: Instruction) -> float:
    scope = module.scope_of(instruction)
    return sum(device_bytes(scope[name].shape) for name in instruction.operands if name in scope)


def _changed_in_place(module: Module, instruction: Instruction) -> int | None:
    """The operand whose memory the result takes over."""
    if instruction.opcode in ("scatter", "dynamic-update-slice"):
        return 0
    if aliased := re.search(r"output_to_operand_aliasing=\{\{\}: \((\d+), \{\}\)", instruction.rest):
        return int(aliased.group(1))
    name = module.called(instruction) if instruction.opcode == "fusion" else None
    if name is None:
        return None
    scope, at = module.computations[name], root_of(module, name)
    while at.opcode in ("bitcast", "scatter", "dynamic-update-slice", "fusion"):
        place = 0
        if at.opcode == "fusion":
            inner = _changed_in_place(module, at)
            if inner is None:
                return None
            place = inner
        elif at.opcode == "bitcast" and root_of(module, name).opcode == "bitcast" and at.operands[0] in scope:
            place = 0
        at = scope[at.operands[place]]
    number = re.match(r"(\d+)\)", at.rest) if at.opcode == "parameter" else None
    is_update = root_of(module, name).opcode != "parameter"
    return int(number.group(1)) if number and is_update and _updates(module, name) else None


def _updates(module: Module, computation: str) -> bool:
    """Whether a fused computation's root changes something, rather than being a view of it."""
    at, scope = root_of(module, computation), module.computations[computation]
    while at.opcode == "bitcast" and at.operands[0] in scope:
        at = scope[at.operands[0]]
    return at.opcode in ("scatter", "dynamic-update-slice", "fusion")


def _outputs(module: Module, computation: str) -> set[str]:
    """Instructions whose results the computation gives: they lie where its caller keeps them."""
    scope = module.computations[computation]
    found, queue = set(), [module.roots[computation]]
    while queue:
        name = queue.pop()
        if name in scope and name not in found:
            found.add(name)
            if scope[name].opcode in ("tuple", "bitcast", "get-tuple-element", "copy-done"):
                queue += scope[name].operands
    return found


def _flat(values: list[Value]) -> list[str]:
    names: list[str] = []
    for value in values:
        names += _flat(value) if isinstance(value, list) else list(value)
    return names
