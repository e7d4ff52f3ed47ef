"""Every feature of the model, exported: equal to the run's own lists in JAX, TensorFlow and ONNX Runtime."""

import dataclasses
import functools

import jax
import numpy as np
import onnxruntime
import pytest
import tensorflow as tf

from jaxrec.compression.methods import Source
from jaxrec.compression.named_methods import METHODS
from jaxrec.compression.parameters import parameters_of
from jaxrec.compression.served import compressed_state
from jaxrec.export.artifacts import expected_results
from jaxrec.export.check import compare
from jaxrec.export.compressed import in_codes
from jaxrec.export.exporter import compare_with_run
from jaxrec.export.lowering import Lowering
from jaxrec.export.onnx_graph import write_onnx
from jaxrec.export.programs import programs_of, used_arrays
from jaxrec.export.requests import requests_of, spread_users
from jaxrec.export.tensorflow_graph import TensorFlowGraph
from jaxrec.export.weights import gather_weights, served_model, stored
from jaxrec.models.item_text import TextTower
from jaxrec.models.memory import COUNTS, SUCCESSORS, TransitionMemory
from jaxrec.models.mixture import MixtureOfLogits
from jaxrec.models.two_tower import Cosine
from jaxrec.nn.compressed_attention import HistoryCompression
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.nn.heads import PLE, MMoE
from jaxrec.runs import run_of_state
from jaxrec.tasks.behaviour import Behaviour
from jaxrec.tasks.candidates import InBatch
from jaxrec.tasks.masked_item import MaskedItem
from jaxrec.tasks.next_item import NextItem
from jaxrec.tasks.rating import Rating

TEXT = TextTower(
    encoder=EncoderConfig(
        embed_dim=8, num_layers=1, num_heads=2, mlp_dim=8, max_positions=4, vocab_size=50, type_vocab_size=1
    )
)
JUDGES = {"next_item": NextItem(), "behaviour": Behaviour()}
DOMAINS = {
    "domains": ("a", "b"),
    "item_keys": [f"{'ab'[i % 2]}:{i}" for i in range(40)],
    "user_keys": [f"{'ab'[i % 2]}:{i}" for i in range(20)],
}
# Wide enough that no matrix is too small for a code.
WIDE = {"embed_dim": 16, "mlp_dim": 32}
# By name: changes of the model, of the encoder, the tasks, changes of the data; and the method that compresses it.
FEATURES = {
    "plain": ({}, {}, None, {}),
    "masked_item": ({"time_gaps": True}, {"positions": "rotary"}, {"masked_item": MaskedItem()}, {}),
    "cosine_learned": (
        {"cosine": Cosine(learned=True), "item_bias": False},
        {"norm_position": "pre"},
        None,
        {},
    ),
    "output_table": ({"output_table": True}, {"mlp": "gated", "activation": "silu"}, None, {}),
    "users_times_labels": (
        {"user_dim": 4, "time_gaps": True, "event_behaviours": True},
        {"time_bias": True, "positions": "relative"},
        JUDGES,
        {"filter_seen": False},
    ),
    "hstu": ({}, {"block": "hstu", "activation": "silu", "time_bias": True}, None, {}),
    "memory": ({"memory": TransitionMemory(num_successors=5, window=3)}, {}, None, {}),
    "text": ({"text": TEXT}, {"activation": "gelu_tanh"}, None, {}),
    "context_ple": ({"context_rows": 32, "head": PLE()}, {"scan_layers": True, "num_layers": 3}, JUDGES, {}),
    "values_mmoe": ({"head": MMoE()}, {"remat": True}, {"next_item": NextItem(), "rating": Rating()}, {}),
    "target_time": ({"target_time": True}, {}, None, {}),
    "domains": ({"domain_adapters": 2}, {"positions": "none", "activation": "relu"}, None, DOMAINS),
    "int8": (
        {"output_table": True, "item_dim": 16, "user_dim": 4, "event_behaviours": True},
        WIDE | {"time_bias": True},
        JUDGES,
        {},
        "int8",
    ),
    "int8_memory": (
        {"item_dim": 16, "memory": TransitionMemory(num_successors=5, window=3)},
        WIDE,
        None,
        {},
        "int8",
    ),
    "int8_cosine": ({"item_dim": 16, "cosine": Cosine(), "item_bias": False}, WIDE, None, {}, "int8"),
    "int4": ({"item_dim": 16}, WIDE, None, {}, "int4"),
    "pq": ({"item_dim": 16}, WIDE, None, {}, "pq"),
    "pruned_heads": ({"item_dim": 16}, WIDE, None, {}, "pruned_heads"),
}


@pytest.fixture(scope="module", params=FEATURES)
def served(request, world):
    """The run, its programs, requests, and what JAX answers."""
    model, encoder, tasks, data, *method = FEATURES[request.param]
    config = dataclasses.replace(world.model, encoder=dataclasses.replace(world.encoder, **encoder), **model)
    dataset = world.dataset(**data)
    run, state = world.run(dataset, config, tasks)
    if config.memory is not None:
        rng = np.random.default_rng(2)
        shape = state.memory[SUCCESSORS].shape
        memory = {
            SUCCESSORS: rng.integers(0, 41, shape).astype(np.int32),
            COUNTS: rng.uniform(1, 9, (shape[0], shape[1] + 1)).astype(np.float32),
        }
        placed = {name: jax.device_put(x, state.memory[name].sharding) for name, x in memory.items()}
        state = dataclasses.replace(state, memory=placed)
        with jax.set_mesh(run.mesh):
            run = run_of_state(run.config, dataset, run.setup, state, 0)
    if method:
        run, weights = compressed(run, state, *method)
    else:
        with jax.set_mesh(run.mesh):
            weights = stored(gather_weights(run.setup, state, dataset), "float32")
    served = served_model(run.setup, dataset, run.config.data.history_length)
    programs = programs_of(served, weights, 12)
    weights = used_arrays(programs, weights)
    users = spread_users(dataset, 20)
    requests = requests_of(programs, served, dataset, users)
    expected = expected_results(programs, weights, requests)
    return run, users, programs, weights, requests, expected


def compressed(run, state, method):
    """The run that a method makes of it, and its weights in codes."""
    # Rows of padding are zeros in a table that was trained.
    tables = {name: rows.at[0].set(0.0) for name, rows in state.tables.items()}
    state = dataclasses.replace(state, tables=tables)
    with jax.set_mesh(run.mesh):
        source = Source(
            config=run.config,
            dataset=run.dataset,
            setup=run.setup,
            state=state,
            step=0,
            arrays=parameters_of(run.setup, state),
        )
        model = METHODS[method].compress(source)
        setup, state = compressed_state(model, run.dataset, run.mesh)
        weights = in_codes(gather_weights(setup, state, run.dataset), model, setup.model.scored_table)
        return run_of_state(model.config, run.dataset, setup, state, 0), weights


@pytest.mark.parametrize(
    ("model", "encoder", "tasks", "message"),
    [
        (
            {"mixture": MixtureOfLogits(num_vectors=2, dim=4)},
            {},
            {"next_item": NextItem(candidates=InBatch())},
            "model.mixture: a run with it cannot be exported yet",
        ),
        (
            {},
            {"compression": HistoryCompression(recent=4, group=2)},
            None,
            "model.encoder.compression: a run",
        ),
    ],
)
def test_what_no_program_does_is_refused_by_name(world, model, encoder, tasks, message):
    config = dataclasses.replace(world.model, encoder=dataclasses.replace(world.encoder, **encoder), **model)
    dataset = world.dataset()
    run, _ = world.run(dataset, config, tasks)
    with pytest.raises(ValueError, match=message):
        served_model(run.setup, dataset, run.config.data.history_length)


def test_lists_are_those_of_the_run(served):
    run, users, _, _, _, expected = served
    apart, same = compare_with_run(run, users, expected["recommend"], "float32")
    assert apart < 5e-5
    assert same == 1.0


def test_tensorflow_answers_the_same(served):
    _, _, programs, weights, requests, expected = served
    found = {}
    for name, program in programs.items():
        inputs = {key: tf.constant(array) for key, array in requests[name].items()}
        graph, sizes = TensorFlowGraph(), {}
        for array in program.inputs:
            sizes |= {
                dim: graph.size(inputs[array.name], axis)
                for axis, dim in enumerate(array.dims)
                if isinstance(dim, str)
            }
        arguments = [tf.constant(weights[key]) for key in program.weights]
        arguments += [inputs[key] for key in sorted(inputs)]
        outputs = Lowering(graph, sizes).run(program.jaxpr, arguments)
        found[name] = {
            array.name: value.numpy() for array, value in zip(program.outputs, outputs, strict=True)
        }
    compare("TensorFlow", expected, found)


def test_onnx_answers_the_same(served, tmp_path):
    _, _, programs, weights, requests, expected = served
    write_onnx(programs, weights, tmp_path / "onnx", "0")
    found = {}
    for name in programs:
        session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / f"{name}.onnx"))
        names = [output.name for output in session.get_outputs()]
        found[name] = dict(zip(names, session.run(names, dict(requests[name])), strict=True))
    compare("ONNX", expected, found)


def test_judgements_are_those_of_the_run(served):
    """Of behaviours and values, at the items that the users met last."""
    run, users, programs, weights, requests, _ = served
    name = next((name for name in ("behaviours", "values") if name in programs), None)
    asked = {"behaviours": run.setup.outputs.num_behaviours, "values": run.setup.outputs.values}
    assert any(asked.values()) == (name is not None)
    if name is None:
        return
    from jaxrec.evaluation.user_ranking import evaluation_rows, predict_behaviours, predict_values

    dataset = run.dataset
    users = users[dataset.lengths[users] > 1]
    with jax.set_mesh(run.mesh):
        rows = evaluation_rows(run, "test", rows_per_batch=8, user_indices=users)
        predicted = (predict_behaviours if name == "behaviours" else predict_values)(run, rows)
    prefixes = dataset.validation_end[predicted.user_indices]
    history = np.zeros((len(prefixes), 8), np.int32)
    inputs = {"item_ids": history, "candidate_ids": predicted.targets[:, None]}
    for row, (user, end) in enumerate(zip(predicted.user_indices, prefixes, strict=True)):
        events = dataset.prefixes(np.array([user]), np.array([end]))
        kept = min(len(events.item_ids), 8)
        history[row, :kept] = events.item_ids[-kept:]
        for key, values, padding in (
            ("seconds", events.timestamps - 10**9, -1),
            ("labels", events.labels, -1),
        ):
            if key in requests[name]:
                shape = (len(prefixes), 8, *values.shape[1:])
                inputs.setdefault(key, np.full(shape, padding, np.int32))[row, :kept] = values[-kept:]
    inputs["user_ids"] = (predicted.user_indices + 1).astype(np.int32)
    if "candidate_context" in requests[name]:
        inputs["candidate_context"] = predicted.context[:, None]
    inputs = {key: inputs[key] for key in requests[name]}
    program = programs[name]
    found = jax.jit(program.function)({key: weights[key] for key in program.weights}, inputs)
    if name == "behaviours":
        ours = np.asarray(found["probabilities"])[:, 0]
        np.testing.assert_allclose(ours, 1 / (1 + np.exp(-predicted.logits)), rtol=1e-4, atol=1e-5)
    else:
        np.testing.assert_allclose(
            np.asarray(found["values"])[:, 0], predicted.predicted, rtol=1e-4, atol=1e-5
        )


def test_unread_weights_are_left_out(served):
    _, _, programs, weights, _, _ = served
    assert set(weights) == {name for program in programs.values() for name in program.weights}
    assert not any("log_variances" in name for name in weights)


def test_search_is_by_cosine_with_the_vector_of_the_text(world):
    run, state = world.run(world.dataset(), dataclasses.replace(world.model, text=TEXT))
    with jax.set_mesh(run.mesh):
        weights = gather_weights(run.setup, state, run.dataset)
        token_ids = np.asarray(run.dataset.item_tokens[4:9], np.int32)
        queries = np.asarray(run.text_queries(token_ids))
    model = served_model(run.setup, run.dataset, 8)
    codes = stored(weights, "float32")
    found = jax.jit(functools.partial(model.search, k=5))(codes, {"token_ids": token_ids})
    vectors = weights["items/vectors"] / np.linalg.norm(weights["items/vectors"], axis=1, keepdims=True).clip(
        1e-9
    )
    scores = queries @ vectors.T
    scores[:, 0] = -np.inf
    best = np.argsort(-scores, axis=1)[:, :5]
    np.testing.assert_array_equal(found["top_item_ids"], best)
    np.testing.assert_allclose(
        found["top_scores"], np.take_along_axis(scores, best, axis=1), rtol=1e-4, atol=1e-5
    )


def test_a_new_item_is_its_text_and_an_empty_one_nothing(world):
    run, state = world.run(world.dataset(), dataclasses.replace(world.model, text=TEXT, cosine=Cosine()))
    with jax.set_mesh(run.mesh):
        weights = gather_weights(run.setup, state, run.dataset)
    model = served_model(run.setup, run.dataset, 8)
    token_ids = np.asarray(run.dataset.item_tokens[[4, 4, 0]], np.int32)
    inputs = {"item_ids": np.array([0, 4, 0], np.int32), "token_ids": token_ids}
    codes = stored(weights, "float32")
    found = {name: np.asarray(x) for name, x in jax.jit(model.item_tower)(codes, inputs).items()}
    np.testing.assert_array_equal(found["vectors"][1], weights["items/vectors"][4])
    np.testing.assert_allclose(np.linalg.norm(found["vectors"], axis=1), [1, 1, 0], atol=1e-4)
    assert np.abs(found["vectors"][0] - found["vectors"][1]).max() > 1e-3
    assert found["bias"][0] == 0
