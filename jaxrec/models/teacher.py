"""A trained model that another one learns from: frozen, and whole on every device.

B = packed rows, L = positions, D = item dim.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrec.models.two_tower import ITEM, ITEM_BIAS, USER, TwoTower


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """What a teacher knows. Its arrays become constants of the programs that ask it.

    Attributes:
      model: with its trained dense parameters.
      tables: rows in the order of the ids, by name.
      temperature: of its ranking task; scores are divided by it.
    """

    model: TwoTower
    tables: Mapping[str, np.ndarray]
    temperature: float

    def events(self, item_ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Its vectors of items in a history."""
        return jnp.asarray(self.tables[ITEM])[item_ids]

    def users(self, user_ids: Int[Array, "B L"]) -> Float[Array, "B L U"] | None:
        """Its rows of users; None where it has none."""
        return jnp.asarray(self.tables[USER])[user_ids] if USER in self.tables else None

    def candidates(
        self, item_ids: Int[Array, " S"] | slice = slice(None)
    ) -> tuple[Float[Array, "S D"], Float[Array, " S"]]:
        """The vectors and biases that its queries are held against; of all items by id, padding included."""
        rows = jnp.asarray(self.tables[self.model.config.scored_table])[item_ids]
        vectors = self.model.candidate_vectors(rows) / self.temperature
        if ITEM_BIAS not in self.tables:
            return vectors, jnp.zeros(len(vectors))
        return vectors, jnp.asarray(self.tables[ITEM_BIAS])[item_ids, 0]
