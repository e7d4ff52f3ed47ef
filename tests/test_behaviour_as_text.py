"""docs/behaviour_as_text.md: the program runs as it stands there, and its texts do not know what they are asked."""

import dataclasses
import importlib.util
import re
import sys

import numpy as np
import pytest

from jaxrec.data.dataset import Histories, PreparedDataset

FILE = re.compile(r"<!-- file: (\S+) -->\n```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def program(repository, tmp_path):
    """The page's program as a module."""
    [(name, code)] = FILE.findall((repository / "docs" / "behaviour_as_text.md").read_text())
    (tmp_path / name).write_text(code)
    spec = importlib.util.spec_from_file_location("behaviour_text", tmp_path / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_text_tells_what_came_before_and_neither_its_label_nor_what_comes_after(program):
    histories = Histories(
        np.array([0, 5]),
        np.array([1, 2, 3, 4, 5], np.int32),
        np.arange(5),
        np.array([[1], [0], [1], [1], [0]], np.int8),
    )
    dataset = PreparedDataset.from_histories(histories, item_titles=["A", "B", "C", "D", "E"])
    text = program.describe(dataset, histories, 0, 3)
    assert text == "asked: D, . likes 7 of ten. liked: A; C. disliked: B"
    later = dataclasses.replace(histories, labels=np.array([[1], [0], [1], [0], [1]], np.int8))
    assert program.describe(dataset, later, 0, 3) == text
    flipped = dataclasses.replace(histories, labels=1 - histories.labels)
    assert program.describe(dataset, flipped, 0, 3) == "asked: D, . likes 3 of ten. liked: B. disliked: A; C"


def test_the_program_trains_and_stands_beside_the_rates(program, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["behaviour_text.py", "--steps=2", "--train=64", "--test=64"])
    program.main()
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"BERT: AUC 0\.\d{4}, log-loss \d+\.\d{4}", lines[-2])
    assert lines[-1].startswith("rates of item and user: AUC")
