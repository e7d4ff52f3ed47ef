"""Bytes that a compiled program moves between main memory and the cores, by walking its schedule.

Counted are operands and results of what runs as one kernel: fusions, products, sorts, copies. What is read or written
in part counts in part: a gather the rows that it takes, a scatter or an update in place the rows that it touches.
Arrays in a TPU's fast memory cost nothing. Loop bodies count as often as they run.
"""

from collections import defaultdict

from jaxrec.planning.hlo import Instruction, Module, device_bytes, nbytes

# Instructions that move nothing by themselves.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "optimization-barrier", "async-start", "async-update", "async-done",
    "call-start", "call-done", "copy-done", "domain", "add-dependency", "get-dimension-size",
}  # fmt: skip
_VIEWS = {"bitcast", "reshape", "transpose", "convert", "copy"}


def hbm_bytes(module: Module) -> dict[str, float]:
    """Bytes of main memory that a device reads and writes in a step, by opcode."""
    found: dict[str, float] = defaultdict(float)
    for computation, instruction, times in module.walk(into_fusions=False):
        if times and (moved := bytes_of(module, computation, instruction)):
            found[instruction.opcode.removesuffix("-start")] += times * moved
    return dict(found)


def bytes_of(module: Module, computation: str, instruction: Instruction) -> float:
    """Bytes of main memory of one run of an instruction, without those of a loop's or a branch's computation."""
    if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
        return 0.0
    return _moved(module, computation, instruction)


def _moved(module: Module, computation: str, instruction: Instruction) -> float:
    """Bytes of one run of an instruction."""
    scope = module.computations[computation]
    operands = [scope[name] for name in instruction.operands if name in scope]
    result = device_bytes(instruction.shape)
    if instruction.opcode == "fusion" and (inner := module.called(instruction)):
        read = sum(
            _read(module, inner, index, device_bytes(operand.shape)) for index, operand in enumerate(operands)
        )
        return read + min(result, _written(module, inner, result))
    if instruction.opcode == "copy-start":  # its type holds the operand and the result
        return result
    if instruction.opcode in ("slice", "slice-start"):
        # What is read is as large as the result; the type of a start holds the operand, too, and a scalar.
        (operand,) = operands
        asynchronous = instruction.opcode == "slice-start"
        read = nbytes(instruction.shape) - (nbytes(operand.shape) + 4 if asynchronous else 0)
        written = result - (device_bytes(operand.shape) if asynchronous else 0)
        return (read if device_bytes(operand.shape) else 0.0) + written
    if instruction.opcode in ("gather", "dynamic-slice"):
        return 2 * result + sum(device_bytes(operand.shape) for operand in operands[1:])
    if instruction.opcode in ("scatter", "dynamic-update-slice"):
        return 2 * device_bytes(operands[-1 if instruction.opcode == "scatter" else 1].shape)
    if instruction.opcode.endswith(
        "-start"
    ):  # a collective: its type holds the operand where it is asynchronous
        return result
    return result + sum(device_bytes(operand.shape) for operand in operands)


def _read(module: Module, computation: str, index: int, whole: float) -> float:
    """Bytes that a fused computation reads of its parameter `index`, which has `whole`."""
    scope = module.computations[computation]
    names = [i.name for i in scope.values() if i.opcode == "parameter" and i.rest.startswith(f"{index})")]
    return min(whole, sum(_uses(module, computation, name, whole) for name in names))


def _uses(module: Module, computation: str, name: str, whole: float) -> float:
    total = 0.0
    for user in module.computations[computation].values():
        operands = user.operands
        if name not in operands:
            continue
        place = operands.index(name)
        if place == 0 and user.opcode in ("gather", "dynamic-slice"):
            total += device_bytes(user.shape)
        elif place == 0 and user.opcode in ("scatter", "dynamic-update-slice"):
            update = operands[-1 if user.opcode == "scatter" else 1]
            total += device_bytes(module.computations[computation][update].shape)
        elif user.opcode in _VIEWS:
            total += _uses(module, computation, user.name, whole)
        elif user.opcode == "fusion" and (inner := module.called(user)):
            total += _read(module, inner, place, whole)
        else:
            return whole
    return total


def _written(module: Module, computation: str, whole: float) -> float:
    """Bytes that a fused computation writes: those of the update where its root changes an operand in place."""
    root = root_of(module, computation)
    scope = module.computations[computation]
    if root.opcode == "tuple":
        return sum(_written_by(module, computation, scope[name]) for name in root.operands if name in scope)
    return min(whole, _written_by(module, computation, root))


def _written_by(module: Module, computation: str, root: Instruction) -> float:
    scope = module.computations[computation]
    while root.opcode in ("bitcast", "reshape") and root.operands and root.operands[0] in scope:
        root = scope[root.operands[0]]
    if root.opcode in ("scatter", "dynamic-update-slice"):
        update = root.operands[-1 if root.opcode == "scatter" else 1]
        return device_bytes(scope[update].shape)
    if root.opcode == "fusion" and (inner := module.called(root)):
        return _written(module, inner, device_bytes(root.shape))
    return device_bytes(root.shape)


def root_of(module: Module, computation: str) -> Instruction:
    """The instruction whose value the computation gives."""
    return module.computations[computation][module.roots[computation]]
