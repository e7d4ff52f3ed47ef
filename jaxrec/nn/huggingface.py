"""Loads a Hugging Face BERT directory (config.json, model.safetensors, vocab.txt) without torch.

V = words, P = positions, D = embed_dim, F = mlp_dim, H = heads, K = width of a head.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx

from jaxrec.core.precision import ActivationDtype
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.nn.text_encoder import BertTextEncoder

CONFIG_FILE, WEIGHTS_FILE, VOCABULARY_FILE = "config.json", "model.safetensors", "vocab.txt"
HIDDEN_ACTS: dict[str, Literal["gelu", "gelu_tanh", "relu"]] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
SIZES = {
    "hidden_size": "embed_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dim",
    "max_position_embeddings": "max_positions",
    "vocab_size": "vocab_size",
    "type_vocab_size": "type_vocab_size",
}

Arrays = dict[str, np.ndarray]
Read = Callable[..., np.ndarray]


def load_bert(
    directory: str | Path, *, dtype: ActivationDtype = "float32", remat: bool = False
) -> tuple[BertTextEncoder, EncoderConfig]:
    """Builds the text encoder of `directory` with its trained weights, in float32.

    Both layouts are read: a bare encoder, and one inside a head model, where each name begins with `bert.`.
    The pooler is taken when the file has one; heads are left aside.

    Args:
      dtype: of activations.
      remat: recompute each block in the backward pass.

    Raises:
      ValueError: a file is missing or unreadable, the model is no BERT that ours can represent, or a tensor is
        missing or has another shape than config.json says.
    """
    directory = Path(directory)
    config = read_config(directory, dtype=dtype, remat=remat)
    words = len(read_vocabulary(directory))
    if words > config.vocab_size:
        raise ValueError(
            f"{directory / VOCABULARY_FILE} has {words} words, but vocab_size={config.vocab_size} in {CONFIG_FILE}; "
            "the two must come from the same model."
        )
    arrays = _read_arrays(directory / WEIGHTS_FILE, config)
    with_pooler = "pooler/kernel" in arrays
    abstract = nnx.eval_shape(lambda: BertTextEncoder(config, with_pooler=with_pooler, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    leaves = []
    for path, leaf in nnx.to_flat_state(state):
        array = arrays.pop("/".join(map(str, path)))
        # Both sides are ours, so a difference is a fault of this file, not of the directory.
        assert leaf.shape == array.shape, path
        leaves.append((path, leaf.replace(jnp.asarray(array))))
    assert not arrays, sorted(arrays)
    return nnx.merge(graphdef, nnx.from_flat_state(leaves)), config


def read_config(
    directory: str | Path, *, dtype: ActivationDtype = "float32", remat: bool = False
) -> EncoderConfig:
    """The encoder config that `config.json` describes.

    Raises:
      ValueError: the file is missing, is not JSON, lacks a field, or describes a model that ours cannot be.
    """
    path = Path(directory) / CONFIG_FILE
    try:
        fields = json.loads(_existing(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(fields, Mapping):
        raise ValueError(f"{path} must hold a JSON object, not {type(fields).__name__}.")
    for name, wanted in (("model_type", "bert"), ("position_embedding_type", "absolute")):
        if fields.get(name, wanted) != wanted:
            raise ValueError(f"{path}: {name}={fields[name]!r} is not supported; it must be {wanted!r}.")
    if fields.get("is_decoder", False) or fields.get("add_cross_attention", False):
        raise ValueError(
            f"{path}: a decoder (is_decoder, add_cross_attention) is not supported; take an encoder."
        )
    activation = fields.get("hidden_act", "gelu")
    if activation not in HIDDEN_ACTS:
        raise ValueError(
            f"{path}: hidden_act={activation!r} is not supported; use one of {', '.join(HIDDEN_ACTS)}."
        )
    sizes: dict[str, Any] = {ours: _size(path, fields, theirs) for theirs, ours in SIZES.items()}
    try:
        return EncoderConfig(
            **sizes,
            block="transformer",
            mlp="dense",
            positions="learned",
            time_bias=False,
            norm_position="post",
            activation=HIDDEN_ACTS[activation],
            dropout_rate=float(fields.get("hidden_dropout_prob", 0.1)),
            embedding_dropout_rate=float(fields.get("hidden_dropout_prob", 0.1)),
            attention_dropout_rate=float(fields.get("attention_probs_dropout_prob", 0.1)),
            mlp_dropout_rate=0.0,
            layer_norm_epsilon=float(fields.get("layer_norm_eps", 1e-12)),
            remat=remat,
            dtype=dtype,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_vocabulary(directory: str | Path) -> tuple[str, ...]:
    """The words of `vocab.txt`; a word's place is its token id.

    Raises:
      ValueError: the file is missing, empty or not UTF-8.
    """
    path = _existing(Path(directory) / VOCABULARY_FILE)
    try:
        # Not splitlines(): some words are themselves Unicode line separators.
        words = path.read_text(encoding="utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}.") from error
    if words == [""]:
        raise ValueError(f"{path} is empty; it must hold one word a line.")
    return tuple(words)


def _read_arrays(path: Path, config: EncoderConfig) -> Arrays:
    """Our parameter paths and their values."""
    try:
        with safetensors.safe_open(_existing(path), framework="numpy") as file:
            names = set(file.keys())
            prefix = "bert." if any(name.startswith("bert.embeddings.") for name in names) else ""

            def read(name: str, *shape: int) -> np.ndarray:
                # Before 2019 the scale and bias of a normalisation were called gamma and beta.
                old = name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
                found = next((n for n in (prefix + name, prefix + old) if n in names), None)
                if found is None:
                    raise ValueError(f"{path} has no tensor {prefix + name!r}, which {CONFIG_FILE} implies.")
                stored = tuple(file.get_slice(found).get_shape())
                if stored != shape:
                    raise ValueError(
                        f"{path}: tensor {found!r} has shape {stored}, but {CONFIG_FILE} implies {shape}; "
                        "the two files must come from the same model."
                    )
                return np.asarray(file.get_tensor(found)).astype(np.float32)

            extra = f"{prefix}encoder.layer.{config.num_layers}."
            if any(name.startswith(extra) for name in names):
                raise ValueError(
                    f"{path} has more layers than num_hidden_layers={config.num_layers}; correct {CONFIG_FILE}."
                )
            return _convert(read, config, with_pooler=f"{prefix}pooler.dense.weight" in names)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}.") from error


def _convert(read: Read, config: EncoderConfig, *, with_pooler: bool) -> Arrays:
    """Renames and transposes: torch keeps a kernel as `[out, in]`, ours is `[in, out]`."""
    dim = config.embed_dim
    arrays: Arrays = {
        "token_table": read("embeddings.word_embeddings.weight", config.vocab_size, dim),
        "type_table": read("embeddings.token_type_embeddings.weight", config.type_vocab_size, dim),
        "encoder/position_table": read("embeddings.position_embeddings.weight", config.max_positions, dim),
    }

    def norm(ours: str, theirs: str) -> None:
        arrays[f"{ours}/scale"] = read(f"{theirs}.weight", dim)
        arrays[f"{ours}/bias"] = read(f"{theirs}.bias", dim)

    def dense(ours: str, theirs: str, in_dim: int, out_dim: int) -> None:
        arrays[f"{ours}/kernel"] = read(f"{theirs}.weight", out_dim, in_dim).T
        arrays[f"{ours}/bias"] = read(f"{theirs}.bias", out_dim)

    norm("encoder/embedding_norm", "embeddings.LayerNorm")
    for layer in range(config.num_layers):
        ours, theirs = f"encoder/blocks/{layer}", f"encoder.layer.{layer}"
        _convert_attention(arrays, read, config, f"{ours}/attention", f"{theirs}.attention")
        norm(f"{ours}/attention_norm", f"{theirs}.attention.output.LayerNorm")
        dense(f"{ours}/mlp_in", f"{theirs}.intermediate.dense", dim, config.mlp_dim)
        dense(f"{ours}/mlp_out", f"{theirs}.output.dense", config.mlp_dim, dim)
        norm(f"{ours}/mlp_norm", f"{theirs}.output.LayerNorm")
    if with_pooler:
        dense("pooler", "pooler.dense", dim, dim)
    return arrays


def _convert_attention(arrays: Arrays, read: Read, config: EncoderConfig, ours: str, theirs: str) -> None:
    """Lays query, key and value side by side: `[D, 3, H, K]`."""
    dim, heads = config.embed_dim, config.num_heads
    parts = [f"{theirs}.self.{part}" for part in ("query", "key", "value")]
    kernels = [read(f"{part}.weight", dim, dim).T.reshape(dim, heads, dim // heads) for part in parts]
    biases = [read(f"{part}.bias", dim).reshape(heads, dim // heads) for part in parts]
    arrays[f"{ours}/qkv_kernel"] = np.stack(kernels, axis=1)
    arrays[f"{ours}/qkv_bias"] = np.stack(biases)
    kernel = read(f"{theirs}.output.dense.weight", dim, dim).T
    arrays[f"{ours}/out_kernel"] = kernel.reshape(heads, dim // heads, dim)
    arrays[f"{ours}/out_bias"] = read(f"{theirs}.output.dense.bias", dim)


def _size(path: Path, fields: Mapping[str, Any], name: str) -> int:
    if name not in fields:
        raise ValueError(f"{path} has no field {name!r}.")
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{path}: {name}={value!r} must be a positive whole number.")
    return value


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; a BERT directory holds {CONFIG_FILE}, {WEIGHTS_FILE} and {VOCABULARY_FILE}."
        )
    return path
