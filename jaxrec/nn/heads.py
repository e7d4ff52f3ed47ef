"""Heads: the logits of K behaviours of a pair (user, item).

Every head reads the same features of a pair, the two vectors and their product, and ends in one linear map a
behaviour. What lies between is shared by all behaviours (`SharedBottom`), mixed for each of them from shared experts
(`MMoE`), or from shared and own experts over several levels (`PLE`).

D = dim of the vectors, I = features in, K = behaviours, O = own experts of a behaviour, S = shared experts, X = all
experts (K O + S), H = expert dim.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxrec.nn.layers import Dense, glorot_normal, parameter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """Base of the heads' configs."""

    def make(self, dim: int, num_behaviours: int, *, rngs: nnx.Rngs) -> nnx.Module:
        """The head over vectors of `dim` entries: called with queries and items, it gives float32 logits."""
        raise TypeError(f"{type(self).__name__} must define make")

    def multiply_adds(self, dim: int, num_behaviours: int) -> int:
        """Of one pair, for the count of operations."""
        raise TypeError(f"{type(self).__name__} must define multiply_adds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedBottom(Head):
    """One hidden layer as wide as the vectors, which all behaviours share.

    Source: Caruana, Machine Learning 1997.
    """

    def make(self, dim: int, num_behaviours: int, *, rngs: nnx.Rngs) -> nnx.Module:
        """See `Head`."""
        return SharedBottomHead(dim, num_behaviours, rngs=rngs)

    def multiply_adds(self, dim: int, num_behaviours: int) -> int:
        """See `Head`."""
        return 3 * dim * dim + dim * num_behaviours


@dataclasses.dataclass(frozen=True, kw_only=True)
class PLE(Head):
    """Progressive layered extraction: levels of experts, some of them shared and some of one behaviour alone.

    Source: Tang et al., RecSys 2020. Experts are one layer, and the towers above the last level are linear.

    Attributes:
      num_layers: levels; the experts of each read what the gates of the level before have mixed.
      shared_experts: of each level, for all behaviours.
      own_experts: of each level, for each behaviour.
      expert_dim: width of every expert.
    """

    num_layers: int = 2
    shared_experts: int = 2
    own_experts: int = 1
    expert_dim: int = 32

    def __post_init__(self) -> None:
        for name in ("num_layers", "shared_experts", "expert_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"PLE.{name}={getattr(self, name)} must be at least 1.")
        if self.own_experts < 0:
            raise ValueError(f"PLE.own_experts={self.own_experts} must be at least 1; 0 = shared ones alone.")

    def make(self, dim: int, num_behaviours: int, *, rngs: nnx.Rngs) -> nnx.Module:
        """See `Head`."""
        return ExpertHead(self, dim, num_behaviours, rngs=rngs)

    def multiply_adds(self, dim: int, num_behaviours: int) -> int:
        """See `Head`."""
        seen, width = self.own_experts + self.shared_experts, self.expert_dim
        experts = num_behaviours * self.own_experts + self.shared_experts
        # Of a level: each expert, and each gate with the mean that it takes; the last level has no shared gate.
        gates = [num_behaviours * seen + experts] * (self.num_layers - 1) + [num_behaviours * seen]
        inputs = [3 * dim] + [width] * (self.num_layers - 1)
        levels = (
            experts * read * width + mixed * (read + width) for read, mixed in zip(inputs, gates, strict=True)
        )
        return sum(levels) + width * num_behaviours


@dataclasses.dataclass(frozen=True, kw_only=True)
class MMoE(Head):
    """Multi-gate mixture of experts: each behaviour has a gate of its own over experts that all share.

    Source: Ma et al., KDD 2018. Experts are one layer, and the towers above them are linear.

    Attributes:
      num_experts: shared by the behaviours.
      expert_dim: width of every expert.
    """

    num_experts: int = 4
    expert_dim: int = 32

    def __post_init__(self) -> None:
        for name in ("num_experts", "expert_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"MMoE.{name}={getattr(self, name)} must be at least 1.")

    @property
    def _levels(self) -> PLE:
        return PLE(num_layers=1, shared_experts=self.num_experts, own_experts=0, expert_dim=self.expert_dim)

    def make(self, dim: int, num_behaviours: int, *, rngs: nnx.Rngs) -> nnx.Module:
        """See `Head`."""
        return self._levels.make(dim, num_behaviours, rngs=rngs)

    def multiply_adds(self, dim: int, num_behaviours: int) -> int:
        """See `Head`."""
        return self._levels.multiply_adds(dim, num_behaviours)


def pair_features(queries: Float[Array, "*b D"], items: Float[Array, "*b D"]) -> Float[Array, "*b I"]:
    """What a head reads of a pair."""
    return jnp.concatenate([queries, items, queries * items], -1)


class SharedBottomHead(nnx.Module):
    """See `SharedBottom`."""

    def __init__(self, dim: int, num_behaviours: int, *, rngs: nnx.Rngs):
        self.hidden = Dense(3 * dim, dim, (None, "embed"), rngs=rngs)
        self.out = Dense(dim, num_behaviours, ("embed", "label"), rngs=rngs)

    def __call__(self, queries: Float[Array, "*b D"], items: Float[Array, "*b D"]) -> Float[Array, "*b K"]:
        hidden = jax.nn.gelu(self.hidden(pair_features(queries, items)))
        return self.out(hidden).astype(jnp.float32)


class ExpertHead(nnx.Module):
    """See `PLE`."""

    def __init__(self, config: PLE, dim: int, num_behaviours: int, *, rngs: nnx.Rngs):
        width, last = config.expert_dim, config.num_layers - 1
        self.levels = nnx.List(
            [
                ExpertLevel(config, width if level else 3 * dim, num_behaviours, level == last, rngs=rngs)
                for level in range(config.num_layers)
            ]
        )
        kernel = glorot_normal(rngs.params(), (num_behaviours, width), width, 1)
        self.out_kernel = parameter(kernel, "label", "embed")
        self.out_bias = parameter(jnp.zeros((num_behaviours,), jnp.float32), "label")

    def __call__(self, queries: Float[Array, "*b D"], items: Float[Array, "*b D"]) -> Float[Array, "*b K"]:
        streams = pair_features(queries, items)[..., None, :]
        for level in self.levels:
            streams = level(streams)
        kernel, bias = (value[...].astype(streams.dtype) for value in (self.out_kernel, self.out_bias))
        return (jnp.einsum("...kh,kh->...k", streams, kernel) + bias).astype(jnp.float32)


class ExpertLevel(nnx.Module):
    """One level of `PLE`.

    Experts lie behaviour by behaviour, the shared ones last. All gates start at 0: at first each takes the mean of the
    experts that it sees.
    """

    def __init__(self, config: PLE, in_dim: int, num_behaviours: int, last: bool, *, rngs: nnx.Rngs):
        own, shared, width = config.own_experts, config.shared_experts, config.expert_dim
        self.own, self.num_behaviours = own, num_behaviours
        experts = num_behaviours * own + shared
        kernel = glorot_normal(rngs.params(), (experts, in_dim, width), in_dim, width)
        self.expert_kernel = parameter(kernel, None, None, "embed")
        self.expert_bias = parameter(jnp.zeros((experts, width), jnp.float32), None, "embed")
        gates = jnp.zeros((num_behaviours, in_dim, own + shared), jnp.float32)
        self.gate_kernel = parameter(gates, "label", None, None)
        if not last:
            self.shared_gate_kernel = parameter(jnp.zeros((in_dim, experts), jnp.float32), None, None)

    def __call__(self, streams: Float[Array, "*b n I"]) -> Float[Array, "*b m H"]:
        """What the gates mix for each behaviour, and below the last level for the shared experts, in the last place.

        Args:
          streams: the same of the level before; at the first one there is one, which all read.
        """
        kernel, bias, gates = (
            value[...].astype(streams.dtype)
            for value in (self.expert_kernel, self.expert_bias, self.gate_kernel)
        )
        common, own_total = streams[..., -1, :], self.num_behaviours * self.own
        if streams.shape[-2] == 1:
            experts = jnp.einsum("...i,xih->...xh", common, kernel)
            logits = jnp.einsum("...i,kio->...ko", common, gates)
        else:
            counts = [self.own] * self.num_behaviours + [len(kernel) - own_total]
            reads = np.repeat(np.arange(len(counts)), counts)
            experts = jnp.einsum("...xi,xih->...xh", streams[..., reads, :], kernel)
            logits = jnp.einsum("...ki,kio->...ko", streams[..., :-1, :], gates)
        experts = jax.nn.gelu(experts + bias)
        weights, shared = _shares(logits), experts[..., own_total:, :]
        mixed = jnp.einsum("...ks,...sh->...kh", weights[..., self.own :], shared)
        if self.own:
            own = experts[..., :own_total, :]
            own = own.reshape(*own.shape[:-2], self.num_behaviours, self.own, own.shape[-1])
            mixed += jnp.einsum("...ko,...koh->...kh", weights[..., : self.own], own)
        if not hasattr(self, "shared_gate_kernel"):
            return mixed
        weights = _shares(common @ self.shared_gate_kernel[...].astype(common.dtype))
        return jnp.concatenate([mixed, jnp.einsum("...x,...xh->...h", weights, experts)[..., None, :]], -2)


def _shares(logits: Float[Array, "*b x"]) -> Float[Array, "*b x"]:
    """A softmax in float32, in the dtype of the logits."""
    return jax.nn.softmax(logits.astype(jnp.float32), -1).astype(logits.dtype)
