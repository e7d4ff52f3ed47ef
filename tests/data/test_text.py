"""Word pieces equal those of transformers, with the vocabulary of a checkpoint or the one in the package."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertTokenizerFast

from jaxrec.data.config import TextConfig
from jaxrec.data.text import WordPieces, default_vocabulary

TITLES = [
    "Toy Story (1995). Animation, Children's",
    "Amélie",
    "七人の侍",
    "",
    "   ",
    "x" * 300,
    "🎬 \u202e",
    "naïve\nCAFÉ",
]


def tokens(pieces, texts):
    return np.concatenate(list(pieces.tokens(texts)))


def test_the_vocabulary_of_the_package_is_a_bert_vocabulary_with_its_licence():
    words = default_vocabulary().read_text(encoding="utf-8").splitlines()
    assert (len(words), words[0], words[101], words[102]) == (30_522, "[PAD]", "[CLS]", "[SEP]")
    assert "Apache License" in (default_vocabulary().parent / "LICENSE.txt").read_text(encoding="utf-8")
    assert "MiniLM" in (default_vocabulary().parent / "NOTICE.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def both():
    reference = BertTokenizerFast(vocab=str(default_vocabulary()), do_lower_case=True)
    return WordPieces(TextConfig(max_tokens=16)), reference


def expected(reference, text):
    ids = reference(text, max_length=16, padding="max_length", truncation=True)["input_ids"]
    return ids if sum(one != 0 for one in ids) > 2 else [0] * 16


def test_tokens_equal_those_of_transformers(both):
    pieces, reference = both
    assert tokens(pieces, TITLES).tolist() == [expected(reference, text) for text in TITLES]
    assert not tokens(pieces, ["", "   "]).any()


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_text_equals_that_of_transformers(both, text):
    pieces, reference = both
    assert tokens(pieces, [text])[0].tolist() == expected(reference, text)


def test_a_checkpoint_brings_its_vocabulary_and_its_case(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nHeat\nheat\n", encoding="utf-8")
    config = TextConfig(vocabulary=str(tmp_path), max_tokens=4)
    assert tokens(WordPieces(config), ["Heat"]).tolist() == [[2, 6, 3, 0]]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert tokens(WordPieces(config), ["Heat"]).tolist() == [[2, 5, 3, 0]]
    file = TextConfig(vocabulary=str(tmp_path / "vocab.txt"), max_tokens=4, lowercase=True)
    assert tokens(WordPieces(file), ["Heat"]).tolist() == [[2, 6, 3, 0]]
    (tmp_path / "out").mkdir()
    WordPieces(config).write(tmp_path / "out")
    again = WordPieces(TextConfig(vocabulary=str(tmp_path / "out"), max_tokens=4))
    assert tokens(again, ["Heat heat"]).tolist() == [[2, 5, 6, 3]]


def test_what_is_no_vocabulary_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="give a vocab.txt"):
        WordPieces(TextConfig(vocabulary=str(tmp_path)))
    (tmp_path / "vocab.txt").write_text("[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(ValueError, match="first line is"):
        WordPieces(TextConfig(vocabulary=str(tmp_path)))
    (tmp_path / "vocab.txt").write_text("[PAD]\na\n")
    with pytest.raises(ValueError, match=r"\[UNK\], \[CLS\], \[SEP\], \[MASK\] missing"):
        WordPieces(TextConfig(vocabulary=str(tmp_path)))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        WordPieces(TextConfig(vocabulary=str(tmp_path)))
    with pytest.raises(ValueError, match="max_tokens=2"):
        TextConfig(max_tokens=2)
