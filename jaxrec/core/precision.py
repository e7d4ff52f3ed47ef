"""Precision: parameters, softmax and loss are float32; activations may be bfloat16."""

from typing import Literal

import jax.numpy as jnp

ActivationDtype = Literal["float32", "bfloat16"]


def compute_dtype(name: ActivationDtype) -> jnp.dtype:
    """The dtype of activations.

    Raises:
      ValueError: any other name; float16 is left out because it needs loss scaling.
    """
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={name!r} must be 'float32' or 'bfloat16'.")
    return jnp.dtype(name)
