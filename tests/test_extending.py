"""docs/extending.md is followed to the letter: its files are cut out of the page, and the run trains."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

FILE = re.compile(r"<!-- file: (\S+) -->\n```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def workplace(repository, tmp_path):
    """The files of the page, and a log to read."""
    page = (repository / "docs" / "extending.md").read_text()
    for name, code in FILE.findall(page):
        (tmp_path / name).write_text(code)
    random = np.random.default_rng(0)
    with open(tmp_path / "log.jsonl", "w") as log:
        for user in range(40):
            for when in range(int(random.integers(5, 12))):
                event = {
                    "who": user,
                    "what": int(random.integers(30)),
                    "when": 10**9 + when,
                    "is_click": when % 2,
                }
                log.write(json.dumps(event) + "\n")
    return tmp_path


def test_the_worked_example_trains_and_recommends(workplace, repository):
    assert {path.name for path in workplace.iterdir()} == {
        "skip_one.py",
        "json_log.py",
        "my_config.py",
        "log.jsonl",
    }
    environment = os.environ | {"PYTHONPATH": f"{workplace}:{repository}", "JAXREC_CPU_DEVICES": "2"}
    common = {"cwd": workplace, "env": environment, "capture_output": True, "text": True, "check": False}
    changes = ["--config.num_train_steps=4", "--config.log_every_steps=2"]
    train = [sys.executable, "-m", "jaxrec.train", "--config=my_config.py", "--workdir=run", *changes]
    done = subprocess.run(train, **common)
    assert done.returncode == 0, done.stderr
    last = json.loads((workplace / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 4
    lines = (workplace / "run" / "metrics.jsonl").read_text()
    assert "loss/skip_one" in lines
    out = workplace / "recs.parquet"
    recommend = [
        sys.executable,
        "-m",
        "jaxrec.recommend",
        "--workdir=run",
        "--split=test",
        "--k=3",
        f"--out={out}",
    ]
    done = subprocess.run(recommend, **common)
    assert done.returncode == 0, done.stderr
    assert out.exists()
