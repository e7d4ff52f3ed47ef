"""What the program for compression makes of its runs: the limits of bytes and loss, and the pairs."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

NUM_USERS = 200


def ranks(hits):
    """The first `hits` users find their target first."""
    return np.where(np.arange(NUM_USERS) < hits, 0, 50)


def seed_of(suite, hits):
    metrics = {"hr@10": hits / NUM_USERS, "ndcg@10": hits / NUM_USERS}
    figures = {
        "metrics": metrics, "validation": None, "train_minutes": 1.0, "sittings": [{"processor_seconds": 9.0}],
        "baselines": {}, "command": "", "commit": "",
    }  # fmt: skip
    return suite.Seed(figures, ranks(hits), np.arange(NUM_USERS))


# By method: users who find their target, share of the bytes.
METHODS = {
    "original": (100, 1.0),
    "int8": (100, 0.27),
    "int4": (99, 0.14),
    "pq": (80, 0.14),
    "pq_int4": (100, 0.16),
}


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({"int8": (98, 0.27)}, ["int8: relative change"]),
        ({"int8": (100, 0.31)}, ["int8: share of the bytes"]),
        ({"int4": (97, 0.14), "pq": (99, 0.14)}, ["int4: relative change"]),
        ({"int4": (99, 0.151)}, ["int4: share of the bytes"]),
    ],
)
def test_losses_are_held_against_the_limits_of_their_bytes(
    module, monkeypatch, repository, tmp_path, capsys, changes, missed
):
    suite, program = module("suite"), module("compress")
    methods, asked = METHODS | changes, []

    def run(variant, given):
        asked.append(variant)
        hits = {"ml1m_sasrec": 100, "ml1m_distilled": 95, "ml1m_student": 85}.get(variant.name, 70)
        return [seed_of(suite, hits) for _ in range(given.seeds)]

    def compress(seed, given):
        workdir = suite.tried(program.TEACHER, given).run(seed, given.data, given.base).workdir
        systems = {}
        for name, (hits, share) in methods.items():
            directory = workdir / "compressed" / name
            directory.mkdir(parents=True)
            table = {"rank": ranks(hits), "user_id": np.arange(NUM_USERS)}
            pq.write_table(pa.table(table), directory / "ranks.parquet")
            systems[name] = {
                "metrics": seed_of(suite, hits).metrics, "share_of_bytes": share, "num_bytes": 9, "latency_ms": 1.0,
                "command": "" if name == "pq_int4" else "--config.model.item_dim=8 --config.model.encoder.mlp_dim=4",
            }  # fmt: skip
        return {"systems": systems}

    monkeypatch.setattr(suite, "run_variant", run)
    monkeypatch.setattr(program, "compress", compress)
    monkeypatch.setattr(
        "sys.argv", ["compress.py", f"--results={tmp_path}", f"--base={tmp_path}", "--seeds=2"]
    )
    assert program.main() == bool(missed)
    printed = capsys.readouterr().out
    found = [line.partition("MISSED ")[2].rpartition(": ")[0] for line in printed.splitlines()]
    assert [name for name in found if name] == missed
    assert "pq_int4: no dense model is as small" in printed
    dense = [variant for variant in asked if variant.name.startswith("compression_dense")]
    assert [variant.name for variant in dense] == [
        f"compression_dense-{name}" for name in ("int8", "int4", "pq")
    ]
    assert dense[0].overrides == ("model.item_dim=8", "model.encoder.mlp_dim=4")
    figures = json.loads((tmp_path / "quality_compression.json").read_text())["figures"]
    assert figures["table"]["int4"]["relative_change"] == pytest.approx(methods["int4"][0] / 100 - 1)
    assert figures["paired"]["distilled"]["difference"] == pytest.approx(0.05)
    teacher = next(variant for variant in asked if variant.name == "ml1m_distilled").overrides[0]
    place = teacher.format(seed=1).removeprefix("tasks.distillation.teacher=")
    assert (repository / place).resolve() == tmp_path.resolve() / "ml1m_sasrec-seed-1"
