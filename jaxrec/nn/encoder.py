"""The encoder, by default BERT's: learned positions and a stack of attention and MLP blocks over packed rows.

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
from jaxrec.nn.compressed_attention import HistoryCompression
from jaxrec.nn.dropout import dropout
from jaxrec.nn.hstu import PointwiseAttention
from jaxrec.nn.integer_products import Products, use_products
from jaxrec.nn.layers import LayerNorm, parameter
from jaxrec.nn.lora import AdaptedDense, LoraSpec
from jaxrec.nn.positions import RelativeBias
from jaxrec.nn.visibility import Path, Visibility

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    # jax.nn.gelu takes erfc, whose relative precision in the far tail costs three times as much on a CPU.
    "gelu": lambda x: 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5))),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape and regularisation of an encoder; the defaults are a small recommender, not BERT-base.

    Attributes:
      embed_dim: width of the model.
      head_dim: width of a head; 0 = `embed_dim / num_heads`. Pruned models have fewer heads of the width they had.
      block: "transformer" = attention and an MLP; "hstu" = HSTU's gated attention with SiLU in the place of the softmax
        (`nn.hstu`), no MLP.
      mlp_dim: width of the hidden layer of each block's MLP; of HSTU's values and gate.
      mlp: "dense" = one hidden layer (BERT); "gated" = the hidden layer multiplied with the activation of a second
        one, a third kernel of the same size: SwiGLU with activation "silu", GEGLU with "gelu".
      max_positions: places in the longest history; rows of the position table where there is one.
      positions: how the order of the events enters. "learned" = a vector for each place, added to the event; "rotary" =
        queries and keys turned by their places; "relative" = a learned bias a head and layer on the scores, by
        buckets of the distance; "none" = not at all.
      compression: old events of long histories are seen in groups (`nn.compressed_attention`); none = all one by one.
        Causal tasks only.
      time_bias: add a learned bias a head and layer to the scores, by log2 buckets of the time between two events.
      norm_position: "post" = normalise after each residual sum (BERT); "pre" = before each sub-layer, and once
        more at the end when `final_norm`.
      activation: of the MLP; "gelu" is the exact form, "gelu_tanh" the tanh approximation, "silu" is x sigmoid(x).
      dropout_rate: on what each sub-layer adds to the residual stream.
      attention_dropout_rate: on the attention weights.
      mlp_dropout_rate: on the hidden layer of the MLP; on HSTU's gated values.
      embedding_dropout_rate: on the input of the first block.
      remat: recompute each block in the backward pass instead of keeping its activations.
      scan_layers: compile one block and loop over it instead of all of them: minutes less for many layers.
      layout: how the parameters lie on the mesh (`core.partition.LAYOUTS`): "replicated"; "fsdp" = a shard of each
        on every device along `data`; "tensor" = a share of the heads and of the MLP along `model`.
      gather_dtype: how the blocks' kernels and their gradients travel between devices: gathered in it under "fsdp",
        gradients summed over the devices in it. A device's own sum, over its positions, is float32 before that.
      attention: how it is computed (`nn.attention`): "full" holds all scores of a row; "chunked" and "fused" need
        memory in proportion to the length, in plain JAX and by the kernel of the platform (TPU, GPU), which drops
        no weights and adds no bias; "auto" = full up to 512 positions, else fused where it can be, else chunked.
      dtype: of activations; parameters, softmax and normalisation statistics are float32 always.
      products: "int8" = the maps of the blocks multiply whole numbers (`nn.integer_products`); attention does not.
      lora_rank: of the adapters (`nn.lora`) on the blocks' kernels, which are frozen then: a run trains the adapters,
        and what `optimizer.rates` leaves of the rest; 0 = none.
      lora_alpha: the adapters count `lora_alpha / lora_rank`; 0 = as much as the rank.
      vocab_size, type_vocab_size: rows of the token and token-type tables; for the text encoder only.
    """

    embed_dim: int = 64
    num_layers: int = 2
    num_heads: int = 1
    head_dim: int = 0
    block: Literal["transformer", "hstu"] = "transformer"
    mlp_dim: int = 256
    mlp: Literal["dense", "gated"] = "dense"
    max_positions: int = 512
    positions: Literal["learned", "rotary", "relative", "none"] = "learned"
    time_bias: bool = False
    compression: HistoryCompression | None = None
    norm_position: Literal["pre", "post"] = "post"
    final_norm: bool = True
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu"
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
    products: Products = "float"
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
        if self.norm_position not in ("pre", "post"):
            raise ValueError(f"norm_position={self.norm_position!r} must be 'pre' or 'post'.")
        if self.mlp not in ("dense", "gated"):
            raise ValueError(f"mlp={self.mlp!r} must be 'dense' or 'gated'.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} must be one of {', '.join(ACTIVATIONS)}.")
        if self.products not in (kinds := typing.get_args(Products)):
            raise ValueError(f"products={self.products!r} must be one of {', '.join(kinds)}.")
        if self.layer_norm_epsilon <= 0:
            raise ValueError(f"layer_norm_epsilon={self.layer_norm_epsilon} must be above 0.")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r} must be one of {', '.join(LAYOUTS)}.")
        self._check_attention()
        self._check_block()
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

    def _check_attention(self) -> None:
        if self.head_dim < 0 or (self.head_dim and self.block == "hstu"):
            raise ValueError(
                f"head_dim={self.head_dim} must not be negative, and block='hstu' has no width of its own; set it to 0."
            )
        if not self.head_dim and self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim={self.embed_dim} is not a multiple of num_heads={self.num_heads}; change one of them, or "
                "set head_dim."
            )
        if self.positions not in ("learned", "rotary", "relative", "none"):
            raise ValueError(
                f"positions={self.positions!r} must be 'learned', 'rotary', 'relative' or 'none'."
            )
        head_dim = self.head_width
        if self.positions == "rotary" and head_dim % 2:
            raise ValueError(
                f"positions='rotary' turns pairs, but a head of embed_dim={self.embed_dim} over num_heads="
                f"{self.num_heads} is {head_dim} wide; make it even."
            )
        if self.attention not in (paths := typing.get_args(AskedPath)):
            raise ValueError(f"attention={self.attention!r} must be one of {', '.join(paths)}.")
        if self.attention == "fused" and self.attention_dropout_rate:
            raise ValueError(
                f"attention='fused' drops no attention weights, but attention_dropout_rate="
                f"{self.attention_dropout_rate}; set it to 0, or attention to 'auto' or 'chunked'."
            )
        if self.compression is not None:
            self._check_compression()
        if self.attention == "fused" and self.past_kernels:
            raise ValueError(
                f"attention='fused' knows neither biases nor HSTU, but block={self.block!r}, positions="
                f"{self.positions!r} and time_bias={self.time_bias}; set attention to 'auto' or 'chunked'."
            )

    def _check_compression(self) -> None:
        wanted = {
            "block": ("transformer",),
            "positions": ("learned", "rotary", "none"),
            "attention": ("auto",),
        }
        for name, values in wanted.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: with a compression it must be {' or '.join(map(repr, values))}."
                )
        if self.time_bias:
            raise ValueError("time_bias=True: a group of a compression has no one time; set one of them off.")

    def _check_block(self) -> None:
        if self.block not in ("transformer", "hstu"):
            raise ValueError(f"block={self.block!r} must be 'transformer' or 'hstu'.")
        if self.block == "transformer":
            return
        for name, wanted in (("mlp", "dense"), ("activation", "silu")):
            if getattr(self, name) != wanted:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: block='hstu' has no MLP and computes with SiLU; set it to "
                    f"{wanted!r}."
                )
        if self.lora_rank:
            raise ValueError(f"lora_rank={self.lora_rank}: block='hstu' takes no adapters; set it to 0.")
        if self.mlp_dim % self.num_heads:
            raise ValueError(
                f"mlp_dim={self.mlp_dim} is not a multiple of num_heads={self.num_heads}, among which block='hstu' "
                "divides its values; change one of them."
            )

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.head_dim or self.embed_dim // self.num_heads

    @property
    def past_kernels(self) -> bool:
        """Whether the attention is one that no kernel computes, dropout aside."""
        return self.block == "hstu" or self.positions == "relative" or self.time_bias

    @property
    def lora(self) -> LoraSpec | None:
        """Of the blocks' kernels; None = no adapters."""
        if not self.lora_rank:
            return None
        return LoraSpec(rank=self.lora_rank, scale=(self.lora_alpha or self.lora_rank) / self.lora_rank)


class Block(nnx.Module):
    """One layer: attention, then (but in HSTU) an MLP, each with a residual connection and a normalisation."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        dense = functools.partial(AdaptedDense, lora=config.lora, rngs=rngs)
        self.attention = _attention(config, rngs)
        self.attention_norm = LayerNorm(config.embed_dim, config.layer_norm_epsilon)
        if config.block == "hstu":
            return
        self.mlp_in = dense(config.embed_dim, config.mlp_dim, ("embed", "mlp"))
        if config.mlp == "gated":
            self.mlp_gate = dense(config.embed_dim, config.mlp_dim, ("embed", "mlp"))
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
        if config.block == "hstu":
            return x

        inner = self.mlp_norm(x) if pre else x
        inner = dropout(self._hidden(inner), config.mlp_dropout_rate, keys[2])
        x = x + dropout(self.mlp_out(inner), config.dropout_rate, keys[3])
        return x if pre else self.mlp_norm(x)

    def _hidden(self, x: Float[Array, "b q d"]) -> Float[Array, "b q f"]:
        """The hidden layer of the MLP.

        Source: Shazeer, arXiv 2020 (gated linear units in the Transformer's MLP).
        """
        activate = ACTIVATIONS[self.config.activation]
        if self.config.mlp == "gated":
            return activate(self.mlp_gate(x)) * self.mlp_in(x)
        return activate(self.mlp_in(x))


def _attention(config: EncoderConfig, rngs: nnx.Rngs) -> SelfAttention | PointwiseAttention:
    rotary, distance = config.positions == "rotary", config.positions == "relative"
    relative_bias = RelativeBias(config.num_heads, distance=distance, time=config.time_bias)
    if config.block == "hstu":
        return PointwiseAttention(
            config.embed_dim,
            config.mlp_dim,
            config.num_heads,
            max_positions=config.max_positions,
            attention_dropout_rate=config.attention_dropout_rate,
            mlp_dropout_rate=config.mlp_dropout_rate,
            epsilon=config.layer_norm_epsilon,
            rotary=rotary,
            relative_bias=relative_bias,
            rngs=rngs,
        )
    return SelfAttention(
        config.embed_dim,
        config.num_heads,
        config.attention_dropout_rate,
        head_dim=config.head_width,
        rotary=rotary,
        relative_bias=relative_bias,
        compression=config.compression,
        layout=config.layout,
        lora=config.lora,
        rngs=rngs,
    )


def _given(times: Int[Array, "b l"] | None) -> Int[Array, "b l"]:
    if times is None:
        raise ValueError("time_bias=True needs the times of the events; give them, or set it to False.")
    return times


class Encoder(nnx.Module):
    """Turns the vectors of a history's events into contextual vectors.

    Source: Devlin et al., NAACL 2019 (post-norm); Xiong et al., ICML 2020 (pre-norm).
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        if config.positions == "learned":
            shape = (config.max_positions, config.embed_dim)
            table = 0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)
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
        times: Int[Array, "b l"] | None = None,
        last_positions: Int[Array, "b s"] | None = None,
    ) -> Float[Array, "b s d"]:
        """Encodes packed rows.

        Args:
          segment_ids: positions see their own segment only; 0 = padding, whose output means nothing.
          positions: place of each event in its segment, an index of the position table; larger ones use its
            last row. The other kinds of positions see the columns, which differ as places in a segment do.
          causal: see only oneself and what is before.
          key: of the dropout masks; None = evaluation, no dropout.
          times: of the events, as `Batch.times`; for `time_bias`.
          last_positions: columns at which the last block computes its queries and MLP; equals gathering these
            columns of the full output, for less work.

        Returns:
          `[b, l, d]`, or `[b, s, d]` with `last_positions`.

        Raises:
          ValueError: the config has a `time_bias` and there are no times, or a `compression` and the rows are read both
            ways.
        """
        config = self.config
        if config.compression is not None and not causal:
            raise ValueError(
                "encoder.compression groups what is past, and this task reads histories both ways; use causal tasks "
                "(NextItem), or set it to none."
            )
        times = _given(times) if config.time_bias else None
        x = self._embedded(x, positions)
        keys: list[jax.Array | None] = [None] * (config.num_layers + 1)
        if key is not None:
            keys = [jax.random.fold_in(key, i) for i in range(config.num_layers + 1)]
        x = dropout(x, config.embedding_dropout_rate, keys[-1])

        run = nnx.remat(Block.__call__) if config.remat else Block.__call__
        run = use_products(config.products)(run)
        past_kernels = config.past_kernels or (key is not None and config.attention_dropout_rate > 0)
        path: Path = "compressed"
        if config.compression is None or x.shape[1] <= config.compression.recent:
            path = choose_path(config.attention, length=x.shape[1], past_kernels=past_kernels)
        look = functools.partial(Visibility.of, segment_ids, causal=causal, path=path, times=times)
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

    def _embedded(self, x: Float[Array, "b l d"], positions: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """What the first block sees, but for the dropout."""
        if self.config.positions == "learned":
            x = x + jnp.take(self.position_table[...], positions, axis=0, mode="clip")
        if self.config.norm_position == "post":
            x = self.embedding_norm(x)
        return x.astype(compute_dtype(self.config.dtype))

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
