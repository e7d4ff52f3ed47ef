"""The two towers of f(x, y) = M(x; theta) . W^T . v(y) + b_y.

M is a BERT encoder over the user's history, v the item tower, W the linear map between them. The item rows come
from the sharded table, so this module holds dense parameters only.

B = packed rows, L = positions, S = chosen positions, E = encoder width, D = item dim, U = user dim,
K = behaviours.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxrec.core.batch import NUM_TIME_GAPS, Batch
from jaxrec.embedding.table import TableSpec
from jaxrec.models.item_text import ItemText, ItemTexts, TextTower
from jaxrec.models.memory import MemoryHead, TransitionMemory
from jaxrec.nn.encoder import Encoder, EncoderConfig
from jaxrec.nn.layers import Dense, glorot_normal, parameter

ITEM, ITEM_BIAS, USER = "item", "item_bias", "user"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoTowerConfig:
    """Shape of the towers.

    Attributes:
      item_dim: width of the item table and of the space that is scored.
      projection: False leaves W out (the identity); needs `item_dim == encoder.embed_dim`.
      item_bias: learn b_y, one float an item.
      user_dim: width of a table of users, a row of which is added to each event of its user; 0 = none.
      time_gaps: add a vector for the time since the previous event of the history.
      init_scale: standard deviation of the item rows at the start.
      memory: counts of what followed what, added to the scores with learned weights; none = without.
      text: the text of items in the item tower; none = rows alone.
    """

    encoder: EncoderConfig = EncoderConfig()
    item_dim: int = 64
    projection: bool = True
    item_bias: bool = True
    user_dim: int = 0
    time_gaps: bool = False
    init_scale: float = 0.02
    memory: TransitionMemory | None = None
    text: TextTower | None = None

    def __post_init__(self) -> None:
        if self.item_dim < 1:
            raise ValueError(f"item_dim={self.item_dim} must be at least 1.")
        if self.user_dim < 0:
            raise ValueError(f"user_dim={self.user_dim} must be at least 1; 0 = no table of users.")
        if not self.projection and self.item_dim != self.encoder.embed_dim:
            raise ValueError(
                f"projection=False needs item_dim={self.item_dim} to equal encoder.embed_dim="
                f"{self.encoder.embed_dim}; make them equal or set projection=True."
            )
        if self.text is not None:
            self._check_text(self.text)

    def _check_text(self, text: TextTower) -> None:
        for name in ("layout", "gather_dtype"):
            ours, theirs = getattr(self.encoder, name), getattr(text.encoder, name)
            if ours != theirs:
                raise ValueError(
                    f"text.encoder.{name}={theirs!r} must equal encoder.{name}={ours!r}: one layout for all "
                    "parameters."
                )
        if text.encoder.layout == "tensor":
            raise ValueError(
                "text.encoder.layout='tensor': a text encoder is not split by heads; use 'replicated' or 'fsdp'."
            )

    def tables(self, num_items: int, num_users: int) -> dict[str, TableSpec]:
        """The sharded tables that the towers look up; row 0 is padding."""
        tables = {ITEM: TableSpec(num_rows=num_items + 1, dim=self.item_dim, init_scale=self.init_scale)}
        if self.item_bias:
            tables[ITEM_BIAS] = TableSpec(num_rows=num_items + 1, dim=1, init_scale=0.0)
        if self.user_dim:
            tables[USER] = TableSpec(
                num_rows=num_users + 1, dim=self.user_dim, keyed_by=USER, init_scale=self.init_scale
            )
        return tables


class BehaviourHead(nnx.Module):
    """Logits of the K behaviours of (user, item): an MLP over both vectors and their product."""

    def __init__(self, dim: int, num_behaviours: int, *, rngs: nnx.Rngs):
        self.hidden = Dense(3 * dim, dim, (None, "embed"), rngs=rngs)
        self.out = Dense(dim, num_behaviours, ("embed", "label"), rngs=rngs)

    def __call__(self, queries: Float[Array, "*b D"], items: Float[Array, "*b D"]) -> Float[Array, "*b K"]:
        features = jnp.concatenate([queries, items, queries * items], -1)
        return self.out(jax.nn.gelu(self.hidden(features))).astype(jnp.float32)


class TwoTower(nnx.Module):
    """User tower, item tower and W. `rngs` seeds the dense parameters."""

    def __init__(self, config: TwoTowerConfig, *, num_behaviours: int = 0, rngs: nnx.Rngs):
        self.config = config
        width = config.encoder.embed_dim
        if config.item_dim != width:
            self.event_in = Dense(config.item_dim, width, (None, "embed"), rngs=rngs)
        if config.user_dim:
            self.user_in = Dense(config.user_dim, width, (None, "embed"), rngs=rngs)
        self.mask_vector = parameter(0.02 * jax.random.normal(rngs.params(), (width,)), "embed")
        if config.time_gaps:
            gaps = 0.02 * jax.random.normal(rngs.params(), (NUM_TIME_GAPS, width))
            self.time_gap_table = parameter(gaps, None, "embed")
        self.encoder = Encoder(config.encoder, rngs=rngs)
        if config.projection:
            kernel = glorot_normal(rngs.params(), (width, config.item_dim), width, config.item_dim)
            self.projection = parameter(kernel, "embed", None)
        if config.memory is not None:
            self.memory = MemoryHead(config.memory, width)
        if config.text is not None:
            self.text = ItemText(config.text, config.item_dim, config.init_scale, rngs=rngs)
        if num_behaviours:
            self.behaviour_head = BehaviourHead(config.item_dim, num_behaviours, rngs=rngs)

    def encode(
        self,
        events: Float[Array, "B L D"],
        batch: Batch,
        *,
        causal: bool,
        key: jax.Array | None,
        user_rows: Float[Array, "B L U"] | None = None,
        masked: Bool[Array, "B L"] | None = None,
        last_positions: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B S E"]:
        """M(x): contextual states of the histories.

        Args:
          events: v(y) of the events' items.
          user_rows: rows of the user table for the events; None where the model has none.
          masked: True = this event is hidden behind the mask vector.
          key: of dropout; None = evaluation.
          last_positions: compute these columns of each row only (see `Encoder`).
        """
        x = self.event_in(events) if hasattr(self, "event_in") else events
        if masked is not None:
            x = jnp.where(masked[..., None], self.mask_vector[...], x)
        if user_rows is not None:
            x = x + self.user_in(user_rows)
        if self.config.time_gaps:
            x = x + jnp.take(self.time_gap_table[...], batch.time_gaps, axis=0, mode="clip")
        return self.encoder(
            x,
            segment_ids=jnp.asarray(batch.segment_ids),
            positions=jnp.asarray(batch.positions),
            causal=causal,
            key=key,
            last_positions=last_positions,
        )

    def queries(self, states: Float[Array, "*b E"]) -> Float[Array, "*b D"]:
        """M(x) W: the vectors that are multiplied with v(y)."""
        return states @ self.projection[...].astype(states.dtype) if self.config.projection else states

    def item_vectors(
        self, rows: Float[Array, "*b D"], texts: ItemTexts | None = None
    ) -> Float[Array, "*b D"]:
        """v(y) from the item's table row and, where the model reads text, from its text."""
        return rows if texts is None else self.text(rows, texts)

    def behaviour_logits(
        self, queries: Float[Array, "*b D"], items: Float[Array, "*b D"]
    ) -> Float[Array, "*b K"]:
        """Logits of the behaviours of (user, item)."""
        return self.behaviour_head(queries, items)
