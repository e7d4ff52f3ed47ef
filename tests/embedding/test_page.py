"""The example of docs/embedding.md runs as it stands, and does what it says."""

import re

import numpy as np


def test_the_example_of_the_page_runs(repository):
    (example,) = re.findall(r"```python\n(.*?)```", (repository / "docs" / "embedding.md").read_text(), re.S)
    names: dict = {}
    exec(compile(example, "docs/embedding.md", "exec"), names)
    touched = np.asarray(names["slots"]["accumulator"]) > 0
    assert touched.sum() == 64
