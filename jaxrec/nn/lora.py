"""Low-rank adapters (LoRA): what fine-tuning adds to a kernel W that it leaves as it is: W + alpha / rank * A B.

A is random and B is 0 at the start, so that the function is that of the kernel alone.

Source: Hu et al., ICLR 2022.
D = features in, F = features out, R = rank.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxrec.nn.layers import Dense, affine, parameter

ADAPTER, KERNEL = "lora", "kernel"  # the adapter of `x_kernel` is `x_lora`


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """Size of the adapters.

    Attributes:
      scale: alpha / rank.
    """

    rank: int
    scale: float


class Adapter(nnx.Module):
    """`[..., D] -> [..., F]`: scale * x A B."""

    def __init__(
        self,
        shape: Sequence[int],
        names: Sequence[str | None],
        spec: LoraSpec,
        *,
        num_in: int,
        rngs: nnx.Rngs,
    ):
        """Makes the adapter of a kernel.

        Args:
          shape, names: of the kernel; its first `num_in` dims are D, the others F.
        """
        self.scale = spec.scale
        a = jax.random.normal(rngs.params(), (*shape[:num_in], spec.rank)) / math.sqrt(
            math.prod(shape[:num_in])
        )
        self.a = parameter(a, *names[:num_in], None)
        self.b = parameter(jnp.zeros((spec.rank, *shape[num_in:])), None, *names[num_in:])

    def __call__(self, x: Float[Array, "*b d"], columns: slice = slice(None)) -> Float[Array, "*b f"]:
        """Of all features out, or of some."""
        rank = self.b.shape[0]
        a, b = self.a[...].reshape(-1, rank), self.b[...].reshape(rank, -1)[:, columns]
        inner = affine(x, a, jnp.zeros(rank)) * self.scale
        return affine(inner, b, jnp.zeros(b.shape[1]))


class AdaptedDense(Dense):
    """A dense map whose kernel has an adapter; without a spec, the dense map."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        names: tuple[str | None, str | None],
        *,
        lora: LoraSpec | None,
        rngs: nnx.Rngs,
    ):
        super().__init__(in_dim, out_dim, names, rngs=rngs)
        self.lora = Adapter((in_dim, out_dim), names, lora, num_in=1, rngs=rngs) if lora else None

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b f"]:
        y = super().__call__(x)
        return y if self.lora is None else y + self.lora(x)


def adapter_of(kernel: str) -> str:
    """The path of A beside the path of a kernel."""
    return f"{kernel.removesuffix(KERNEL)}{ADAPTER}.a"


def merge_adapters(dense: dict[Any, Any], spec: LoraSpec) -> dict[Any, Any]:
    """The parameters of the same function without adapters: each is added to its kernel."""
    merged = {
        name: merge_adapters(value, spec) if isinstance(value, dict) else value
        for name, value in dense.items()
        if not str(name).endswith(ADAPTER)
    }
    for name in dense.keys() - merged.keys():
        kernel, adapter = name.removesuffix(ADAPTER) + KERNEL, dense[name]
        merged[kernel] = dense[kernel] + spec.scale * jnp.tensordot(adapter["a"], adapter["b"], 1)
    return merged
