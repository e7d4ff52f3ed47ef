"""Several vectors a side in the place of one: the maps from a state, and from an item's vector, to a mixture's side.

D = width of what is mapped.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxrec.core.mixture_score import MixtureScore
from jaxrec.nn.layers import Dense, parameter, unit_vectors


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureOfLogits:
    """Scores are mixtures of cosines between several vectors of the query and several of the item.

    Attributes:
      num_vectors: of each side.
      dim: of each vector.
      temperature: the cosines are divided by it.
    """

    num_vectors: int = 4
    dim: int = 32
    temperature: float = 0.05

    def __post_init__(self) -> None:
        if self.num_vectors < 2 or self.dim < 1 or self.temperature <= 0:
            raise ValueError(
                f"mixture.num_vectors={self.num_vectors}, dim={self.dim}, temperature={self.temperature}: say "
                "num_vectors >= 2 (one is model.cosine), dim >= 1 and temperature > 0."
            )

    @property
    def score(self) -> MixtureScore:
        """How two sides are scored."""
        return MixtureScore(self.num_vectors, self.dim)


class MixtureSide(nnx.Module):
    """The map to one side. At the start every pair of vectors weighs alike."""

    def __init__(self, config: MixtureOfLogits, width: int, *, is_query: bool, rngs: nnx.Rngs):
        self.config, self.is_query = config, is_query
        self.vectors = Dense(width, config.num_vectors * config.dim, ("embed", None), rngs=rngs)
        self.gate = parameter(jnp.zeros((width, config.num_vectors**2), jnp.float32), "embed", None)
        if is_query:
            self.sharpness = parameter(jnp.zeros(1, jnp.float32), None)

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b w"]:
        """Unit vectors, those of queries over the temperature; gates; the sharpness."""
        config, dims = self.config, x.shape[:-1]
        vectors = unit_vectors(self.vectors(x).reshape(*dims, config.num_vectors, config.dim))
        vectors = vectors.reshape(*dims, -1)
        last = jnp.zeros((*dims, 1), x.dtype)
        if self.is_query:
            vectors, last = vectors / config.temperature, last + self.sharpness[...].astype(x.dtype)
        return jnp.concatenate([vectors, x @ self.gate[...].astype(x.dtype), last], axis=-1)
