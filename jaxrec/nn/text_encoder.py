"""The text encoder: BERT over word pieces, with the same encoder class as the user tower.

B = texts, T = tokens in a text, D = embed_dim.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxrec.nn.encoder import Encoder, EncoderConfig
from jaxrec.nn.layers import Dense, parameter


class BertTextEncoder(nnx.Module):
    """BERT: word, position and token-type embeddings, bidirectional blocks, an optional pooler.

    Source: Devlin et al., NAACL 2019.
    """

    def __init__(self, config: EncoderConfig, *, with_pooler: bool = False, rngs: nnx.Rngs):
        """Makes a text encoder with random weights; `huggingface.load_bert` makes a trained one.

        Raises:
          ValueError: the config has no rows for words or token types, or wants times.
        """
        for name in ("vocab_size", "type_vocab_size"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name}={getattr(config, name)} must be at least 1 in a text encoder.")
        if config.time_bias:
            raise ValueError("time_bias=True: the words of a text have no times; set it to False.")
        self.config = config
        table = 0.02 * jax.random.normal(rngs.params(), (config.vocab_size, config.embed_dim), jnp.float32)
        self.token_table = parameter(table, "vocab", "embed")
        table = 0.02 * jax.random.normal(
            rngs.params(), (config.type_vocab_size, config.embed_dim), jnp.float32
        )
        self.type_table = parameter(table, None, "embed")
        self.encoder = Encoder(config, rngs=rngs)
        self.pooler = (
            Dense(config.embed_dim, config.embed_dim, ("embed", "embed"), rngs=rngs) if with_pooler else None
        )

    def __call__(
        self,
        token_ids: Int[Array, "b t"],
        token_mask: Bool[Array, "b t"],
        *,
        key: jax.Array | None,
        type_ids: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b t d"]:
        """The hidden state of each token.

        Args:
          token_mask: True = a real token. Padding is never seen, and its own hidden state means nothing.
          key: of the dropout masks; None = evaluation.
          type_ids: token types; None = type 0 everywhere.
        """
        x = jnp.take(self.token_table[...], token_ids, axis=0, mode="clip")
        if type_ids is None:
            x = x + self.type_table[...][0]
        else:
            x = x + jnp.take(self.type_table[...], type_ids, axis=0, mode="clip")
        positions = jnp.broadcast_to(jnp.arange(token_ids.shape[1], dtype=jnp.int32), token_ids.shape)
        segment_ids = token_mask.astype(jnp.int32)  # one text = one segment; padding sees padding only
        return self.encoder(x, segment_ids=segment_ids, positions=positions, causal=False, key=key)

    def pooled(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b d"]:
        """BERT's pooler: tanh of a dense map of the first token.

        Raises:
          ValueError: the encoder was made without a pooler.
        """
        if self.pooler is None:
            raise ValueError(
                "this text encoder has no pooler; make it with with_pooler=True or use mean_pool."
            )
        return jnp.tanh(self.pooler(hidden[:, 0]))


def mean_pool(hidden: Float[Array, "b t d"], token_mask: Bool[Array, "b t"]) -> Float[Array, "b d"]:
    """The mean hidden state over the real tokens; zeros for a text without any.

    Source: Reimers and Gurevych, EMNLP 2019 (the pooling of sentence encoders such as MiniLM).
    """
    weights = token_mask.astype(jnp.float32)
    total = jnp.einsum("btd,bt->bd", hidden.astype(jnp.float32), weights)
    return (total / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1.0)).astype(hidden.dtype)
