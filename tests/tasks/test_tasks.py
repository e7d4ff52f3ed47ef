"""Tasks: what they hide, what they predict, and that labels never become inputs."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.core.batch import Batch, ValueFacts
from jaxrec.core.mesh import make_mesh
from jaxrec.losses.samplers import LogUniformSampler, UniformSampler
from jaxrec.models.two_tower import ITEM, ITEM_BIAS, Outputs, TwoTowerConfig
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.tasks.base import DataFacts, Forward, Task
from jaxrec.tasks.behaviour import Behaviour
from jaxrec.tasks.candidates import Candidates, FullSoftmax, InBatch, Mixed, SampledBinary, SampledSoftmax
from jaxrec.tasks.masked_item import MaskedItem
from jaxrec.tasks.next_item import NextItem, next_events
from jaxrec.tasks.ranking import RankingTask
from jaxrec.tasks.rating import Rating
from jaxrec.training.state import make_model

NUM_ITEMS = 50
FACTS = DataFacts(
    name="toy",
    num_items=NUM_ITEMS,
    num_users=5,
    behaviours=("click", "buy"),
    item_counts=np.ones(NUM_ITEMS + 1, np.float32),
    value=ValueFacts(name="rating", mean=3.5, deviation=2.0),
)
TASKS = {
    "next_item": NextItem(), "masked_item": MaskedItem(), "behaviour": Behaviour(), "rating": Rating(),
}  # fmt: skip


def packed(lengths_by_row, row_length=24, seed=0):
    """A batch whose rows hold segments of these lengths."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths_by_row), row_length)
    segment_ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, lengths in enumerate(lengths_by_row):
        start = 0
        for number, length in enumerate(lengths, 1):
            segment_ids[row, start : start + length] = number
            positions[row, start : start + length] = np.arange(length)
            start += length
    real = segment_ids > 0
    return Batch(
        item_ids=np.where(real, rng.integers(1, NUM_ITEMS + 1, shape), 0).astype(np.int32),
        user_ids=np.where(real, 1 + np.arange(shape[0])[:, None], 0).astype(np.int32),
        segment_ids=segment_ids,
        positions=positions,
        time_gaps=np.where(positions > 0, 3, 0).astype(np.int32),
        times=np.where(real, 4 * positions, -1).astype(np.int32),
        labels=np.where(real[..., None], rng.integers(-1, 2, (*shape, 2)), -1).astype(np.int8),
        values=np.where(real & (rng.random(shape) < 0.8), rng.normal(3.5, 1, shape), np.nan).astype(
            np.float32
        ),
    )


rows_of_lengths = st.lists(st.lists(st.integers(1, 8), max_size=3), min_size=1, max_size=4)


@given(rows_of_lengths)
def test_targets_are_the_next_events_of_the_same_history(lengths_by_row):
    batch = packed(lengths_by_row)
    targets, weights = next_events(batch)
    for row, lengths in enumerate(lengths_by_row):
        expected = []
        start = 0
        for length in lengths:
            expected += [*batch.item_ids[row, start + 1 : start + length], 0]
            start += length
        expected += [0] * (24 - start)
        np.testing.assert_array_equal(targets[row], expected)
        np.testing.assert_array_equal(weights[row], np.array(expected) > 0)


@given(rows_of_lengths, st.integers(0, 5))
def test_hidden_events_are_real_and_predicted_where_they_stand(lengths_by_row, seed):
    batch, task = packed(lengths_by_row), MaskedItem(mask_rate=0.5, last_item_rate=0.3)
    plan = task.plan(batch, FACTS, jax.random.key(seed))
    columns, weights = np.asarray(plan.arrays["columns"]), np.asarray(plan.arrays["weights"])
    targets, shown = np.asarray(plan.arrays["target_ids"]), np.asarray(plan.lookups["shown"])
    masked = np.asarray(plan.arrays["masked"])
    real = batch.segment_ids > 0
    assert columns.shape[1] == task.bound(24)
    assert not (masked & ~real).any()
    predicted = np.zeros_like(real)
    for row in range(len(targets)):
        chosen = columns[row][weights[row] > 0]
        assert len(set(chosen)) == len(chosen)
        predicted[row, chosen] = True
        np.testing.assert_array_equal(targets[row][weights[row] > 0], batch.item_ids[row, chosen])
    assert not (predicted & ~real).any()
    # What is neither predicted nor padding is shown as it is.
    np.testing.assert_array_equal(shown[~predicted], batch.item_ids[~predicted])
    assert not (masked & ~predicted).any()
    assert float(plan.weight) == weights.sum()


def test_last_item_masking_hides_the_last_event_alone():
    batch = packed([[5, 7], [3], [24]])
    plan = MaskedItem(last_item_rate=1.0, keep_rate=0.0, replace_rate=0.0).plan(
        batch, FACTS, jax.random.key(0)
    )
    hidden = np.argwhere(np.asarray(plan.arrays["masked"]))
    np.testing.assert_array_equal(hidden, [[0, 4], [0, 11], [1, 2], [2, 23]])


@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_every_last_event_has_room(rate):
    batch = packed([[2] * 12] * 3)
    plan = MaskedItem(mask_rate=rate, last_item_rate=1.0).plan(batch, FACTS, jax.random.key(0))
    assert float(plan.weight) == 36


def test_masking_meets_its_rates():
    batch = packed([[24]] * 400)
    plan = MaskedItem(mask_rate=0.2, last_item_rate=0.0).plan(batch, FACTS, jax.random.key(0))
    predicted = float(plan.weight) / batch.item_ids.size
    masked = float(np.mean(plan.arrays["masked"]))
    assert abs(predicted - 0.2) < 0.01
    assert abs(masked / predicted - 0.8) < 0.03


def outputs(task, batch):
    """Everything that a task hands to the model: look-ups, targets, and the vectors that it compares."""
    model = make_model(
        TwoTowerConfig(
            encoder=EncoderConfig(embed_dim=8, num_layers=1, mlp_dim=8, max_positions=24), item_dim=8
        ),
        Outputs(num_behaviours=2, values=True),
        0,
    )
    table = jax.random.normal(jax.random.key(1), (NUM_ITEMS + 1, 8))
    plan = task.plan(batch, FACTS, jax.random.key(2))
    forward = Forward(model, batch, FACTS, table[batch.item_ids], {ITEM: table}, jax.random.key(3))
    forward.rows = {ITEM: {name: table[ids] for name, ids in plan.lookups.items()}}
    queries = forward.causal_queries
    hidden = plan.arrays.get("masked")
    shown = forward.rows[ITEM]["shown"] if "shown" in plan.lookups else forward.events
    states = model.encode(shown, batch, causal=False, key=jax.random.key(4), masked=hidden)
    return plan.lookups, plan.shared_lookups, queries, states


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_flipping_the_labels_changes_no_model_input(task):
    batch = packed([[5, 7], [3, 9], [24]])
    flipped = dataclasses.replace(
        batch, labels=np.where(batch.labels >= 0, 1 - batch.labels, -1).astype(np.int8), values=-batch.values
    )
    assert (flipped.labels != batch.labels).any()
    jax.tree.map(np.testing.assert_array_equal, outputs(task, batch), outputs(task, flipped))


def test_behaviours_are_judged_from_the_events_before():
    batch = packed([[5, 7], [3]])
    known = np.asarray(Behaviour().plan(batch, FACTS, jax.random.key(0)).arrays["known"])
    np.testing.assert_array_equal(known, (batch.labels >= 0) & (batch.positions > 0)[..., None])
    only_buy = np.asarray(
        Behaviour(behaviours=("buy",)).plan(batch, FACTS, jax.random.key(0)).arrays["known"]
    )
    assert not only_buy[..., 0].any()
    np.testing.assert_array_equal(only_buy[..., 1], known[..., 1])


@pytest.mark.parametrize("huber", [None, 0.5])
def test_ratings_are_judged_from_the_events_before(huber):
    batch, task = packed([[5, 7], [3]]), Rating(huber=huber)
    plan = task.plan(batch, FACTS, jax.random.key(0))
    known = ~np.isnan(batch.values) & (batch.positions > 0)
    assert float(plan.weight) == known.sum() < (batch.positions > 0).sum()
    predicted = np.random.default_rng(1).normal(size=batch.values.shape).astype(np.float32)
    loss = task.loss(types.SimpleNamespace(values=jnp.asarray(predicted)), plan, jax.random.key(0)).total
    errors = np.abs(predicted - (batch.values - 3.5) / 2.0)[known]
    expected = errors**2 / 2
    if huber is not None:
        expected = np.where(errors > huber, huber * (errors - huber / 2), expected)
        assert (errors > huber).any() and (errors < huber).any()
    np.testing.assert_allclose(loss, expected.sum(), rtol=1e-5)


def test_ratings_need_numbers_that_differ():
    with pytest.raises(ValueError, match="'toy' has none.*data.columns.value.column"):
        Rating().check_data(dataclasses.replace(FACTS, value=None))
    with pytest.raises(ValueError, match="'rating'.*is 3.5 everywhere"):
        Rating().check_data(
            dataclasses.replace(FACTS, value=ValueFacts(name="rating", mean=3.5, deviation=0.0))
        )
    with pytest.raises(ValueError, match="Rating.huber=0"):
        Rating(huber=0)


def test_a_missing_behaviour_names_task_and_column():
    with pytest.raises(
        ValueError, match="Behaviour asks for behaviour 'share', and dataset 'toy' has click, buy"
    ):
        Behaviour(behaviours=("share",)).check_data(FACTS)
    with pytest.raises(ValueError, match="Behaviour needs behaviour labels, and dataset 'toy'"):
        Behaviour().check_data(dataclasses.replace(FACTS, behaviours=()))
    NextItem().check_data(FACTS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NextItem(temperature=0.0), "temperature=0.0"),
        (lambda: NextItem(weight=-1.0), "weight=-1.0"),
        (lambda: MaskedItem(mask_rate=1.5), "mask_rate=1.5"),
        (lambda: MaskedItem(keep_rate=0.6, replace_rate=0.6), "must not exceed 1"),
        (lambda: MaskedItem(mask_rate=0.0, last_item_rate=0.0), "hide nothing"),
        (
            lambda: SampledBinary(sampler=LogUniformSampler()),
            "LogUniformSampler: its calibration holds for uniform",
        ),
        (lambda: MaskedItem(temperature=-1.0), "temperature=-1.0"),
    ],
)
def test_bad_hyper_parameters_name_themselves(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "candidates",
    [FullSoftmax(), SampledSoftmax(sampler=UniformSampler(num_samples=20_000)), InBatch(), Mixed()],
    ids=lambda c: type(c).__name__,
)
def test_every_candidate_set_estimates_the_full_softmax(candidates):
    """A great many draws, or a batch whose targets are uniform, come close to the whole catalogue."""
    batch = packed([[24]] * 60)
    model = make_model(
        TwoTowerConfig(
            encoder=EncoderConfig(embed_dim=8, num_layers=1, mlp_dim=8, max_positions=24), item_dim=8
        ),
        Outputs(),
        0,
    )
    rows = {
        ITEM: jax.random.normal(jax.random.key(1), (NUM_ITEMS + 1, 8)).at[0].set(0),
        ITEM_BIAS: jax.random.normal(jax.random.key(2), (NUM_ITEMS + 1, 1)).at[0].set(0),
    }

    def loss(candidates):
        task = NextItem(candidates=candidates)
        plan = task.plan(batch, FACTS, jax.random.key(3))
        forward = Forward(model, batch, FACTS, rows[ITEM][batch.item_ids], rows, None)
        wanted = plan.lookups | plan.shared_lookups
        forward.rows = {
            table: {name: array[ids] for name, ids in wanted.items()} for table, array in rows.items()
        }
        return float(task.loss(forward, plan, jax.random.key(4)).total / plan.weight)

    mesh = make_mesh((1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        assert loss(candidates) == pytest.approx(loss(FullSoftmax()), rel=0.02)
    assert candidates.size(NUM_ITEMS, 7) in (50, 20_001, 7, 1_031)
    assert candidates.needs_catalogue == isinstance(candidates, FullSoftmax)


def test_base_classes_say_what_is_missing():
    with pytest.raises(TypeError, match="Task must define plan"):
        Task().plan(packed([[2]]), FACTS, jax.random.key(0))
    with pytest.raises(TypeError, match="Candidates must define size"):
        Candidates().size(3, 4)
    with pytest.raises(TypeError, match="RankingTask must define query_mode"):
        _ = RankingTask().query_mode
    assert ITEM_BIAS in TwoTowerConfig().tables(3, 5)
    assert jnp.float32(Task().scored_pairs(1, 2, 3)) == 0
