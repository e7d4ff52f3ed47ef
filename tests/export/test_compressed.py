"""A compressed run from the command line to a server: what is stored, what it answers, what its card says."""

import dataclasses
import json
import logging
import pathlib
import types

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrec import compress
from jaxrec.compression.files import read_model, write_model
from jaxrec.compression.methods import with_encoder
from jaxrec.compression.served import compressed_run
from jaxrec.config import load_config
from jaxrec.core.mesh import make_mesh
from jaxrec.evaluation.user_ranking import UserRanker
from jaxrec.export import __main__ as entry
from jaxrec.export.bundle import Bundle
from jaxrec.export.compressed import export_compressed
from jaxrec.export.exporter import ExportOptions
from jaxrec.runs import open_dataset
from jaxrec.serving.version import History, Version
from jaxrec.tasks.next_item import NextItem
from jaxrec.train import train_run

DEBUG = pathlib.Path(__file__).parents[2] / "configs" / "debug.py"


@pytest.fixture(scope="module", autouse=True)
def _own_logging():
    """The entries point logging at the error stream of a test, which ends with it."""
    before = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = before[0]
    logging.root.setLevel(before[1])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run of four steps, compressed and exported as a user does it."""
    base = tmp_path_factory.mktemp("compressed")
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(40), rng.integers(4, 12, 40))
    events = {
        "user_id": [f"user {user}" for user in users],
        "item_id": rng.integers(100, 160, len(users)),
        "timestamp": 10**9 + np.arange(len(users)),
    }
    (base / "events").mkdir()
    pq.write_table(pa.table(events), base / "events" / "events.parquet")
    config = load_config(str(DEBUG))
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=str(base / "events")),
        tasks={"next_item": NextItem()},
        num_train_steps=4,
        checkpoint_every_steps=4,
        evaluation=dataclasses.replace(config.evaluation, every_steps=0, bootstrap_samples=100),
    )
    train_run(config, base / "run")
    workdir, made = f"--workdir={base / 'run'}", base / "small"
    assert compress.main([workdir, f"--out={made}", "--methods=int8", "--repeats=1"]) == 0
    assert (
        entry.main([workdir, f"--out={base / 'out'}", "--version=v1", f"--compressed={made / 'int8'}"]) == 0
    )
    model = read_model(made / "int8")
    return types.SimpleNamespace(
        workdir=base / "run",
        directory=made / "int8",
        model=model,
        dataset=open_dataset(model.config, base / "run"),
        path=base / "out" / "v1",
    )


def test_codes_are_what_is_stored(exported):
    bundle, codes = Bundle.open(exported.path), exported.model.codes
    np.testing.assert_array_equal(bundle.weights["items/vectors.values"], codes["table.item"].values)
    np.testing.assert_array_equal(bundle.weights["items/vectors.scales"], codes["table.item"].scales)
    coded = [name for name, array in bundle.weights.items() if array.dtype == np.int8]
    assert any(name.startswith("dense/encoder") for name in coded), "kernels, too"
    stored = sum(array.nbytes for array in bundle.weights.values())
    assert stored <= exported.model.num_bytes < 0.6 * sum(4 * np.prod(code.shape) for code in codes.values())
    assert bundle.facts["compression"] == "int8"


def test_lists_are_those_of_the_compressed_run(exported):
    mesh, dataset = make_mesh((1, 1), jax.devices()[:1]), exported.dataset
    users = np.arange(20)
    run = compressed_run(exported.model, dataset, mesh)
    with jax.set_mesh(mesh):
        ranker = UserRanker(run, top_k=10)
        ranks, _ = ranker.rank(ranker.rows("all", rows_per_batch=8, user_indices=users))
    histories = [
        dataset.item_keys[dataset.histories(np.array([user])).item_ids - 1].tolist() for user in users
    ]
    bundle = Bundle.open(exported.path)
    for row, listed in enumerate(bundle.recommend(histories, k=10)):
        assert [item.item_id for item in listed] == dataset.item_keys[ranks.top_item_ids[row] - 1].tolist()
        np.testing.assert_allclose([i.score for i in listed], ranks.top_scores[row], rtol=1e-4, atol=1e-5)


def test_a_server_answers_from_codes(exported):
    version = Version.open(exported.path)
    vectors = np.asarray(exported.model.codes["table.item"].decode())
    np.testing.assert_allclose(version.vectors, vectors, rtol=1e-6)
    history = exported.dataset.item_keys[:5].tolist()
    (query,) = version.encode([History(version.bundle.events_of(history))])
    (listed,) = version.bundle.recommend([history], k=10)
    ids = version.bundle.catalogue.ids_of([item.item_id for item in listed])
    np.testing.assert_allclose(query.scores[ids], [i.score for i in listed], rtol=1e-4, atol=1e-5)


def test_the_card_names_the_method_and_what_it_costs(exported):
    card = (exported.path / "MODEL_CARD.md").read_text(encoding="utf-8")
    summary = json.loads((exported.directory.parent / "compression.json").read_text(encoding="utf-8"))
    row = summary["systems"]["int8"]
    assert "Weights are stored as the codes of `int8`" in card
    assert f"Compressed by `int8`, to {100 * row['share_of_bytes']:.1f} % of the bytes in float32." in card
    before, after = summary["systems"]["original"]["metrics"]["ndcg@10"], row["metrics"]["ndcg@10"]
    assert f"| ndcg@10 | {before:.4f} | {after:.4f} | " in card
    assert "Not evaluated" not in card and "| SavedModel | recommend |" in card
    metrics = json.loads(Bundle.open(exported.path).metrics)
    assert set(metrics) == {"compression"}, "what was measured of the run in float32 is not this model's"
    assert metrics["compression"]["metrics"] == row["metrics"]


def test_what_no_program_can_be_is_refused_with_what_can(exported, tmp_path):
    def attempt(name, options=ExportOptions(), **changes):
        write_model(tmp_path / name, dataclasses.replace(exported.model, **changes))
        export_compressed(exported.workdir, tmp_path / name, tmp_path / "out", options)

    with pytest.raises(
        ValueError, match="pq_rescored cannot be exported: a list is made in two steps.*of int8, int4"
    ):
        attempt("pq_rescored", num_candidates=5)
    rounded = with_encoder(exported.model.config, products="int8")
    with pytest.raises(ValueError, match="int8_activations cannot be exported: activations are rounded"):
        attempt("int8_activations", config=rounded)
    with pytest.raises(
        ValueError, match="--dtype=bfloat16: the codes of --compressed are stored as they are"
    ):
        attempt("int8", ExportOptions(dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"compression.json does not say how good int8 is"):
        attempt("int8")
    with pytest.raises(ValueError, match="holds no compressed model"):
        export_compressed(exported.workdir, tmp_path / "nothing", tmp_path / "out", ExportOptions())
    assert not (tmp_path / "out").exists()
