"""A run that reads the text of items: equal on every mesh and to a naive twin, resumed to the same bits, refreshed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.core.mesh import make_mesh
from jaxrec.data.dataset import PreparedDataset
from jaxrec.data.histories import UNKNOWN_TIME, Histories
from jaxrec.data.pipeline import train_batches
from jaxrec.embedding.engine import Exchange, look_up
from jaxrec.embedding.table import to_logical
from jaxrec.losses.samplers import UniformSampler
from jaxrec.models.item_text import TextTower
from jaxrec.models.two_tower import ITEM, ITEM_BIAS, TwoTowerConfig
from jaxrec.nn.compressed_attention import HistoryCompression
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.nn.text_encoder import BertTextEncoder
from jaxrec.tasks.candidates import FullSoftmax, SampledSoftmax
from jaxrec.tasks.item_similarity import ItemSimilarity
from jaxrec.tasks.masked_text import MaskedText
from jaxrec.tasks.next_item import NextItem
from jaxrec.training import step as step_module
from jaxrec.training import text_refresh
from jaxrec.training.checkpoint import Checkpoints
from jaxrec.training.gradients import batch_gradients
from jaxrec.training.inference import Inference
from jaxrec.training.item_text import StepTexts, choose_encoded, looked_up_arrays
from jaxrec.training.loop import LoopConfig, train
from jaxrec.training.setup import dataset_facts, place_batch
from jaxrec.training.state import merge_model, to_checkpoint
from jaxrec.training.step import make_train_step
from jaxrec.training.text_cache import ENCODED_AT, TOKENS, VECTORS
from jaxrec.training.text_refresh import TextEncoding, with_dataset_texts
from jaxrec.training.writer import read_metrics

LENGTH, ROWS, ITEMS, TOKENS_EACH, WORDS = 16, 16, 30, 6, 40
COLD, SILENT = 30, 7  # an item without events; one without text
PLAIN = dict.fromkeys(("dropout_rate", "attention_dropout_rate", "embedding_dropout_rate"), 0.0)
TEXT_ENCODER = EncoderConfig(
    embed_dim=8, num_layers=1, mlp_dim=8, max_positions=8, vocab_size=WORDS, type_vocab_size=1, **PLAIN
)
TEXT = TextTower(encoder=TEXT_ENCODER, trained_items=8, refresh_every_steps=2, id_dropout_rate=0.25)
ENCODER = EncoderConfig(embed_dim=8, num_layers=1, num_heads=2, mlp_dim=8, max_positions=LENGTH, **PLAIN)
SAMPLED = NextItem(candidates=SampledSoftmax(sampler=UniformSampler(num_samples=11)))

TASKS = {
    "full": NextItem(), "sampled": SAMPLED, "words": MaskedText(mask_token=2), "similar": ItemSimilarity(),
}  # fmt: skip


@pytest.fixture(scope="module")
def texts():
    """Twenty users; item 30 is new and item 7 has no text."""
    rng = np.random.default_rng(1)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(3, 14, 24))]).astype(np.int64)
    total = int(offsets[-1])
    item_ids = np.concatenate([np.arange(1, COLD), rng.integers(1, COLD, total - COLD + 1)]).astype(np.int32)
    histories = Histories(
        offsets, item_ids, np.full(total, UNKNOWN_TIME), rng.integers(-1, 2, (total, 2)).astype(np.int8)
    )
    tokens = rng.integers(1, WORDS, (ITEMS + 1, TOKENS_EACH)).astype(np.int32)
    tokens[np.arange(TOKENS_EACH) >= rng.integers(2, TOKENS_EACH + 1, (ITEMS + 1, 1))] = 0
    tokens[[0, SILENT]] = 0
    return PreparedDataset.from_histories(histories, num_items=ITEMS, item_tokens=tokens)


@pytest.fixture
def start(make, texts):
    """Setup and state, its vectors encoded, on a mesh."""

    def on(mesh, text=TEXT, dataset=texts, **changes):
        model = TwoTowerConfig(encoder=ENCODER, item_dim=4, text=text, init_scale=0.5)
        values = {"model": model, "tasks": {"next_item": NextItem()}, "facts": dataset_facts(dataset)}
        setup = make(mesh, **(values | changes))
        state = with_dataset_texts(setup, setup.init_state(), dataset)
        return setup, TextEncoding(setup).refresh(state)

    return on


def batches(dataset, num_steps=2):
    return list(
        train_batches(dataset, global_batch_size=ROWS, history_length=LENGTH, seed=0, stop_step=num_steps)
    )


def run(setup, state, dataset, num_steps=2):
    step, found = make_train_step(setup.step, state, setup.mesh), []
    for batch in batches(dataset, num_steps):
        state, metrics = step(state, place_batch(batch, setup.mesh))
        found.append(jax.device_get(metrics))
    return state, found


def logical(rows):
    return np.asarray(jax.jit(lambda x: to_logical(x, ITEMS + 1))(rows))[: ITEMS + 1]


@pytest.fixture(scope="module")
def twin():
    """What one device has learned, once it is known."""
    return []


def test_every_mesh_learns_and_answers_the_same(mesh, start, texts, twin):
    def learned(on):
        with jax.set_mesh(on):
            setup, state = start(on, dataclasses.replace(TEXT, masked_head=True), tasks=TASKS)
            for leaf, declared in zip(*map(jax.tree.leaves, (state, setup.abstract_state())), strict=True):
                assert (leaf.shape, leaf.dtype) == (declared.shape, declared.dtype)
                assert leaf.sharding.is_equivalent_to(declared.sharding, leaf.ndim)
            before = logical(state.texts[VECTORS])
            state, metrics = run(setup, state, texts)
            asked = Inference(setup, state)
            after = asked.texts[VECTORS], *asked.catalogue(), state.tables[ITEM]
            return metrics, before, *map(logical, after)

    if not twin:
        twin.append(learned(make_mesh((1, 1), jax.devices()[:1])))
    found, expected = learned(mesh), twin[0]
    for one, other in zip(found[0], expected[0], strict=True):
        for name in other:
            np.testing.assert_allclose(one[name], other[name], rtol=2e-4, err_msg=name)
    for one, other in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)
    assert np.abs(expected[2] - expected[1]).max() > 1e-3  # the encoder has learned
    assert not expected[1][[0, SILENT]].any()


def test_with_every_item_encoded_the_gradient_is_that_of_a_naive_twin(one_device, start, texts):
    text = dataclasses.replace(TEXT, trained_items=ITEMS, id_dropout_rate=0.0)
    setup, state = start(one_device, text)
    batch = place_batch(batches(texts, 1)[0], one_device)
    # Vectors that are kept must not matter: all but the silent ones are encoded in the step.
    kept = state.texts[VECTORS]
    state = dataclasses.replace(state, texts=state.texts | {VECTORS: jnp.where(kept == 0, 0.0, 9.0)})
    config, tokens = setup.step, jnp.asarray(texts.item_tokens)
    warm = jnp.asarray(texts.item_counts > 0)

    def naive(dense, table, bias):
        model = merge_model(config.graphdef, config.abstract, dense)
        told = model.text.projection(model.text.encode(tokens, key=None))
        gate = jax.nn.sigmoid(model.text.gate(jnp.concatenate([table, told], -1)))
        has_text = (tokens[:, 0] > 0)[:, None]
        mixed = jnp.where(warm[:, None], gate * table + (1 - gate) * told, told)
        vectors = jnp.where(has_text, mixed, table)
        bias = jnp.where(warm | ~has_text[:, 0], bias[:, 0], 0.0)
        states = model.encode(vectors[batch.item_ids], batch, causal=True, key=None)
        logits = (model.queries(states) @ vectors.T + bias)[..., 1:]
        same = (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]) & (batch.segment_ids[:, 1:] > 0)
        losses = jax.nn.logsumexp(logits, -1)[:, :-1] - jnp.take_along_axis(
            logits[:, :-1], jnp.maximum(batch.item_ids[:, 1:] - 1, 0)[..., None], -1
        )[..., 0]  # fmt: skip
        return jnp.sum(jnp.where(same, losses, 0.0)) / jnp.sum(same)

    arguments = state.dense, state.tables[ITEM], state.tables[ITEM_BIAS]
    loss, (dense, table, bias) = jax.jit(jax.value_and_grad(naive, argnums=(0, 1, 2)))(*arguments)
    gradients = jax.jit(lambda state, batch: batch_gradients(config, state, batch, jax.random.key(0)))(
        state, batch
    )
    step_module._norms(gradients)  # brings what look-ups add into the tables' gradients
    np.testing.assert_allclose(gradients.losses["next_item"], loss, rtol=1e-5)
    for found, wanted in ((gradients.dense, dense), (gradients.catalogue, {ITEM: table, ITEM_BIAS: bias})):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-4), found, wanted)
    assert float(jnp.abs(dense["text"]["encoder"]["token_table"]).max()) > 0


def test_an_item_has_one_vector_in_a_step_and_its_text_moves_no_other(one_device, start, texts):
    """Events and catalogue agree item by item, rows that are left out with them; nothing else sees a text."""
    setup, state = start(one_device, dataclasses.replace(TEXT, id_dropout_rate=0.5))
    model = merge_model(setup.step.graphdef, setup.step.abstract, state.dense)
    ids = jnp.asarray(batches(texts, 1)[0].item_ids)
    tables = {ITEM: state.tables[ITEM], ITEM_BIAS: state.tables[ITEM_BIAS] + 1.0}

    @jax.jit
    def entered(arrays, key):
        encoded = choose_encoded(
            TEXT, arrays, ids, num_items=ITEMS, parts=1, key=jax.random.key(1), exchange=Exchange()
        )
        found, _, _ = look_up(looked_up_arrays(arrays), {"": ids})
        known = StepTexts({"": ids}, found, arrays, encoded, key, 0.5)
        rows = {name: {"": table[ids]} for name, table in tables.items()}
        found, whole = known.enter(model, rows, tables, jax.random.key(2))
        return {name: of_table[""] for name, of_table in found.items()}, whole, encoded.item_ids

    stale = state.texts | {VECTORS: state.texts[VECTORS] * 1.5}
    of_events, whole, encoded = entered(stale, jax.random.key(3))
    real = np.asarray(ids) > 0
    for name in (ITEM, ITEM_BIAS):
        np.testing.assert_allclose(of_events[name][real], whole[name][ids[real]], rtol=1e-6, atol=1e-7)
    left_out = np.flatnonzero(np.asarray(whole[ITEM_BIAS])[1:, 0] == 0) + 1
    assert COLD in left_out and SILENT not in left_out and 6 < len(left_out) < 25
    assert len(set(np.asarray(encoded))) == TEXT.trained_items

    moved = int(encoded[0])
    tokens = stale[TOKENS].at[moved].set(jnp.array([1, 2, 3, 4, 5, 6]))
    _, other, _ = entered(stale | {TOKENS: tokens}, jax.random.key(3))
    changed = np.flatnonzero((np.asarray(other[ITEM]) != np.asarray(whole[ITEM])).any(1))
    np.testing.assert_array_equal(changed, [moved])


def test_a_new_item_is_its_text_alone(one_device, start):
    setup, state = start(one_device)
    rows = state.tables[ITEM].at[jnp.array([COLD, SILENT, 3])].add(1.0)
    bias = state.tables[ITEM_BIAS].at[jnp.array([COLD, 3])].add(1.0)
    averages = state.ema | {"tables": {ITEM: rows, ITEM_BIAS: bias}}  # what is evaluated
    other_rows = dataclasses.replace(state, ema=averages)
    tokens = state.texts[TOKENS].at[COLD].set(jnp.array([1, 2, 3, 4, 0, 0]))
    other_text = dataclasses.replace(state, texts=state.texts | {TOKENS: tokens})
    before, by_rows, by_text = (
        [np.asarray(x) for x in Inference(setup, one).catalogue()] for one in (state, other_rows, other_text)
    )
    changed = lambda other: set(np.flatnonzero((other[0] != before[0]).any(1) | (other[1] != before[1])))  # noqa: E731
    assert changed(by_rows) == {SILENT, 3}
    assert changed(by_text) == {COLD}


def test_training_knows_nothing_of_a_new_item(one_device, start, texts):
    """Neither its text nor its row moves a bit of what is learned, where it is no candidate either."""
    tasks = TASKS | {"full": NextItem(candidates=FullSoftmax(new_items=False))}
    del tasks["sampled"]  # draws its negatives from the whole catalogue
    setup, state = start(one_device, dataclasses.replace(TEXT, masked_head=True), tasks=tasks)
    tokens = state.texts[TOKENS].at[COLD].set(jnp.array([1, 2, 3, 4, 5, 6]))
    changed = {
        "texts": state.texts | {TOKENS: tokens, VECTORS: state.texts[VECTORS].at[COLD].set(3.0)},
        "tables": {name: table.at[COLD].add(1.0) for name, table in state.tables.items()},
    }
    other = jax.tree.map(jnp.array, dataclasses.replace(state, **changed))  # a step takes its state's buffers
    learned, of_other = (run(setup, one, texts, num_steps=3)[0] for one in (state, other))
    jax.tree.map(np.testing.assert_array_equal, learned.dense, of_other.dense)
    for name, table in learned.tables.items():
        warm = np.arange(len(table)) != COLD
        np.testing.assert_array_equal(table[warm], of_other.tables[name][warm])
    first, second = (np.asarray(Inference(setup, one).catalogue()[0]) for one in (learned, of_other))
    np.testing.assert_array_equal(np.flatnonzero((first != second).any(1)), [COLD])


LOOP = LoopConfig(
    num_train_steps=5, global_batch_size=ROWS, history_length=LENGTH, windows="last", log_every_steps=1,
    checkpoint_every_steps=10, keep_checkpoints=1, validate_every_steps=0, metric="ndcg@10",
)  # fmt: skip


def test_a_run_refreshes_in_time_and_goes_on_bit_exactly(make, start, texts, tmp_path, monkeypatch):
    mesh = make_mesh((2, 1), jax.devices()[:2])
    with jax.set_mesh(mesh):
        setup, _ = start(mesh)

        def trained(name):
            state = train(setup, texts, LOOP, tmp_path / name, None)
            return jax.tree.map(np.array, to_checkpoint(state, setup.tables, mesh))

        whole = trained("whole")
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "reached_preemption", lambda self, done: done == 3)
            trained("parts")
        jax.tree.map(np.testing.assert_array_equal, trained("parts"), whole)
    assert set(whole["texts"]) == {VECTORS, ENCODED_AT}
    for name in ("whole", "parts"):
        ages = [line["text_age_steps"] for line in read_metrics(tmp_path / name)]
        assert ages == [0, 1, 0, 1, 0]


def test_a_frozen_encoder_keeps_its_bits_and_what_follows_it_learns(one_device, start, texts):
    text = dataclasses.replace(TEXT, trained_items=0, refresh_every_steps=0)
    setup, state = start(one_device, text)  # with weight decay
    before = jax.tree.map(np.array, state.dense["text"])
    state, _ = run(setup, state, texts)
    jax.tree.map(np.testing.assert_array_equal, state.dense["text"]["encoder"], before["encoder"])
    for name in ("projection", "gate"):
        assert (np.asarray(state.dense["text"][name]["kernel"]) != before[name]["kernel"]).all()
    encoding = TextEncoding(setup)
    assert [encoding.is_due(step) for step in range(3)] == [True, False, False]


def test_bfloat16_in_both_encoders_and_in_microbatches(one_device, make, start, texts):
    narrow = {"dtype": "bfloat16"}
    text = dataclasses.replace(TEXT, encoder=dataclasses.replace(TEXT_ENCODER, **narrow))
    model = TwoTowerConfig(encoder=dataclasses.replace(ENCODER, **narrow), item_dim=4, text=text)
    setup, state = start(one_device, model=model, accumulation_steps=2)
    assert state.texts[VECTORS].dtype == jnp.bfloat16
    state, metrics = run(setup, state, texts)
    assert all(np.isfinite(line["loss"]) and line["failed_step"] == -1 for line in metrics)


def test_data_without_text_are_refused_by_name(one_device, make, start, texts, dataset):
    silent = PreparedDataset.from_histories(
        texts.histories(np.arange(24)), num_items=ITEMS, item_tokens=np.zeros((ITEMS + 1, 4), np.int32)
    )
    small = dataclasses.replace(TEXT, encoder=dataclasses.replace(TEXT_ENCODER, vocab_size=WORDS - 2))
    short = dataclasses.replace(TEXT, encoder=dataclasses.replace(TEXT_ENCODER, max_positions=5))
    for arguments, said in (
        ({"dataset": dataset}, "dataset 'memory' has no item text"),
        ({"dataset": silent}, "no item of dataset 'memory' has a text"),
        ({"text": small}, r"text.encoder.vocab_size=38, but dataset 'memory' has the token 39"),
        ({"text": short}, "text.encoder.max_positions=5 is less than the 6 tokens"),
    ):
        with pytest.raises(ValueError, match=said):
            start(one_device, **arguments)
    for text in (TEXT, None, dataclasses.replace(TEXT, trained_items=0, refresh_every_steps=0)):
        with pytest.raises(ValueError, match=r"task 'words' \(MaskedText\) trains the text encoder"):
            start(one_device, text, tasks={"words": MaskedText()})
    with_head = dataclasses.replace(TEXT, masked_head=True)
    with pytest.raises(ValueError, match="mask_token=103 is no token of text.encoder.vocab_size=40"):
        start(one_device, with_head, tasks={"words": MaskedText(), "full": NextItem()})
    with pytest.raises(ValueError, match="text.encoder.compression groups what is past"):
        dataclasses.replace(TEXT, encoder=dataclasses.replace(TEXT_ENCODER, compression=HistoryCompression()))


def test_an_encoder_starts_from_a_checkpoint_of_its_sizes(one_device, start, monkeypatch):
    setup, state = start(one_device, dataclasses.replace(TEXT, checkpoint="bert"))
    bert = BertTextEncoder(TEXT_ENCODER, with_pooler=True, rngs=nnx.Rngs(7))
    monkeypatch.setattr(text_refresh, "load_bert", lambda directory: (bert, TEXT_ENCODER))
    started = text_refresh.with_checkpoint_weights(setup, state)
    for dense in (started.dense, started.ema["dense"]):
        table = dense["text"]["encoder"]["token_table"]
        np.testing.assert_array_equal(table, bert.token_table[...])
    assert jax.tree.structure(started) == jax.tree.structure(state)
    adapted = dataclasses.replace(TEXT_ENCODER, lora_rank=2)
    setup, state = start(one_device, dataclasses.replace(TEXT, encoder=adapted, checkpoint="bert"))
    started = text_refresh.with_checkpoint_weights(setup, state)
    np.testing.assert_array_equal(started.dense["text"]["encoder"]["token_table"], bert.token_table[...])
    assert jax.tree.structure(started) == jax.tree.structure(state)
    other = dataclasses.replace(TEXT_ENCODER, mlp_dim=12)
    monkeypatch.setattr(text_refresh, "load_bert", lambda directory: (bert, other))
    with pytest.raises(ValueError, match=r"text.encoder.mlp_dim=8, but text.checkpoint='bert' has 12"):
        text_refresh.with_checkpoint_weights(setup, state)
