"""Masked words of the items' texts: the text encoder goes on learning the language of the catalogue (BERT's own task).

It is told over the texts that a step encodes with a gradient, in a pass of their own. Hidden words alone are scored, at
most M of a text, against a vocabulary that is split over the devices: no `[words, vocabulary]` array exists.

V = texts of a step, T = words of a text, M = hidden words of a text (a static bound), E = width of the text encoder.

Source: Devlin et al., NAACL 2019 (15 % hidden; of these 80 % behind [MASK], 10 % another word, 10 % their own).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrec.core.batch import Batch
from jaxrec.core.hashing import hashed_bits, hashed_uniform
from jaxrec.core.partition import spec
from jaxrec.embedding.table import from_logical
from jaxrec.losses.softmax import full_softmax
from jaxrec.tasks.base import DataFacts, Forward, Plan, Task, TaskLoss


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedText(Task):
    """Predicts hidden words of item texts; needs `model.text` with `masked_head`.

    The loss is a mean over the hidden words of a microbatch.

    Attributes:
      mask_rate: share of a text's words, [CLS] and [SEP] apart, that is hidden; at least one of each text.
      keep_rate, replace_rate: of the hidden words, how many show themselves or a random one instead of [MASK].
      mask_token: the number of [MASK] in the vocabulary; 103 in those of BERT and MiniLM.
    """

    mask_rate: float = 0.15
    keep_rate: float = 0.1
    replace_rate: float = 0.1
    mask_token: int = 103

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.mask_rate <= 1.0:
            raise ValueError(f"MaskedText.mask_rate={self.mask_rate} must be above 0 and at most 1.")
        if min(self.keep_rate, self.replace_rate) < 0 or self.keep_rate + self.replace_rate > 1.0:
            raise ValueError(
                f"MaskedText.keep_rate={self.keep_rate} and replace_rate={self.replace_rate} must not be negative, and "
                "their sum must not exceed 1."
            )
        if self.mask_token < 1:
            raise ValueError(f"MaskedText.mask_token={self.mask_token} must be at least 1; 0 is padding.")

    @property
    def takes_mixture(self) -> bool:
        """No item is scored."""
        return True

    @property
    def encodings(self) -> frozenset[str]:
        """None of the user tower."""
        return frozenset()

    def masked_tokens(self, num_text_tokens: int) -> int:
        """M: the share of the longest text."""
        return max(1, math.ceil(self.mask_rate * max(0, num_text_tokens - 2)))

    def plan(self, batch: Batch, facts: DataFacts, key: jax.Array) -> Plan:
        """The texts come with the step, after the plans; see the class for the mean."""
        return Plan(jnp.float32(1.0))

    def loss(self, forward: Forward, plan: Plan, key: jax.Array) -> TaskLoss:
        """Cross-entropy of the hidden words over the vocabulary, padding left out."""
        assert forward.text_tokens is not None, "checked with the config"
        text, tokens = forward.model.text, forward.text_tokens
        columns, weights = self.hidden(tokens, jax.random.fold_in(key, 0))
        shown = self.shown(tokens, columns, weights > 0, text.config.encoder.vocab_size, key)
        states = text.encoder(shown, tokens > 0, key=jax.random.fold_in(key, 4))
        states = text.word_states(jnp.take_along_axis(states, columns[..., None], 1))
        vectors, bias = (
            jax.lax.with_sharding_constraint(from_logical(x, x.shape[0]), spec("row"))
            for x in (text.encoder.token_table[...], text.word_bias[...])
        )
        total = full_softmax(
            jax.lax.collapse(states, 0, 2),
            jnp.take_along_axis(tokens, columns, 1).reshape(-1),
            weights.reshape(-1),
            vectors,
            bias,
            num_rows=text.config.encoder.vocab_size,
        )
        return TaskLoss(total / jnp.maximum(jnp.sum(weights), 1.0))

    def hidden(
        self, tokens: Int[Array, "v t"], key: jax.Array
    ) -> tuple[Int[Array, "v m"], Float[Array, "v m"]]:
        """The columns that are hidden, and 1.0 where there is one: a random share of each text's inner words."""
        inner = jnp.sum(tokens > 0, -1, keepdims=True) - 2
        columns = jnp.arange(tokens.shape[1])
        is_word = (columns > 0) & (columns <= inner)
        order = jnp.where(is_word, 1.0 + hashed_uniform(key, tokens.shape), 0.0)
        bound = min(self.masked_tokens(tokens.shape[1]), tokens.shape[1])
        found, chosen = jax.lax.top_k(order, bound)
        wanted = jnp.maximum(jnp.round(self.mask_rate * inner), 1)
        weights = (found > 0) & (jnp.arange(bound) < wanted)
        return chosen, weights.astype(jnp.float32)

    def shown(
        self,
        tokens: Int[Array, "v t"],
        columns: Int[Array, "v m"],
        is_hidden: Bool[Array, "v m"],
        vocab_size: int,
        key: jax.Array,
    ) -> Int[Array, "v t"]:
        """The texts with what stands for their hidden words."""
        fate = hashed_uniform(jax.random.fold_in(key, 1), columns.shape)
        bits = hashed_bits(jax.random.fold_in(key, 2), columns.shape)
        words = 1 + (bits % jnp.uint32(vocab_size - 1)).astype(jnp.int32)
        own = jnp.take_along_axis(tokens, columns, 1)
        instead = jnp.where(fate < self.replace_rate, words, self.mask_token)
        instead = jnp.where(
            (fate >= self.replace_rate) & (fate < self.replace_rate + self.keep_rate), own, instead
        )
        rows = jnp.arange(len(tokens))[:, None]
        return tokens.at[rows, columns].set(jnp.where(is_hidden, instead, own), unique_indices=True)
