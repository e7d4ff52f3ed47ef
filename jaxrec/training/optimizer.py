"""The optimizer of the dense parameters, and the schedule that the tables' rates follow too."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

Schedule = Literal["constant", "cosine", "linear"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW on the dense parameters.

    Attributes:
      learning_rate: peak rate of the dense parameters.
      schedule: after the warm-up, constant, or falling to `final_factor` of the peak at the last step.
      max_gradient_norm: bound on the global norm over dense parameters and tables together; 0 = none.
      weight_decay: decoupled, on kernels only (no biases, norms, positions).
      ema_decay: keep an exponential average of the parameters, and of tables under a full softmax, and evaluate
        with it; 0 = off.
      rates: factors of the learning rate by glob pattern of a parameter's dotted path or of a table's name; of several
        that match the last one counts. 0 = frozen.
      layer_decay: what the rate loses from one block of an encoder to the one below it; see `rates.layer_factors`.
        Tables do not take part: they feed the encoder and are scored against. 1 = nothing.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 0
    schedule: Schedule = "constant"
    final_factor: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_gradient_norm: float = 0.0
    ema_decay: float = 0.0
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        if self.learning_rate < 0:
            raise ValueError(f"optimizer.learning_rate={self.learning_rate} must not be negative.")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps={self.warmup_steps} must not be negative.")
        if self.schedule not in get_args(Schedule):
            raise ValueError(
                f"optimizer.schedule={self.schedule!r} must be one of {', '.join(get_args(Schedule))}."
            )
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must be at least 0 and below 1.")
        if self.epsilon <= 0:
            raise ValueError(f"optimizer.epsilon={self.epsilon} must be above 0.")
        if self.weight_decay < 0:
            raise ValueError(f"optimizer.weight_decay={self.weight_decay} must not be negative.")
        if not 0.0 <= self.final_factor <= 1.0:
            raise ValueError(f"optimizer.final_factor={self.final_factor} must lie in [0, 1].")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"optimizer.ema_decay={self.ema_decay} must be at least 0 and below 1.")
        if self.max_gradient_norm < 0:
            raise ValueError(
                f"optimizer.max_gradient_norm={self.max_gradient_norm} must not be negative; 0 = none."
            )
        for pattern, factor in self.rates.items():
            if not 0 <= factor < math.inf:
                raise ValueError(
                    f"optimizer.rates[{pattern!r}]={factor} must be a finite factor of at least 0; 0 = frozen."
                )
        if not 0 < self.layer_decay <= 1:
            raise ValueError(
                f"optimizer.layer_decay={self.layer_decay} must be above 0 and at most 1; 1 = all layers alike."
            )


def schedule_factor(config: OptimizerConfig, num_train_steps: int, step: jax.Array) -> jax.Array:
    """What the peak rates are multiplied with at `step` (0 = the first), in [0, 1]."""
    step = step.astype(jnp.float32)
    warm = jnp.minimum(1.0, (step + 1) / max(1, config.warmup_steps))
    rest = max(1, num_train_steps - config.warmup_steps)
    progress = jnp.clip((step - config.warmup_steps) / rest, 0.0, 1.0)
    fall = {
        "constant": jnp.float32(1.0),
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + jnp.cos(jnp.pi * progress)),
    }
    floor = config.final_factor if config.schedule != "constant" else 0.0
    return warm * (floor + (1 - floor) * fall[config.schedule])


def dense_optimizer(config: OptimizerConfig, num_train_steps: int) -> optax.GradientTransformation:
    """AdamW under the schedule. Clipping is the step's, which alone sees the tables' gradients as well."""
    return optax.adamw(
        lambda count: config.learning_rate * schedule_factor(config, num_train_steps, count),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )


def decay_mask(parameters: Any) -> Any:
    """True for kernels (two dims or more, by name), False for biases, norms, positions and single vectors."""

    def decays(path: tuple[Any, ...], value: jax.Array) -> bool:
        names = {str(getattr(part, "key", getattr(part, "name", ""))) for part in path}
        return value.ndim >= 2 and any("kernel" in name or name == "projection" for name in names)

    return jax.tree_util.tree_map_with_path(decays, parameters)
