"""Logical axis names and where they lie on the mesh: the whole parallel layout is this one table."""

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrec.core.mesh import ALL_AXES

RULES: dict[str, tuple[str, ...] | None] = {
    "batch": ALL_AXES,  # the encoder is data-parallel over every device
    "row": ALL_AXES,  # table rows: over every device, on every mesh shape
    "embed": None,
    "mlp": None,
    "heads": None,
    "position": None,
    "vocab": None,
    "label": None,
}


def spec(*names: str | None) -> PartitionSpec:
    """The partition of an array whose dims bear these logical names (None = not split).

    Raises:
      ValueError: a name is not in the table. A typing error must never replicate silently.
    """
    unknown = [name for name in names if name is not None and name not in RULES]
    if unknown:
        raise ValueError(f"unknown logical axis {unknown[0]!r}; core/partition.py knows {', '.join(RULES)}.")
    return PartitionSpec(*(None if name is None else RULES[name] for name in names))


def sharding(mesh: Mesh, *names: str | None) -> NamedSharding:
    """`spec(*names)` on `mesh`."""
    return NamedSharding(mesh, spec(*names))
