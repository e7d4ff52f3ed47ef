"""How far a training target is believed: a softmax loss for data in which some events are noise.

T = tokens.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetTrust:
    """The default believes every target: plain cross-entropy.

    Attributes:
      smoothing: share of each target that is spread evenly over the catalogue.
      power: q of `(1 - p^q) / q`, p being the target's probability: 0 = cross-entropy, 1 = absolute error. The higher,
        the less an improbable target moves the model.

    Source: Szegedy et al., CVPR 2016 (smoothing); Zhang and Sabuncu, NeurIPS 2018 (generalised cross-entropy).
    """

    smoothing: float = 0.0
    power: float = 0.0

    def __post_init__(self) -> None:
        for name in ("smoothing", "power"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"trust.{name}={getattr(self, name)} must be at least 0 and below 1.")
        if self.smoothing and self.power:
            raise ValueError(
                f"trust.smoothing={self.smoothing} and trust.power={self.power} are two answers to one question; set "
                "one of them to 0."
            )

    def of(
        self, log_z: Float[Array, "T"], target_logit: Float[Array, "T"], mean_logit: Float[Array, "T"] | None
    ) -> tuple[Float[Array, "T"], Float[Array, "T"]]:
        """Each token's loss in nats, and its derivative by the cross-entropy.

        Args:
          log_z: log of the sum of exp(logit) over the catalogue.
          mean_logit: over the catalogue; asked for where `smoothing` is set.
        """
        cross_entropy = log_z - target_logit
        if self.power:
            trusted = jnp.exp(-self.power * cross_entropy)
            return (1.0 - trusted) / self.power, trusted
        if mean_logit is not None:
            cross_entropy = cross_entropy + self.smoothing * (target_logit - mean_logit)
        return cross_entropy, jnp.ones_like(cross_entropy)
