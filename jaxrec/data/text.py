"""Item text to BERT word pieces, with the vocabulary of a checkpoint or the one in this package.

Letters: N items (row 0 is padding), T tokens of an item.
"""

import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from jaxtyping import Int32
from tokenizers import BertWordPieceTokenizer

from jaxrec.data.config import TextConfig

__all__ = ["WordPieces", "default_vocabulary"]

_ITEMS_AT_ONCE = 4096
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def default_vocabulary() -> Path:
    """The MiniLM vocabulary that ships with this package (Apache-2.0, see the notice beside it)."""
    return Path(str(resources.files("jaxrec.data") / "embedded" / "minilm-vocabulary" / "vocab.txt"))


class WordPieces:
    """A BERT tokenizer: text to `[CLS] pieces [SEP]`, cut and padded to T ids; [PAD] is id 0."""

    def __init__(self, config: TextConfig):
        place = Path(config.vocabulary) if config.vocabulary else default_vocabulary()
        self.path = place / "vocab.txt" if place.is_dir() else place
        if not self.path.is_file():
            raise FileNotFoundError(
                f"text.vocabulary={config.vocabulary!r}: there is no {self.path}; give a vocab.txt, or a BERT "
                "checkpoint directory that holds one."
            )
        settings = _tokenizer_settings(self.path.parent)
        lowercase = settings.get("do_lower_case", True) if config.lowercase is None else config.lowercase
        self.lowercase = bool(lowercase)
        self._check_vocabulary()
        self._tokenizer = BertWordPieceTokenizer(
            str(self.path),
            lowercase=self.lowercase,
            strip_accents=settings.get("strip_accents"),
            handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
        )
        self._tokenizer.enable_truncation(config.max_tokens)
        self.max_tokens = config.max_tokens

    def _check_vocabulary(self) -> None:
        words = self.path.read_text(encoding="utf-8").splitlines()
        missing = [word for word in _SPECIAL if word not in words]
        if missing or words[0] != "[PAD]":
            raise ValueError(
                f"{self.path} is no BERT vocabulary: "
                + (
                    f"{', '.join(missing)} missing"
                    if missing
                    else f"its first line is {words[0]!r}, not '[PAD]'"
                )
                + "; id 0 must be [PAD]. Give the vocab.txt of a BERT checkpoint."
            )

    def tokens(self, texts: Sequence[str]) -> Iterator[Int32[np.ndarray, "n t"]]:
        """Token ids in blocks of items. A text without a word piece becomes all zeros: an item without text."""
        for start in range(0, len(texts), _ITEMS_AT_ONCE):
            block = self._tokenizer.encode_batch(list(texts[start : start + _ITEMS_AT_ONCE]))
            ids = np.zeros((len(block), self.max_tokens), np.int32)
            for row, encoding in enumerate(block):
                if len(encoding.ids) > 2:
                    ids[row, : len(encoding.ids)] = encoding.ids
            yield ids

    def write(self, directory: Path) -> None:
        """Keep the vocabulary and its settings with the data."""
        (directory / "vocab.txt").write_bytes(self.path.read_bytes())
        settings = {"do_lower_case": self.lowercase, "tokenizer_class": "BertTokenizer"}
        (directory / "tokenizer_config.json").write_text(
            json.dumps(settings, indent=2) + "\n", encoding="utf-8"
        )


def _tokenizer_settings(directory: Path) -> dict[str, object]:
    file = directory / "tokenizer_config.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    except (json.JSONDecodeError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(
            f"{file} is not JSON ({error}); mend it, or give the vocab.txt by itself."
        ) from error
