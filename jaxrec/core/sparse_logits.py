"""Logits of a few items for each query, to be added to those of the towers.

T = queries, M = places for items.
"""

import dataclasses

import jax
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseLogits:
    """What is added to the logit of each named item; an item that is named twice gets both.

    Attributes:
      item_ids: 0 = an empty place.
    """

    item_ids: Int[Array, "*t M"]
    values: Float[Array, "*t M"]

    def flat(self) -> "SparseLogits":
        """All leading dims as one."""
        return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), self)
