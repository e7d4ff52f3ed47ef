"""Self-attention over packed rows, by one of three paths that give the same, and by one that sees less of long rows.

`full` holds the whole matrix of scores: the fastest where rows are short. `chunked` and `fused` need memory in
proportion to the length: plain JAX that runs everywhere, and the kernels of TPUs and GPUs. `full` and `chunked` drop
attention weights, which neither `jax.nn.dot_product_attention` nor the kernels do.
B = rows, Q = query positions, L = key positions, D = model width, H = heads, K = width of a head.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxrec.core.mesh import platform
from jaxrec.core.partition import Layout
from jaxrec.nn.chunked_attention import CHUNK, attend_in_chunks
from jaxrec.nn.compressed_attention import HistoryCompression, attend_compressed
from jaxrec.nn.dropout import dropout
from jaxrec.nn.fused_attention import attend_fused
from jaxrec.nn.layers import affine, glorot_normal, parameter
from jaxrec.nn.lora import Adapter, LoraSpec
from jaxrec.nn.positions import RelativeBias, rotate, score_bias
from jaxrec.nn.visibility import MASKED, Path, Visibility

AskedPath = Literal["auto", "full", "chunked", "fused"]
# Rows of at most so many positions take the full path. On a CPU it is the faster one at 512 positions (114 ms against
# 128 chunked, 8 rows of 4 heads of 64, both passes) and the slower one at 1,024 (478 against 388). On a v5p with 8,192
# positions a chip (768 wide, 12 heads, remat) a step's temporaries are 606 MB against the kernel's 665 at 256
# positions, 740 against 666 at 512, 914 against 636 at 1,024.
FULL_UP_TO = 512


def choose_path(asked: AskedPath, *, length: int, past_kernels: bool) -> Path:
    """The path that "auto" stands for; any other is itself.

    Args:
      length: of a row.
      past_kernels: whether something is asked that no kernel has: dropout or biases, HSTU's weights.
    """
    if asked != "auto":
        return asked
    if length <= FULL_UP_TO:
        return "full"
    return "chunked" if past_kernels or platform() == "cpu" else "fused"


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(
    query: Float[Array, "b h q k"],
    key: Float[Array, "b h l k"],
    value: Float[Array, "b h l k"],
    mask: Bool[Array, "b q l"],
    dropout_key: jax.Array | None = None,
    dropout_rate: float = 0.0,
    bias: Float[Array, "#b h q l"] | None = None,
) -> Float[Array, "b h q k"]:
    """Scaled dot-product attention; scores and softmax in float32.

    The weights are divided by their sum after the product with the values: one pass less over `[b, h, q, l]`.
    The backward pass is written out because the automatic one takes more passes over that array.

    Args:
      mask: True = may be seen; at least one key for each query.
      dropout_key: of the dropout on the weights; None = no dropout.
      bias: added to the scaled scores.

    Source: Vaswani et al., NeurIPS 2017; dropout on the weights as in its reference implementation.
    """
    return _attend_forward(query, key, value, mask, dropout_key, dropout_rate, bias)[0]


def _attend_forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    dropout_key: jax.Array | None,
    dropout_rate: float,
    bias: jax.Array | None,
) -> tuple[jax.Array, tuple]:
    scale = 1.0 / math.sqrt(query.shape[-1])
    scores = jnp.einsum("bhqk,bhlk->bhql", query * scale, key, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias
    scores = jnp.where(mask[:, None], scores, MASKED)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(value.dtype)
    kept = dropout(weights, dropout_rate, dropout_key)
    mixed = jnp.einsum("bhql,bhlk->bhqk", kept, value, preferred_element_type=jnp.float32) / total
    mixed = mixed.astype(value.dtype)
    its_rows = None if bias is None else bias[:, 0, 0, 0]  # their number is all that the way back needs
    return mixed, (query, key, value, dropout_key, weights, total, mixed, its_rows)


def _attend_backward(dropout_rate: float, residuals: tuple, g: jax.Array) -> tuple:
    """With P = weights / total and D the dropout: dP = D(g V'), dS = P (dP - sum(g O)), dQ = dS K, dK = dS' Q."""
    query, key, value, dropout_key, weights, total, mixed, its_rows = residuals
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scale = 1.0 / math.sqrt(query.shape[-1])
    g = g.astype(jnp.float32) / total
    along = jnp.sum(g * mixed.astype(jnp.float32), axis=-1, keepdims=True)
    g = g.astype(value.dtype)
    d_value = product("bhql,bhqk->bhlk", dropout(weights, dropout_rate, dropout_key), g)
    d_weights = dropout(product("bhqk,bhlk->bhql", g, value), dropout_rate, dropout_key)
    d_scores = weights.astype(jnp.float32) * (d_weights - along)
    d_bias = None
    if its_rows is not None:
        d_bias = jnp.sum(d_scores, axis=0, keepdims=True) if len(its_rows) == 1 else d_scores
    d_scores = d_scores.astype(value.dtype)
    d_query = product("bhql,bhlk->bhqk", d_scores, key) * scale
    d_key = product("bhql,bhqk->bhlk", d_scores, query * scale)
    d_arrays = d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype)
    return *d_arrays, None, None, d_bias


attend.defvjp(_attend_forward, _attend_backward)


class SelfAttention(nnx.Module):
    """Multi-head self-attention; query, key and value kernels lie in one array `[D, 3, H, K]`, with one adapter."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout_rate: float,
        *,
        head_dim: int,
        rotary: bool,
        relative_bias: RelativeBias,
        compression: HistoryCompression | None = None,
        layout: Layout = "replicated",
        lora: LoraSpec | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes random weights.

        Args:
          head_dim: K; the heads together may be narrower than the model, as those of a pruned one are.
          rotary: turn queries and keys by their columns.
          relative_bias: is added to the scores.
          compression: of the path "compressed".
          layout: of the parameters, for the kernels of "fused".
        """
        self.num_heads = num_heads
        self.dropout_rate = dropout_rate
        self.rotary = rotary
        self.relative_bias = relative_bias
        self.layout: Layout = layout
        self.compression = compression
        if compression is not None:
            self.pool_query = parameter(jnp.zeros((num_heads, head_dim), jnp.float32), "heads", None)
        kernel = glorot_normal(rngs.params(), (embed_dim, 3, num_heads, head_dim), embed_dim, embed_dim)
        names = ("embed", None, "heads", None)
        self.qkv_kernel = parameter(kernel, *names)
        self.qkv_lora = Adapter(kernel.shape, names, lora, num_in=1, rngs=rngs) if lora else None
        self.qkv_bias = parameter(jnp.zeros((3, num_heads, head_dim), jnp.float32), None, "heads", None)
        kernel = glorot_normal(rngs.params(), (num_heads, head_dim, embed_dim), embed_dim, embed_dim)
        self.out_kernel = parameter(kernel, *names[2:], "embed")
        self.out_lora = (
            Adapter(kernel.shape, (*names[2:], "embed"), lora, num_in=2, rngs=rngs) if lora else None
        )
        self.out_bias = parameter(jnp.zeros((embed_dim,), jnp.float32), "embed")

    def __call__(
        self,
        x: Float[Array, "b l d"],
        seen: Visibility,
        *,
        key: jax.Array | None,
    ) -> Float[Array, "b q d"]:
        """Attends from the query positions of `seen` to every position that they see, by the path of `seen`."""
        query_positions, inner = seen.query_positions, self.out_kernel.shape[0] * self.out_kernel.shape[1]
        if query_positions is None:
            queries, keys, values = jnp.split(self._project(x, slice(None)), 3, axis=-1)
        else:
            queries = self._project(take_columns(x, query_positions), slice(inner))
            keys, values = jnp.split(self._project(x, slice(inner, None)), 2, axis=-1)
        queries, keys, values = (self._split_heads(part) for part in (queries, keys, values))
        if self.rotary:
            queries, keys = rotate(queries, seen.queries.columns), rotate(keys, seen.keys.columns)
        match seen.path:
            case "full":
                added = score_bias(self.relative_bias.tables(1), seen.queries, seen.keys)
                mixed = attend(queries, keys, values, seen.mask, key, self.dropout_rate, added)
            case "chunked":
                tables = self.relative_bias.tables(len(x))
                mixed = attend_in_chunks(queries, keys, values, seen, key, self.dropout_rate, CHUNK, tables)
            case "compressed":
                assert self.compression is not None, "the encoder asks for the path by its config"
                mixed = attend_compressed(
                    queries,
                    keys,
                    values,
                    seen,
                    self.compression,
                    self.pool_query[...],
                    key,
                    self.dropout_rate,
                )
            case "fused":
                mixed = attend_fused(
                    queries, keys, values, seen.segment_ids, causal=seen.causal, layout=self.layout
                )
        mixed = self._join_heads(mixed)
        out = affine(mixed, self.out_kernel[...].reshape(inner, -1), self.out_bias[...])
        return out if self.out_lora is None else out + self.out_lora(mixed)

    def _project(self, x: Float[Array, "b l d"], columns: slice) -> Float[Array, "b l f"]:
        """Queries, keys and values side by side, or some of them."""
        kernel, bias = self.qkv_kernel[...].reshape(x.shape[-1], -1), self.qkv_bias[...].reshape(-1)
        out = affine(x, kernel[:, columns], bias[columns])
        return out if self.qkv_lora is None else out + self.qkv_lora(x, columns)

    def _split_heads(self, x: Float[Array, "b l d"]) -> Float[Array, "b h l k"]:
        batch, length, dim = x.shape
        if self.num_heads == 1:
            return x[:, None]
        return jnp.swapaxes(x.reshape(batch, length, self.num_heads, dim // self.num_heads), 1, 2)

    def _join_heads(self, x: Float[Array, "b h l k"]) -> Float[Array, "b l d"]:
        batch, num_heads, length, head_dim = x.shape
        x = x[:, 0] if num_heads == 1 else jnp.swapaxes(x, 1, 2)
        return x.reshape(batch, length, num_heads * head_dim)


def take_columns(x: Float[Array, "b l d"], positions: Int[Array, "b q"]) -> Float[Array, "b q d"]:
    """`x[b, positions[b]]` for each row b."""
    return jnp.take_along_axis(x, positions[:, :, None], axis=1)
