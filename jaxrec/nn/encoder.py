"""The BERT encoder: learned positions and a stack of attention and MLP blocks over packed rows.

B = rows, L = positions in a row, S = positions asked of the last block, D = embed_dim, F = mlp_dim.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxrec.core import partition
from jaxrec.core.mesh import DATA
from jaxrec.core.partition import LAYOUTS, Layout
from jaxrec.core.precision import ActivationDtype, compute_dtype
from jaxrec.nn.attention import AskedPath, SelfAttention, choose_path, take_columns
from jaxrec.nn.dropout import dropout
from jaxrec.nn.layers import LayerNorm, parameter
from jaxrec.nn.lora import AdaptedDense, LoraSpec
from jaxrec.nn.visibility import Visibility

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    # jax.nn.gelu takes erfc, whose relative precision in the far tail costs three times as much on a CPU.
    "gelu": lambda x: 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5))),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape and regularisation of an encoder; the defaults are a small recommender, not BERT-base.

    Attributes:
      embed_dim: width of the model.
      mlp_dim: width of the hidden layer of each block's MLP.
      max_positions: rows of the position table.
      norm_position: "post" = normalise after each residual sum (BERT); "pre" = before each sub-layer, and once
        more at the end when `final_norm`.
      activation: of the MLP; "gelu" is the exact form, "gelu_tanh" the tanh approximation.
      dropout_rate: on what each sub-layer adds to the residual stream.
      attention_dropout_rate: on the attention weights.
      mlp_dropout_rate: on the hidden layer of the MLP.
      embedding_dropout_rate: on the input of the first block.
      remat: recompute each block in the backward pass instead of keeping its activations.
      scan_layers: compile one block and loop over it instead of all of them: minutes less for many layers.
      layout: how the parameters lie on the mesh (`core.partition.LAYOUTS`): "replicated"; "fsdp" = a shard of each
        on every device along `data`; "tensor" = a share of the heads and of the MLP along `model`.
      gather_dtype: how the blocks' kernels and their gradients travel between devices: gathered in it under "fsdp",
        gradients summed over the devices in it. A device's own sum, over its positions, is float32 before that.
      attention: how it is computed (`nn.attention`): "full" holds all scores of a row; "chunked" and "fused" need
        memory in proportion to the length, in plain JAX and by the kernel of the platform (TPU, GPU), which drops
        no weights; "auto" = full up to 512 positions, else fused where it can be, else chunked.
      dtype: of activations; parameters, softmax and normalisation statistics are float32 always.
      lora_rank: of the adapters (`nn.lora`) on the blocks' kernels, which are frozen then: a run trains the adapters,
        and what `optimizer.rates` leaves of the rest; 0 = none.
      lora_alpha: the adapters count `lora_alpha / lora_rank`; 0 = as much as the rank.
      vocab_size, type_vocab_size: rows of the token and token-type tables; for the text encoder only.
    """

    embed_dim: int = 64
    num_layers: int = 2
    num_heads: int = 1
    mlp_dim: int = 256
    max_positions: int = 512
    norm_position: Literal["pre", "post"] = "post"
    final_norm: bool = True
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    mlp_dropout_rate: float = 0.0
    embedding_dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-12
    remat: bool = False
    scan_layers: bool = False
    layout: Layout = "replicated"
    gather_dtype: ActivationDtype = "float32"
    attention: AskedPath = "auto"
    dtype: ActivationDtype = "float32"
    lora_rank: int = 0
    lora_alpha: float = 0.0
    vocab_size: int = 0
    type_vocab_size: int = 0

    def __post_init__(self) -> None:
        for name in ("embed_dim", "num_layers", "num_heads", "mlp_dim", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("dropout_rate", "attention_dropout_rate", "mlp_dropout_rate", "embedding_dropout_rate"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1.")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim={self.embed_dim} is not a multiple of num_heads={self.num_heads}; change one of them."
            )
        if self.norm_position not in ("pre", "post"):
            raise ValueError(f"norm_position={self.norm_position!r} must be 'pre' or 'post'.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} must be one of {', '.join(ACTIVATIONS)}.")
        if self.layer_norm_epsilon <= 0:
            raise ValueError(f"layer_norm_epsilon={self.layer_norm_epsilon} must be above 0.")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r} must be one of {', '.join(LAYOUTS)}.")
        if self.attention not in (paths := typing.get_args(AskedPath)):
            raise ValueError(f"attention={self.attention!r} must be one of {', '.join(paths)}.")
        if self.attention == "fused" and self.attention_dropout_rate:
            raise ValueError(
                f"attention='fused' drops no attention weights, but attention_dropout_rate="
                f"{self.attention_dropout_rate}; set it to 0, or attention to 'auto' or 'chunked'."
            )
        if self.lora_rank < 0 or self.lora_alpha < 0 or (self.lora_alpha and not self.lora_rank):
            raise ValueError(
                f"lora_rank={self.lora_rank} and lora_alpha={self.lora_alpha} must not be negative, and without "
                "adapters (lora_rank=0) there is no alpha."
            )
        compute_dtype(self.dtype)
        compute_dtype(self.gather_dtype)
        if self.layout == "tensor" and self.gather_dtype != "float32":
            raise ValueError(
                f"gather_dtype={self.gather_dtype!r}: layout='tensor' gathers no kernels; use 'float32', or "
                "layout='fsdp'."
            )

    @property
    def lora(self) -> LoraSpec | None:
        """Of the blocks' kernels; None = no adapters."""
        if not self.lora_rank:
            return None
        return LoraSpec(rank=self.lora_rank, scale=(self.lora_alpha or self.lora_rank) / self.lora_rank)


class Block(nnx.Module):
    """One layer: self-attention, then an MLP, each with a residual connection and a normalisation."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.attention = SelfAttention(
            config.embed_dim,
            config.num_heads,
            config.attention_dropout_rate,
            layout=config.layout,
            lora=config.lora,
            rngs=rngs,
        )
        dense = functools.partial(AdaptedDense, lora=config.lora, rngs=rngs)
        self.attention_norm = LayerNorm(config.embed_dim, config.layer_norm_epsilon)
        self.mlp_in = dense(config.embed_dim, config.mlp_dim, ("embed", "mlp"))
        self.mlp_out = dense(config.mlp_dim, config.embed_dim, ("mlp", "embed"))
        self.mlp_norm = LayerNorm(config.embed_dim, config.layer_norm_epsilon)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        seen: Visibility,
        key: jax.Array | None,
    ) -> Float[Array, "b q d"]:
        """Applies the layer, at the query positions of `seen` only where it has them."""
        config, query_positions = self.config, seen.query_positions
        keys: list[jax.Array | None] = [None] * 4
        if key is not None:
            keys = [jax.random.fold_in(key, i) for i in range(4)]
        residual = x if query_positions is None else take_columns(x, query_positions)
        pre = config.norm_position == "pre"

        inner = self.attention_norm(x) if pre else x
        inner = self.attention(inner, seen, key=keys[0])
        x = residual + dropout(inner, config.dropout_rate, keys[1])
        x = x if pre else self.attention_norm(x)

        inner = self.mlp_norm(x) if pre else x
        inner = dropout(ACTIVATIONS[config.activation](self.mlp_in(inner)), config.mlp_dropout_rate, keys[2])
        x = x + dropout(self.mlp_out(inner), config.dropout_rate, keys[3])
        return x if pre else self.mlp_norm(x)


class Encoder(nnx.Module):
    """Turns the vectors of a history's events into contextual vectors.

    Source: Devlin et al., NAACL 2019 (post-norm); Xiong et al., ICML 2020 (pre-norm).
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        table = 0.02 * jax.random.normal(rngs.params(), (config.max_positions, config.embed_dim), jnp.float32)
        self.position_table = parameter(table, "position", "embed")
        if config.norm_position == "post":
            self.embedding_norm = LayerNorm(config.embed_dim, config.layer_norm_epsilon)
        elif config.final_norm:
            self.final_norm = LayerNorm(config.embed_dim, config.layer_norm_epsilon)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])

    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        segment_ids: Int[Array, "b l"],
        positions: Int[Array, "b l"],
        causal: bool,
        key: jax.Array | None,
        last_positions: Int[Array, "b s"] | None = None,
    ) -> Float[Array, "b s d"]:
        """Encodes packed rows.

        Args:
          segment_ids: positions see their own segment only; 0 = padding, whose output means nothing.
          positions: place of each event in its segment, an index of the position table; larger ones use its
            last row.
          causal: see only oneself and what is before.
          key: of the dropout masks; None = evaluation, no dropout.
          last_positions: columns at which the last block computes its queries and MLP; equals gathering these
            columns of the full output, for less work.

        Returns:
          `[b, l, d]`, or `[b, s, d]` with `last_positions`.
        """
        config = self.config
        x = x + jnp.take(self.position_table[...], positions, axis=0, mode="clip")
        if config.norm_position == "post":
            x = self.embedding_norm(x)
        x = x.astype(compute_dtype(config.dtype))
        keys: list[jax.Array | None] = [None] * (config.num_layers + 1)
        if key is not None:
            keys = [jax.random.fold_in(key, i) for i in range(config.num_layers + 1)]
        x = dropout(x, config.embedding_dropout_rate, keys[-1])

        run = nnx.remat(Block.__call__) if config.remat else Block.__call__
        path = choose_path(
            config.attention,
            length=x.shape[1],
            drops_weights=key is not None and config.attention_dropout_rate > 0,
        )
        look = functools.partial(Visibility.of, segment_ids, causal=causal, path=path)
        seen = look()
        if config.layout == "tensor":  # the devices along `model` share the work on a row instead of the rows
            x = jax.lax.with_sharding_constraint(x, PartitionSpec(DATA))
        if config.scan_layers and config.num_layers > 2:
            x = self._scan(run, x, seen, keys[:-2])
        else:
            for block, block_key in zip(self.blocks[:-1], keys[:-2], strict=True):
                x = run(block, x, seen, block_key)
        if last_positions is not None:
            seen = look(query_positions=last_positions)
        x = run(self.blocks[-1], x, seen, keys[-2])
        if config.norm_position == "pre" and config.final_norm:
            x = self.final_norm(x)
        if config.layout == "tensor":
            x = jax.lax.with_sharding_constraint(x, partition.spec("batch"))
        return x

    def _scan(
        self, run: Callable[..., jax.Array], x: jax.Array, seen: Visibility, keys: list[jax.Array | None]
    ) -> jax.Array:
        """All blocks but the last, as one compiled loop over their stacked parameters."""
        graphdef, first = nnx.split(self.blocks[0])
        states = [first, *(nnx.split(block)[1] for block in self.blocks[1:-1])]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        stacked_keys = None if keys[0] is None else jnp.stack([key for key in keys if key is not None])

        def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            state, key = layer
            return run(nnx.merge(graphdef, state), x, seen, key), None

        return jax.lax.scan(body, x, (stacked, stacked_keys))[0]
