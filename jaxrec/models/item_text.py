"""The text of items in the item tower: v(y) is mixed from the item's row and from the vector of its text.

An item that training has never seen has no row that means anything: it is its text alone. Which items those are, the
vectors of the whole catalogue and the tokens lie beside the tables (`training.item_text`); here is what is learned.

B = dims of whatever is asked, U = texts, T = tokens of a text, E = width of the text encoder, D = item dim.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal, Self, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxrec.core.precision import ActivationDtype
from jaxrec.nn.encoder import ACTIVATIONS, EncoderConfig
from jaxrec.nn.huggingface import read_config
from jaxrec.nn.layers import Dense, LayerNorm, parameter
from jaxrec.nn.text_encoder import BertTextEncoder, mean_pool

Pooling = Literal["mean", "first"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTower:
    """The text encoder, and how much of the catalogue a step encodes anew.

    Attributes:
      encoder: sizes of the text encoder.
      checkpoint: a Hugging Face BERT directory whose weights it starts from, of the sizes of `encoder`; "" = random.
        `TextTower.of_checkpoint` reads the sizes.
      pooling: a text's vector: the mean over its tokens, or its first token ([CLS]).
      trained_items: distinct items of a step's events whose text is encoded with a gradient, drawn at random; all
        others are seen through the cached vectors. From the catalogue's size on every item is. 0 = the encoder is
        frozen: the vectors are encoded once, and what follows them still learns.
      refresh_every_steps: the cached vectors of the whole catalogue are encoded anew so often; 0 where it is frozen.
      id_dropout_rate: chance of an item to be without its row for a step, as event and as candidate alike. 1 = items
        with a text are their text alone, when they are evaluated too: nothing is then tied to one catalogue.
      masked_head: have the parameters that the task MaskedText needs.
    """

    encoder: EncoderConfig = EncoderConfig(vocab_size=30_522, type_vocab_size=1)
    checkpoint: str = ""
    pooling: Pooling = "mean"
    trained_items: int = 256
    refresh_every_steps: int = 100
    id_dropout_rate: float = 0.1
    masked_head: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "type_vocab_size"):
            if getattr(self.encoder, name) < 1:
                raise ValueError(
                    f"text.encoder.{name}={getattr(self.encoder, name)} must be at least 1: it reads word pieces."
                )
        if self.encoder.compression is not None:
            raise ValueError(
                "text.encoder.compression groups what is past, and a text is read both ways; set it to none."
            )
        if self.pooling not in get_args(Pooling):
            raise ValueError(f"text.pooling={self.pooling!r} must be 'mean' or 'first'.")
        if self.trained_items < 0:
            raise ValueError(
                f"text.trained_items={self.trained_items} must be at least 1; 0 = frozen encoder."
            )
        if not self.trained_items and self.refresh_every_steps:
            raise ValueError(
                f"text.refresh_every_steps={self.refresh_every_steps}: with trained_items=0 the encoder is frozen and "
                "its vectors never change; set it to 0."
            )
        if self.trained_items and self.refresh_every_steps < 1:
            raise ValueError(
                f"text.refresh_every_steps={self.refresh_every_steps} must be at least 1 where the encoder learns "
                f"(trained_items={self.trained_items})."
            )
        if not 0.0 <= self.id_dropout_rate <= 1.0:
            raise ValueError(f"text.id_dropout_rate={self.id_dropout_rate} must lie in 0..1.")

    @classmethod
    def of_checkpoint(
        cls,
        directory: str | Path,
        *,
        dtype: ActivationDtype = "float32",
        remat: bool = False,
        **fields: Any,
    ) -> Self:
        """A tower that starts from a Hugging Face BERT directory, of its sizes.

        Raises:
          ValueError: the directory holds no BERT that ours can be.
        """
        encoder = read_config(directory, dtype=dtype, remat=remat)
        return cls(encoder=encoder, checkpoint=str(directory), **fields)

    @property
    def frozen(self) -> bool:
        """Whether the encoder keeps the weights that it starts with."""
        return not self.trained_items

    @property
    def alone(self) -> bool:
        """Whether items with a text never use their row."""
        return self.id_dropout_rate == 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ItemTexts:
    """What the item tower is told of the text of some items.

    Attributes:
      vectors: of their texts, projected.
      has_text: False = the vector means nothing.
      by_id: False = the row means nothing: the item is new, or left out in this step.
    """

    vectors: Float[Array, "*b D"]
    has_text: Bool[Array, "*b"]
    by_id: Bool[Array, "*b"]


class ItemText(nnx.Module):
    """Text encoder, projection and gate.

    v(y) = g * row + (1 - g) * P(text), one g for each entry, from both; g = 0 without a row, 1 without a text.
    """

    def __init__(self, config: TextTower, item_dim: int, init_scale: float, *, rngs: nnx.Rngs):
        """Random weights; `init_scale` is that of the rows, so that neither drowns the other at the start."""
        self.config = config
        self.encoder = BertTextEncoder(config.encoder, rngs=rngs)
        self.projection = Dense(config.encoder.embed_dim, item_dim, ("embed", None), rngs=rngs)
        self.projection.kernel[...] = init_scale * self.projection.kernel[...]
        self.gate = Dense(2 * item_dim, item_dim, (None, None), rngs=rngs)
        if config.masked_head:
            width = config.encoder.embed_dim
            self.word_hidden = Dense(width, width, ("embed", None), rngs=rngs)
            self.word_norm = LayerNorm(width, config.encoder.layer_norm_epsilon)
            self.word_bias = parameter(jnp.zeros(config.encoder.vocab_size, jnp.float32), "vocab")

    def encode(self, token_ids: Int[Array, "u t"], *, key: jax.Array | None) -> Float[Array, "u e"]:
        """The vectors of texts; zeros for an empty one, which is how the cache knows it.

        Args:
          token_ids: 0 = padding.
          key: of dropout; None = as evaluated.
        """
        return self.pooled(self.encoder(token_ids, token_ids > 0, key=key), token_ids)

    def pooled(self, hidden: Float[Array, "u t e"], token_ids: Int[Array, "u t"]) -> Float[Array, "u e"]:
        """One vector a text from its tokens' states."""
        mask = token_ids > 0
        if self.config.pooling == "mean":
            return mean_pool(hidden, mask)
        return jnp.where(mask[:, :1], hidden[:, 0], 0.0)

    def word_states(self, states: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
        """What is scored against the token table: BERT's head, whose output map is its input table."""
        return self.word_norm(ACTIVATIONS[self.config.encoder.activation](self.word_hidden(states)))

    def project(self, vectors: Float[Array, "*b e"]) -> Float[Array, "*b d"]:
        """P: into the space of the items."""
        return self.projection(vectors).astype(jnp.float32)

    def __call__(self, rows: Float[Array, "*b d"], texts: ItemTexts) -> Float[Array, "*b d"]:
        """v(y)."""
        gate = jax.nn.sigmoid(self.gate(jnp.concatenate([rows, texts.vectors], -1)))
        gate = jnp.where(texts.by_id[..., None], gate, 0.0)
        gate = jnp.where(texts.has_text[..., None], gate, 1.0)
        return gate * rows + (1.0 - gate) * texts.vectors
