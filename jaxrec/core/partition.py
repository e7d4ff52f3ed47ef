"""Logical axis names and where they lie on the mesh: the whole parallel layout is this one table."""

from collections.abc import Sequence
from typing import Literal

from jax.experimental.layout import Format
from jax.experimental.layout import Layout as ArrayLayout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrec.core.mesh import ALL_AXES, DATA, MODEL

Rules = dict[str, tuple[str, ...] | None]
RULES: Rules = {
    "batch": ALL_AXES,  # the encoder is data-parallel over every device
    "row": ALL_AXES,  # table rows: over every device, on every mesh shape
    "embed": None,
    "mlp": None,
    "heads": None,
    "position": None,
    "vocab": None,
    "label": None,
}
# Rows from this width on lie in memory as rows on every platform. Left to itself, the compiler for TPUs keeps rows
# below 128 entries as columns, which saves padding, and turns the whole table round for the gather and the scatter of
# each step. Narrower rows would be little but padding.
ROW_MAJOR_FROM = 32
# How the encoder's parameters lie. Tables and batches lie alike in all of them.
Layout = Literal["replicated", "fsdp", "tensor"]
LAYOUTS: dict[Layout, Rules] = {
    "replicated": RULES,
    "fsdp": RULES | {"embed": (DATA,)},  # a shard each, gathered where a layer needs them
    "tensor": RULES | {"mlp": (MODEL,), "heads": (MODEL,)},  # a share of the heads and of the MLP each
}


def spec(*names: str | None, layout: Layout = "replicated") -> PartitionSpec:
    """The partition of an array whose dims bear these logical names (None = not split).

    Raises:
      ValueError: a name is not in the table. A typing error must never replicate silently.
    """
    rules = LAYOUTS[layout]
    unknown = [name for name in names if name is not None and name not in rules]
    if unknown:
        raise ValueError(f"unknown logical axis {unknown[0]!r}; core/partition.py knows {', '.join(rules)}.")
    return PartitionSpec(*(None if name is None else rules[name] for name in names))


def sharding(mesh: Mesh, *names: str | None) -> NamedSharding:
    """`spec(*names)` on `mesh`."""
    return NamedSharding(mesh, spec(*names))


def row_major(where: NamedSharding, shape: Sequence[int]) -> Format | NamedSharding:
    """`where` for rows `[R, W]` of a table or its slots, with the entries of a row side by side in memory.

    Give it to `out_shardings` of whatever makes or changes such an array: else the compiler is free to turn it round.
    """
    if len(shape) != 2 or shape[1] < ROW_MAJOR_FROM:
        return where
    return Format(ArrayLayout((0, 1)), where)
