"""The optimizer of the dense parameters, and the schedule that the tables' rates follow too."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax


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
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    final_factor: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_gradient_norm: float = 0.0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.learning_rate < 0:
            raise ValueError(f"optimizer.learning_rate={self.learning_rate} must not be negative.")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps={self.warmup_steps} must not be negative.")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"optimizer.ema_decay={self.ema_decay} must be at least 0 and below 1.")
        if self.max_gradient_norm < 0:
            raise ValueError(
                f"optimizer.max_gradient_norm={self.max_gradient_norm} must not be negative; 0 = none."
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


def dense_optimizer(
    config: OptimizerConfig, num_train_steps: int, *, frozen: tuple[str, ...] | None = None
) -> optax.GradientTransformation:
    """AdamW under the schedule. Clipping is the step's, which alone sees the tables' gradients as well.

    Args:
      frozen: the path of a part of the parameters that does not move, not even by decay.
    """
    adamw = optax.adamw(
        lambda count: config.learning_rate * schedule_factor(config, num_train_steps, count),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if frozen is None:
        return adamw
    stays = functools.partial(
        jax.tree_util.tree_map_with_path, lambda path, _: _names(path)[: len(frozen)] == frozen
    )
    return optax.chain(adamw, optax.masked(optax.set_to_zero(), stays))


def decay_mask(parameters: Any) -> Any:
    """True for kernels (two dims or more, by name), False for biases, norms, positions and single vectors."""

    def decays(path: tuple[Any, ...], value: jax.Array) -> bool:
        names = _names(path)
        return value.ndim >= 2 and any("kernel" in name or name == "projection" for name in names)

    return jax.tree_util.tree_map_with_path(decays, parameters)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(part, "key", getattr(part, "name", ""))) for part in path)
