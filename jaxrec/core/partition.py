"""Logical axis names and where they lie on the mesh: the whole parallel layout is this one table."""

from typing import Literal

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
