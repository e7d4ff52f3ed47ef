"""The two towers of f(x, y) = M(x; theta) . W^T . v(y) + b_y.

M is a BERT encoder over the user's history, v the item tower, W the linear map between them. The item rows come
from the sharded table, so this module holds dense parameters only.

B = packed rows, L = positions, S = chosen positions, E = encoder width, D = item dim, U = user dim,
K = behaviours.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxrec.core.batch import NUM_TIME_GAPS, UNKNOWN_SECONDS, Batch
from jaxrec.core.mixture_score import MixtureScore
from jaxrec.embedding.table import TableSpec
from jaxrec.models.item_text import ItemText, ItemTexts, TextTower
from jaxrec.models.memory import MemoryHead, TransitionMemory
from jaxrec.models.mixture import MixtureOfLogits, MixtureSide
from jaxrec.models.new_items import RowRegression
from jaxrec.nn.domain_adapters import DomainAdapters
from jaxrec.nn.encoder import Encoder, EncoderConfig
from jaxrec.nn.heads import Head, SharedBottom
from jaxrec.nn.layers import Dense, glorot_normal, parameter, unit_vectors

ITEM, ITEM_BIAS, ITEM_OUTPUT, USER = "item", "item_bias", "item_output", "user"
LOG_VARIANCES = "log_variances"  # the attribute, and so the key of its parameters
MIN_TEMPERATURE = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """Scores are cosines over a temperature: the lengths of M(x) W and of v(y) say nothing.

    Attributes:
      temperature: the cosines are divided by it, and by the task's own temperature; where it starts, if learned.
      learned: train its logarithm with the dense parameters; it never falls below 0.01.

    Source: Radford et al., ICML 2021 (a learned temperature, and its bound).
    """

    temperature: float = 0.05
    learned: bool = False

    def __post_init__(self) -> None:
        if self.temperature < MIN_TEMPERATURE:
            raise ValueError(f"cosine.temperature={self.temperature} must be at least {MIN_TEMPERATURE}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoTowerConfig:
    """Shape of the towers.

    Attributes:
      item_dim: width of the item table and of the space that is scored.
      projection: False leaves W out (the identity); needs `item_dim == encoder.embed_dim`.
      item_bias: learn b_y, one float an item.
      output_table: a second table of items holds v(y), and the first one the events alone.
      cosine: scores are cosines over a temperature; none = products.
      mixture: several vectors a side and a mixture of their cosines in the place of one product (`models.mixture`); for
        sampled candidates. none = products.
      user_dim: width of a table of users, a row of which is added to each event of its user; 0 = none.
      time_gaps: add a vector for the time since the previous event of the history.
      target_time: the time from the last event to the one that is asked about scales and shifts the state: what a
        server knows, since it answers now, and what most published figures do not use.
      event_behaviours: add a vector for each known label of the event: what came of it is told to what comes after it,
        and never to its own prediction.
      domain_adapters: rank of an adapter for each domain on the encoder's output; 0 = the domains share all of it.
      init_scale: standard deviation of the item rows at the start.
      feature_init_scale: the same where the rows start from what the items table says, so that items that are alike
        start alike; 0 = random rows.
      memory: counts of what followed what, added to the scores with learned weights; none = without.
      context_rows: rows of the table of context features, which the hashes of an event's context are folded into; an
        event's behaviours are then judged in its context. 0 = the context is not read.
      head: between the vectors of user and item and the logits of behaviours: SharedBottom, MMoE or PLE. Values have
        one of the same kind to themselves.
      text: the text of items in the item tower; none = rows alone.
      new_items: rows for items without a training event, from the items table (`models.new_items`); none = the random
        ones that they start with.
    """

    encoder: EncoderConfig = EncoderConfig()
    item_dim: int = 64
    projection: bool = True
    item_bias: bool = True
    output_table: bool = False
    cosine: Cosine | None = None
    mixture: MixtureOfLogits | None = None
    user_dim: int = 0
    time_gaps: bool = False
    target_time: bool = False
    event_behaviours: bool = False
    context_rows: int = 0
    domain_adapters: int = 0
    init_scale: float = 0.02
    feature_init_scale: float = 0.0
    memory: TransitionMemory | None = None
    head: Head = SharedBottom()
    text: TextTower | None = None
    new_items: RowRegression | None = None

    def __post_init__(self) -> None:
        if self.item_dim < 1:
            raise ValueError(f"item_dim={self.item_dim} must be at least 1.")
        if self.user_dim < 0:
            raise ValueError(f"user_dim={self.user_dim} must be at least 1; 0 = no table of users.")
        if self.domain_adapters < 0:
            raise ValueError(
                f"domain_adapters={self.domain_adapters} must be at least 1; 0 = no adapters of domains."
            )
        if self.feature_init_scale < 0:
            raise ValueError(
                f"feature_init_scale={self.feature_init_scale} must be above 0; 0 = random rows."
            )
        if self.context_rows < 0 or self.context_rows == 1:
            raise ValueError(
                f"context_rows={self.context_rows} must be at least 2; 0 = the context is not read."
            )
        if not self.projection and self.item_dim != self.encoder.embed_dim:
            raise ValueError(
                f"projection=False needs item_dim={self.item_dim} to equal encoder.embed_dim="
                f"{self.encoder.embed_dim}; make them equal or set projection=True."
            )
        if self.mixture is not None and self.cosine is not None:
            raise ValueError("model.mixture has cosines of its own; set model.cosine to none.")
        if self.text is not None:
            self._check_text(self.text)

    def _check_text(self, text: TextTower) -> None:
        if self.new_items is not None:
            raise ValueError(
                "model.text reads new items by itself, and model.new_items would give them rows that it never reads; "
                "set one of the two to none."
            )
        if self.output_table:
            raise ValueError(
                "output_table=True: text is mixed into one vector an item; set output_table to False, or text to none."
            )
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

    @property
    def scored_table(self) -> str:
        """The table whose rows v(y) is made of."""
        return ITEM_OUTPUT if self.output_table else ITEM

    @property
    def score(self) -> MixtureScore | None:
        """How queries and v(y) are scored; None = by their product."""
        return None if self.mixture is None else self.mixture.score

    def tables(self, num_items: int, num_users: int) -> dict[str, TableSpec]:
        """The sharded tables that the towers look up; row 0 is padding."""
        items = TableSpec(num_rows=num_items + 1, dim=self.item_dim, init_scale=self.init_scale)
        tables = {ITEM: items}
        if self.output_table:
            tables[ITEM_OUTPUT] = items
        if self.item_bias:
            tables[ITEM_BIAS] = TableSpec(num_rows=num_items + 1, dim=1, init_scale=0.0)
        if self.user_dim:
            tables[USER] = TableSpec(
                num_rows=num_users + 1, dim=self.user_dim, keyed_by=USER, init_scale=self.init_scale
            )
        return tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
    """What the tasks of a run ask of the model beside scores.

    Attributes:
      num_behaviours: logits of the behaviour head; 0 = no such head.
      read_behaviours: labels of an event that the user tower reads.
      values: whether there is a head for the number beside an event.
      num_domains: each with an adapter of its own; 0 = there are no adapters.
      weighed_tasks: whose weight in the sum of losses is learned, as a log variance.
    """

    num_behaviours: int = 0
    read_behaviours: int = 0
    values: bool = False
    num_domains: int = 0
    weighed_tasks: tuple[str, ...] = ()


class TwoTower(nnx.Module):
    """User tower, item tower and W. `rngs` seeds the dense parameters."""

    def __init__(
        self,
        config: TwoTowerConfig,
        *,
        outputs: Outputs = Outputs(),
        rngs: nnx.Rngs,
    ):
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
        if config.target_time:
            self.target_time = parameter(
                jnp.zeros((2, NUM_TIME_GAPS, width), jnp.float32), None, None, "embed"
            )
        if outputs.read_behaviours:
            labels = 0.02 * jax.random.normal(rngs.params(), (2, outputs.read_behaviours, width))
            self.behaviour_table = parameter(labels, None, None, "embed")
        if config.context_rows:
            rows = config.init_scale * jax.random.normal(
                rngs.params(), (config.context_rows, config.item_dim)
            )
            self.context_table = parameter(rows, None, None)
        self.encoder = Encoder(config.encoder, rngs=rngs)
        if outputs.num_domains:
            self.domain_adapters = DomainAdapters(
                outputs.num_domains, width, config.domain_adapters, rngs=rngs
            )
        if config.projection:
            kernel = glorot_normal(rngs.params(), (width, config.item_dim), width, config.item_dim)
            self.projection = parameter(kernel, "embed", None)
        if config.cosine is not None and config.cosine.learned:
            self.log_temperature = parameter(jnp.float32(math.log(config.cosine.temperature)))
        if config.mixture is not None:
            self.query_mixture = MixtureSide(config.mixture, config.item_dim, is_query=True, rngs=rngs)
            self.item_mixture = MixtureSide(config.mixture, config.item_dim, is_query=False, rngs=rngs)
        if config.memory is not None:
            self.memory = MemoryHead(config.memory, width)
        if config.text is not None:
            self.text = ItemText(config.text, config.item_dim, config.init_scale, rngs=rngs)
        if outputs.num_behaviours:
            self.behaviour_head = config.head.make(config.item_dim, outputs.num_behaviours, rngs=rngs)
        if outputs.values:
            self.value_head = config.head.make(config.item_dim, 1, rngs=rngs)
        if outputs.weighed_tasks:
            log_variances = {name: parameter(jnp.zeros((), jnp.float32)) for name in outputs.weighed_tasks}
            self.log_variances = nnx.Dict(log_variances)

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
          events: vectors of the events' items (`item_vectors`).
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
        if self.config.event_behaviours:
            x = x + self._behaviours(batch, masked).astype(x.dtype)
        states = self.encoder(
            x,
            segment_ids=jnp.asarray(batch.segment_ids),
            positions=jnp.asarray(batch.positions),
            causal=causal,
            key=key,
            times=self._times(batch, masked),
            last_positions=last_positions,
        )
        if not self.config.domain_adapters:
            return states
        domain_ids = jnp.asarray(batch.domain_ids)
        if last_positions is not None:
            domain_ids = jnp.take_along_axis(domain_ids, last_positions, axis=1)
        return self.domain_adapters(states, domain_ids)

    def _times(self, batch: Batch, masked: Bool[Array, "B L"] | None) -> Int[Array, "B L"]:
        """A masked event hides its time with its item: when the model is asked, the time of the target is unknown."""
        times = jnp.asarray(batch.times)
        return times if masked is None else jnp.where(masked, UNKNOWN_SECONDS, times)

    def _behaviours(self, batch: Batch, masked: Bool[Array, "B L"] | None) -> Float[Array, "B L E"]:
        """The sum over the known labels of each event; a masked event hides its labels with its item."""
        labels = jnp.asarray(batch.labels)
        if masked is not None:
            labels = jnp.where(masked[..., None], -1, labels)
        of_no, of_yes = self.behaviour_table[...]
        return (labels == 0).astype(of_no.dtype) @ of_no + (labels == 1).astype(of_yes.dtype) @ of_yes

    def at_time(self, states: Float[Array, "*b E"], gaps: Int[Array, "*b"]) -> Float[Array, "*b E"]:
        """States that know when they are asked: `state * (1 + a) + c`, where a and c are the gap's and start at 0.

        Args:
          gaps: buckets of the time since the last event, as `Batch.time_gaps`; 0 = unknown.
        """
        if not self.config.target_time:
            return states
        scale, shift = (jnp.take(table, gaps, axis=0, mode="clip") for table in self.target_time[...])
        return (states * (1.0 + scale) + shift).astype(states.dtype)

    def queries(self, states: Float[Array, "*b E"]) -> Float[Array, "*b D"]:
        """M(x) W: the vectors that are multiplied with v(y); under cosines unit vectors over the temperature; with a
        mixture the query's side of it."""
        if self.config.projection:
            states = states @ self.projection[...].astype(states.dtype)
        if self.config.mixture is not None:
            return self.query_mixture(states)
        cosine = self.config.cosine
        if cosine is None:
            return states
        if cosine.learned:
            temperature = jnp.maximum(jnp.exp(self.log_temperature[...]), MIN_TEMPERATURE)
        else:
            temperature = jnp.float32(cosine.temperature)
        return unit_vectors(states) / temperature.astype(states.dtype)

    def item_vectors(
        self, rows: Float[Array, "*b D"], texts: ItemTexts | None = None
    ) -> Float[Array, "*b D"]:
        """The item in an event: its row and, where the model reads text, its text."""
        return rows if texts is None else self.text(rows, texts)

    def text_queries(self, token_ids: Int[Array, "q t"], *, key: jax.Array | None) -> Float[Array, "q D"]:
        """Unit vectors of texts that items are searched by: P(text), as of an item that is its text alone.

        Args:
          token_ids: 0 = padding.
          key: of dropout; None = evaluation.
        """
        return unit_vectors(self.text.project(self.text.encode(token_ids, key=key)))

    def candidate_vectors(self, vectors: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        """v(y) of the item that is scored, from its vector of `scored_table`; with a mixture the item's side of it."""
        if self.config.mixture is not None:
            return self.item_mixture(vectors)
        return vectors if self.config.cosine is None else unit_vectors(vectors)

    @property
    def score(self) -> MixtureScore | None:
        """How queries and candidates are scored; None = by their product."""
        return self.config.score

    def in_context(self, queries: Float[Array, "*b D"], context: Int[Array, "*b F"]) -> Float[Array, "*b D"]:
        """The queries of events with the rows of their context added; as they are where the model reads none.

        Args:
          context: hashes; 0 = unknown, which adds nothing.
        """
        if not self.config.context_rows:
            return queries
        rows = jnp.take(self.context_table[...], context % self.config.context_rows, axis=0)
        rows = jnp.where(context[..., None] > 0, rows, 0.0)
        return queries + jnp.sum(rows, axis=-2).astype(queries.dtype)

    def behaviour_logits(
        self, queries: Float[Array, "*b D"], items: Float[Array, "*b D"]
    ) -> Float[Array, "*b K"]:
        """Logits of the behaviours of (user, item)."""
        return self.behaviour_head(queries, items)

    def values(self, queries: Float[Array, "*b D"], items: Float[Array, "*b D"]) -> Float[Array, "*b"]:
        """The value that the user gives the item, in deviations from the mean of the training events."""
        return self.value_head(queries, items)[..., 0]
