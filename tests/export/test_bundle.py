"""A whole export: what is in it, how it is read, and that nothing false is read."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
import tensorflow as tf

from jaxrec.evaluation.user_ranking import UserRanker
from jaxrec.export import artifacts, check, exporter
from jaxrec.export.bundle import Bundle, Event
from jaxrec.export.check import ArtifactError, run_apart
from jaxrec.export.exporter import ExportOptions, export_state
from jaxrec.export.layout import BATCH_SIZES, USER_TOWER, history_lengths, known_sizes, sized_program
from jaxrec.export.manifest import DamagedBundleError

PROGRAMS = {"user_tower", "item_tower", "recommend", "rank", "behaviours"}


@pytest.fixture(scope="module")
def bundle(exported):
    return Bundle.open(exported.path)


def test_everything_is_there_and_was_compared(exported):
    manifest = exported.export.manifest
    tops = {path.split("/")[0] for path in manifest.files}
    assert {"stablehlo", "saved_model", "onnx", "items.parquet", "users.parquet"} <= tops
    assert {
        "item_vectors.safetensors",
        "weights.safetensors",
        "config.json",
        "metrics.json",
        "MODEL_CARD.md",
    } <= tops
    assert set(manifest.programs) == PROGRAMS
    compared = {(found.artifact, found.program) for found in exported.export.checks}
    kinds = ("StableHLO", "SavedModel", "ONNX")
    sized = {sized_program(USER_TOWER, *size) for size in known_sizes(USER_TOWER, manifest.facts)}
    sized.add(sized_program("behaviours", *known_sizes("behaviours", manifest.facts)[-1]))
    assert compared == {(kind, name) for kind in kinds for name in PROGRAMS} | {
        ("StableHLO", name) for name in sized
    }
    assert all(found.difference < 1e-4 for found in exported.export.checks)
    assert exported.export.agreement[0] < 1e-5
    assert exported.export.agreement[1] == 1.0
    assert [path.name for path in exported.out.iterdir()] == ["v1"]


def test_the_tower_of_a_known_size_answers_as_that_of_any_size(bundle, exported):
    histories = [bundle.events_of(history) for history in histories_of(exported, range(BATCH_SIZES[-1]))]
    any_size, of_sizes = Bundle.open(exported.path).program(USER_TOWER), bundle.program(USER_TOWER)
    any_size._sized = {}
    for num_rows in BATCH_SIZES:
        for length in history_lengths(bundle.facts["max_events"]):
            inputs = bundle.history_inputs(histories[:num_rows], num_rows=num_rows, length=length)
            assert (num_rows, length) in of_sizes._sized
            expected, found = any_size(inputs), of_sizes(inputs)
            assert set(expected) == set(found)
            for name, array in expected.items():
                np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-5)


def test_the_tower_of_any_size_is_read_where_no_other_fits(exported, tmp_path):
    copy = tmp_path / "v1"
    shutil.copytree(exported.path, copy)
    bundle = Bundle.open(copy)
    for name in (USER_TOWER, "rank"):
        (copy / "stablehlo" / name).unlink()
    tower, rows = bundle.program(USER_TOWER), BATCH_SIZES[0]
    inputs = bundle.history_inputs([bundle.events_of(["i3"])], num_rows=rows, length=8)
    assert np.isfinite(tower(inputs)["query"]).all()
    with pytest.raises(FileNotFoundError):
        tower(bundle.history_inputs([bundle.events_of(["i3"])], num_rows=rows + 1, length=8))
    with pytest.raises(FileNotFoundError):
        bundle.program("rank")  # at once, and not when it is first asked


def histories_of(exported, users):
    dataset, found = exported.run.dataset, []
    for user in users:
        events = dataset.histories(np.array([user]))
        found.append(
            [
                Event(str(dataset.item_keys[item - 1]), seconds=int(time), labels=labels.tolist())
                for item, time, labels in zip(events.item_ids, events.timestamps, events.labels, strict=True)
            ]
        )
    return found


def test_own_ids_go_in_and_come_out_with_titles(exported, bundle):
    users = np.arange(20)
    found = bundle.recommend(histories_of(exported, users), k=10, user_ids=[f"u{user}" for user in users])
    with jax.set_mesh(exported.run.mesh):
        ranker = UserRanker(exported.run, top_k=10)
        ranks, _ = ranker.rank(ranker.rows("all", rows_per_batch=8, user_indices=users))
    for row, lists in enumerate(found):
        assert [item.item_id for item in lists] == [f"i{index}" for index in ranks.top_item_ids[row]]
        np.testing.assert_allclose(
            [item.score for item in lists], ranks.top_scores[row], rtol=1e-4, atol=1e-5
        )
        assert [item.title for item in lists] == exported.run.dataset.titles(ranks.top_item_ids[row])
    assert any("Söhne" in item.title for item in found[0])


def test_what_is_unknown_is_passed_over_and_what_is_excluded_is_left_out(bundle):
    known = bundle.recommend([["i3", "i7"]])[0]
    among = bundle.recommend([["i3", "nothing", "i7"], []])[0]
    assert [item.item_id for item in among] == [item.item_id for item in known]
    np.testing.assert_allclose([item.score for item in among], [item.score for item in known], rtol=1e-5)
    assert not {"i3", "i7"} & {item.item_id for item in known}
    first = known[0].item_id
    without = bundle.recommend([["i3", "i7"]], exclude=[[first]])[0]
    assert [item.item_id for item in without[:9]] == [item.item_id for item in known[1:]]
    few = bundle.recommend([["i3"]], exclude=[[f"i{i}" for i in range(1, 38)]])[0]
    assert {item.item_id for item in few} == {"i38", "i39", "i40"}


def test_wrong_questions_are_told(bundle):
    with pytest.raises(ValueError, match=r"k=13 must lie in 1 .. 12; export with a larger --k"):
        bundle.recommend([["i3"]], k=13)
    with pytest.raises(ValueError, match=r"program 'x': the bundle has user_tower"):
        bundle.program("x")


def test_vectors_are_those_of_the_programs(bundle):
    ids = np.array([0, 5, 40, 41], np.int32)
    found = bundle.program("item_tower")({"item_ids": ids})
    wanted = np.where((ids <= 40)[:, None], bundle.item_vectors[np.minimum(ids, 40)], 0)
    np.testing.assert_array_equal(found["vectors"], wanted)
    np.testing.assert_array_equal(found["bias"][:3], bundle.item_bias[ids[:3]])
    assert bundle.item_vectors.shape == (41, 6)
    assert json.loads(bundle.config)["name"] == "tiny"
    assert json.loads(bundle.metrics) == {}


def test_the_saved_model_serves_own_ids_and_its_warm_up_requests(exported):
    answers = run_apart(
        "run_saved_model.py",
        exported.path,
        {
            "serving_default": {
                "item_ids": np.array([["i3", "i7", ""], ["nothing", "", ""]]),
                "user_ids": np.array(["u3", "nobody"]),
                "seconds": np.array([[10**10, 10**10 + 60, -1], [-1, -1, -1]]),
                "labels": np.full((2, 3, 2), -1, np.int32),
                "exclude_ids": np.array([["i3", "i7"], ["", ""]]),
            }
        },
    )["serving_default"]
    assert set(answers) == {"top_item_ids", "top_titles", "top_scores"}
    event = [Event("i3", seconds=0), Event("i7", seconds=60)]
    wanted = Bundle.open(exported.path).recommend([event, []], k=12, user_ids=["u3", None])
    for row, lists in enumerate(wanted):
        assert answers["top_item_ids"][row].tolist() == [item.item_id for item in lists]
        assert answers["top_titles"][row].tolist() == [item.title for item in lists]
    records = list(
        tf.data.TFRecordDataset(str(exported.path / "saved_model/1/assets.extra/tf_serving_warmup_requests"))
    )
    assert len(records) == 2 * len(PROGRAMS)
    model = tf.saved_model.load(str(exported.path / "saved_model" / "1"))
    for record in records:
        signature, inputs = read_prediction_log(record.numpy())
        assert model.signatures[signature](**inputs)


def fields_of(message):
    """(number, bytes) of each field of a protocol buffer that holds only those."""
    at = 0
    while at < len(message):
        values = []
        for _ in range(2):
            value = shift = 0
            while True:
                byte = message[at]
                at, value, shift = at + 1, value | (byte & 0x7F) << shift, shift + 7
                if byte < 0x80:
                    break
            values.append(value)
        key, size = values
        assert key & 7 == 2
        yield key >> 3, message[at : at + size]
        at += size


def read_prediction_log(record):
    """Signature and inputs of a PredictionLog's PredictRequest."""
    ((number, predict_log),) = fields_of(record)
    assert number == 6
    ((number, request),) = fields_of(predict_log)
    assert number == 1
    signature, inputs = "", {}
    for number, content in fields_of(request):
        parts = dict(fields_of(content))
        if number == 1:
            signature = parts[3].decode()
        else:
            tensor = tf.compat.v1.make_ndarray(tf.make_tensor_proto(0).FromString(parts[2]))
            inputs[parts[1].decode()] = tf.constant(tensor)
    return signature, inputs


@pytest.mark.parametrize("script", ["run_stablehlo.py", "run_saved_model.py", "run_onnx.py"])
def test_processes_that_check_cannot_import_the_model(script, tmp_path, monkeypatch):
    probe = tmp_path / script
    refused = check.REFUSED[script]
    assert {"jaxrec", "flax"} <= set(refused)
    probe.write_text(f"import {refused[0]}")
    monkeypatch.setattr(check, "__file__", str(tmp_path / "check.py"))
    with pytest.raises(ArtifactError, match=rf"(?s){script} failed: .*import of jaxrec halted"):
        run_apart(script, tmp_path, {})


@pytest.mark.parametrize(
    "path",
    [
        "manifest.json",
        "manifest.json.sha256",
        "weights.safetensors",
        "item_vectors.safetensors",
        "items.parquet",
        "users.parquet",
        "config.json",
        "metrics.json",
        "MODEL_CARD.md",
        "stablehlo/recommend",
        "saved_model/1/saved_model.pb",
        "saved_model/1/variables/variables.index",
        "onnx/weights.bin",
        "onnx/rank.onnx",
    ],
)
def test_one_flipped_byte_of_any_file_is_refused_with_its_name(exported, tmp_path, path):
    copy = tmp_path / "v1"
    shutil.copytree(exported.path, copy)
    content = bytearray((copy / path).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / path).write_bytes(content)
    with pytest.raises(DamagedBundleError, match=path):
        Bundle.open(copy)


@pytest.mark.parametrize(("name", "output"), [("rank", "scores"), ("user_tower.1x8", "query")])
def test_an_artifact_that_answers_otherwise_is_not_exported(exported, tmp_path, monkeypatch, name, output):
    def other(script, bundle, requests):
        answers = run_apart(script, bundle, requests)
        answers[name][output] = answers[name][output] * 1.01
        return answers

    monkeypatch.setattr(artifacts, "run_apart", other)
    with pytest.raises(ArtifactError, match=f"StableHLO: output '{output}' of '{name}' differs from JAX by"):
        export_state(exported.run, exported.state, tmp_path, ExportOptions(version="v2"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_are_rounded_ones(exported, tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(artifacts.Artifacts, "write", lambda *_, **__: [])
    options = ExportOptions(version="v3", k=5, dtype=dtype)
    export = export_state(exported.run, exported.state, tmp_path, options)
    narrow, wide = Bundle.open(export.directory), Bundle.open(exported.path)
    assert str(narrow.weights["items/vectors"].dtype) == dtype
    assert narrow.weights["items/bias"].dtype == np.float32
    np.testing.assert_allclose(narrow.item_vectors, wide.item_vectors, rtol=2**-7)
    assert 0 < export.agreement[0] < 0.1


def test_the_card_tells_data_quality_limits_and_licence(exported):
    card = (exported.path / "MODEL_CARD.md").read_text(encoding="utf-8")
    for title in ("What it is", "Data", "Licence of the data", "Quality", "Limits", "Checked", "Files"):
        assert f"## {title}\n" in card
    assert "Not evaluated. Run `python -m jaxrec.evaluate" in card
    assert exported.export.manifest.facts["data"]["licence"].startswith("MovieLens latest-small")
    assert exported.export.manifest.facts["data"]["licence"] in card
    assert "personal data" in card
    assert "| SavedModel | recommend |" in card


def test_reading_a_bundle_loads_no_training_code(exported):
    code = textwrap.dedent(
        f"""
        import sys
        from jaxrec.export.bundle import Bundle
        lists = Bundle.open({str(exported.path)!r}).recommend([["i3", "i7"]], k=3)
        assert len(lists[0]) == 3
        loaded = {{name.split(".")[1] for name in sys.modules if name.startswith("jaxrec.")}}
        assert loaded == {{"export"}}, loaded
        assert not {{"flax", "tensorflow", "orbax"}} & set(sys.modules)
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


KILLED = """
import os, pathlib, signal, sys
from jaxrec.export.directory import new_version
with new_version(pathlib.Path(sys.argv[1]), "v1") as place:
    (place / "manifest.json").write_text("{}")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_export_leaves_no_version_and_the_next_one_succeeds(exported, tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "v1").exists()
    assert all(name.startswith(".") for name in os.listdir(tmp_path))
    with exporter.new_version(tmp_path, "v1") as place:
        (place / "a").write_text("x")
    assert (tmp_path / "v1").is_dir()
