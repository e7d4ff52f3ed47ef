"""Every method on models of several kinds: what becomes of which array, and that a user is answered as ranked."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxrec.compression.codes import Plain, RowCodes
from jaxrec.compression.files import read_model, write_model
from jaxrec.compression.latency import answer_program, median_milliseconds
from jaxrec.compression.methods import input_dims
from jaxrec.compression.named_methods import METHODS
from jaxrec.compression.parameters import parameters_of, serving_setup, state_of
from jaxrec.compression.product_codes import ProductCodes
from jaxrec.compression.rivals import dense_bytes, equal_bytes_overrides, with_widths
from jaxrec.compression.served import RescoredRun, compressed_run
from jaxrec.data.dataset import PreparedDataset
from jaxrec.evaluation.user_ranking import evaluation_rows
from jaxrec.models.memory import TransitionMemory
from jaxrec.models.two_tower import Cosine
from jaxrec.nn.encoder import EncoderConfig

QUANTIZED = [name for name in METHODS if not name.startswith("pruned")]
WIDE = EncoderConfig(embed_dim=32, num_layers=1, num_heads=2, mlp_dim=32, max_positions=12)
KINDS = {
    "plain": {},
    "many_parts": {
        "item_dim": 8, "output_table": True, "user_dim": 4, "memory": TransitionMemory(num_successors=4)
    },
    "cosine": {"cosine": Cosine(), "item_bias": False},
}  # fmt: skip


@pytest.fixture
def sources(make_source, config_of_small_runs):
    return lambda kind: make_source(config_of_small_runs(WIDE, **KINDS[kind]))


def compress(source, method):
    with jax.set_mesh(source.setup.mesh):
        return METHODS[method].compress(source)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", QUANTIZED)
def test_every_array_has_a_code_that_is_near_it(sources, kind, method):
    source = sources(kind)
    model = compress(source, method)
    assert model.num_bytes < source.original().num_bytes / 2
    for name, array in source.arrays.items():
        decoded = np.asarray(model.codes[name].decode())
        assert decoded.shape == array.shape
        if np.square(array).sum():
            off = np.square(decoded - array).sum() / np.square(array).sum()
            assert off < (0.5 if isinstance(model.codes[name], ProductCodes) else 0.02), name


def test_what_becomes_of_which_array(sources):
    codes = compress(sources("many_parts"), "pq").codes
    assert isinstance(codes["table.item"], ProductCodes) and isinstance(
        codes["table.item_output"], ProductCodes
    )
    assert isinstance(codes["table.user"], RowCodes) and codes["table.user"].bits == 8
    assert codes["table.item_bias"].stored == "float16" and codes["memory.successors"].stored == "uint16"
    assert codes["memory.counts"].stored == "float16"
    assert isinstance(codes["dense.encoder.blocks.0.mlp_norm.scale"], Plain)
    kernel = codes["dense.encoder.blocks.0.mlp_in.kernel"]
    assert (kernel.num_inputs, kernel.scales.shape) == (1, (32, 1))
    assert codes["dense.encoder.blocks.0.attention.out_kernel"].scales.shape == (32, 1)
    assert codes["dense.encoder.blocks.0.attention.qkv_kernel"].scales.shape == (96, 1)
    assert [input_dims(f"a.{name}") for name in ("position_table", "projection", "out_kernel")] == [0, 1, 0]
    scanned = compress(sources("plain"), "pq_rescored").codes
    assert isinstance(scanned["scan.table.item"], ProductCodes) and isinstance(
        scanned["table.item"], RowCodes
    )


@pytest.mark.parametrize("kind", KINDS)
def test_files_give_back_every_array(sources, kind, tmp_path):
    model = compress(sources(kind), "int8")
    write_model(tmp_path / "int8", model)
    found = read_model(tmp_path / "int8")
    assert found.codes.keys() == model.codes.keys()
    assert kind != "many_parts" or found.codes["dense.memory.log_lift"].shape == (), "a number, too"
    for name, code in model.codes.items():
        np.testing.assert_array_equal(found.codes[name].decode(), code.decode(), err_msg=name)


@pytest.mark.parametrize(
    ("kind", "method"), [("plain", "int4"), ("cosine", "pq"), ("many_parts", "pq_rescored")]
)
def test_the_program_of_codes_answers_as_the_run_does(sources, kind, method):
    source = sources(kind)
    mesh = source.setup.mesh
    with jax.set_mesh(mesh):
        model = compress(source, method)
        if model.num_candidates:  # all items: the exact order is known
            model = dataclasses.replace(model, num_candidates=300)
        run = compressed_run(model, source.dataset, mesh)
        scores, ids = answer_program(run, model, "test")()
        expected = scores_of(run, int(np.argmax(source.dataset.lengths)))
    np.testing.assert_allclose(scores, np.sort(expected)[::-1][:100], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(expected[np.asarray(ids) - 1], scores, rtol=1e-4, atol=1e-5)


def scores_of(run, user):
    """A score of every item for the user's test target."""
    vectors, bias = (run.inference if isinstance(run, RescoredRun) else run).catalogue()
    rows = evaluation_rows(run, "test", rows_per_batch=1, user_indices=np.array([user]), with_seen=False)
    query = run.query_fn(rows.build(0, 0, 1))[0][0]
    return np.asarray(vectors @ query + bias)[1:301]


def test_the_user_who_is_answered_has_a_target_and_a_history(sources, small_dataset):
    """As splits by time have it: the two longest histories lie wholly before the test part, and wholly in it."""
    source, whole = sources("plain"), small_dataset.histories(np.arange(60))
    before, within, longest = np.argsort(-small_dataset.lengths, kind="stable")[:3]
    end = small_dataset.lengths - 1
    end[before], end[within] = small_dataset.lengths[before], 0
    cuts = {"train_end": np.maximum(end - 1, 0), "validation_end": end}
    with jax.set_mesh(source.setup.mesh):
        model = source.original()
        of_time = PreparedDataset.from_histories(whole, num_items=300, **cuts)
        run = compressed_run(model, of_time, source.setup.mesh)
        scores, _ = answer_program(run, model, "test")()
        expected = scores_of(run, longest)
        np.testing.assert_allclose(scores, np.sort(expected)[::-1][:100], rtol=1e-4, atol=1e-5)
        cuts["validation_end"] = small_dataset.lengths
        nobody = PreparedDataset.from_histories(whole, num_items=300, **cuts)
        with pytest.raises(ValueError, match="no user with a target in split 'test'"):
            answer_program(compressed_run(model, nobody, source.setup.mesh), model, "test")


def test_programs_take_turns():
    turns = []
    found = median_milliseconds({name: lambda name=name: turns.append(name) for name in "ab"}, repeats=3)
    assert turns == list("ababab") and set(found) == {"a", "b"} and min(found.values()) >= 0


@pytest.mark.parametrize("kind", ["plain", "many_parts"])
def test_the_rival_is_the_widest_that_weighs_no_more(sources, kind):
    source = sources(kind)
    budget = source.original().num_bytes // 2
    weigh = lambda widths: dense_bytes(with_widths(source.config, widths), source.dataset, source.setup.mesh)  # noqa: E731
    found = equal_bytes_overrides(source.config, source.dataset, source.setup.mesh, budget)
    assert weigh(found) <= budget
    wider = {name: size + size * 4 // found["model.encoder.embed_dim"] for name, size in found.items()}
    assert weigh(wider) > budget
    assert equal_bytes_overrides(source.config, source.dataset, source.setup.mesh, 10) is None


def test_arrays_are_those_of_every_mesh(small_dataset, mesh, make_source, config_of_small_runs):
    source = make_source(config_of_small_runs(WIDE, **KINDS["many_parts"]))
    setup = serving_setup(source.config, small_dataset, mesh)
    found = parameters_of(setup, state_of(setup, source.arrays, 3))
    assert found.keys() == source.arrays.keys()
    for name, array in source.arrays.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_what_cannot_be_encoded_names_the_array(make_source):
    source = make_source(change=lambda name, x: x.at[0].set(np.nan) if name == "projection" else x)
    with pytest.raises(ValueError, match="dense.projection: an entry is NaN"):
        compress(source, "int8")
