"""The blend: weights that a known chooser has are found again, and the command prints a formula that a server reads."""

import numpy as np
import pytest

from jaxrec import blend
from jaxrec.evaluation.significance import paired_comparison
from jaxrec.serving.blending import Choice, learn, ndcg
from jaxrec.serving.candidates import COLUMNS
from jaxrec.serving.formula import Formula

NAMES = ["score", "ials", "popularity"]


def choosers(weights, num_users=3_000, size=20):
    """Users who choose by these weights of the columns, with the noise that the logit assumes."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(num_users):
        columns = {
            "score": rng.normal(size=size),
            "ials": 0.1 * rng.normal(size=size),
            "popularity": np.exp(rng.normal(size=size)),
        }
        worth = (
            weights[0] * columns["score"]
            + weights[1] * columns["ials"]
            + weights[2] * np.log1p(columns["popularity"])
        )
        target = int(np.argmax(worth + rng.gumbel(size=size)))
        made.append(Choice(target, {name: column.astype(np.float32) for name, column in columns.items()}))
    return made


def test_the_weights_of_a_chooser_are_found():
    users = choosers((1.0, 8.0, -1.5))
    formula = learn(users, NAMES)
    assert formula.names == frozenset(NAMES)

    def value(*row):
        return float(formula({name: np.array([one]) for name, one in zip(NAMES, row, strict=True)})[0])

    found = [value(*row) - value(0, 0, 0) for row in ((1, 0, 0), (0, 1, 0), (0, 0, np.e - 1))]
    assert found == pytest.approx([1.0, 8.0, -1.5], rel=0.1)
    plain = ndcg(users, Formula.parse("score", NAMES))
    assert ndcg(users, formula).mean() > plain.mean() + 0.05


def test_ndcg_counts_the_place_of_what_was_taken():
    columns = {"score": np.array([3.0, 2.0, 1.0], np.float32)}
    found = ndcg(
        [Choice(0, columns), Choice(1, columns), Choice(-1, columns)], Formula.parse("score", ["score"])
    )
    assert found == pytest.approx([1.0, 1 / np.log2(3), 0.0])


def test_there_is_nothing_to_learn_where_nobody_took_a_candidate():
    with pytest.raises(ValueError, match="name more of them"):
        learn([Choice(-1, {"score": np.ones(3, np.float32)})], ["score"])


def test_the_command_writes_a_formula_that_the_server_reads(workdir, bundles, tmp_path, capsys):
    out = tmp_path / "new" / "blend.txt"
    arguments = [f"--workdir={workdir}", f"--model={bundles}/v1", f"--out={out}", "--users=150", "--pool=50"]
    assert blend.main([*arguments, "--candidates=item_knn=50", "--candidates=ials=50"]) == 0
    printed = capsys.readouterr().out
    assert "test NDCG@10 of 150 users: model alone" in printed
    formula = Formula.parse(out.read_text().strip(), COLUMNS)
    assert {"score", "item_knn", "ials", "content"} <= formula.names
    assert out.read_text().strip() in printed


def test_another_runs_version_is_refused(bundles, tmp_path, capsys):
    assert blend.main([f"--workdir={tmp_path}", f"--model={bundles}/v1"]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_formula_that_cannot_be_written_is_printed(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    found = paired_comparison(np.zeros(3), np.ones(3))
    monkeypatch.setattr(blend, "blend", lambda given: (Formula.parse("score", ["score"]), found))
    assert blend.main(["--workdir=w", "--model=m", f"--out={tmp_path / 'file' / 'blend.txt'}"]) == 2
    output = capsys.readouterr()
    assert output.out.endswith("score\n")
    assert "error:" in output.err
