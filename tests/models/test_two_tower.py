"""The towers: shapes, options, and what each input may change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.core.batch import Batch
from jaxrec.models.two_tower import (
    ITEM,
    ITEM_BIAS,
    ITEM_OUTPUT,
    MIN_TEMPERATURE,
    USER,
    Cosine,
    Outputs,
    TwoTowerConfig,
)
from jaxrec.nn.encoder import EncoderConfig
from jaxrec.training.state import make_model

ENCODER = EncoderConfig(embed_dim=8, num_layers=1, mlp_dim=8, max_positions=6)
BATCH = Batch(
    item_ids=np.array([[1, 2, 3, 4, 0, 0]], np.int32),
    user_ids=np.array([[7, 7, 7, 8, 0, 0]], np.int32),
    segment_ids=np.array([[1, 1, 1, 2, 0, 0]], np.int32),
    positions=np.array([[0, 1, 2, 0, 0, 0]], np.int32),
    time_gaps=np.array([[0, 5, 9, 0, 0, 0]], np.int32),
    times=np.array([[0, 10, 300, 0, -1, -1]], np.int32),
    labels=np.full((1, 6, 2), -1, np.int8),
    values=np.full((1, 6), np.nan, np.float32),
)
ROWS = jax.random.normal(jax.random.key(0), (1, 6, 4))


def queries(config, batch=BATCH, **options):
    model = make_model(config, Outputs(), 0)
    states = model.encode(ROWS, batch, causal=True, key=None, **options)
    return np.asarray(model.queries(states))


def test_queries_live_in_the_space_of_the_items():
    assert queries(TwoTowerConfig(encoder=ENCODER, item_dim=4)).shape == (1, 6, 4)


def test_time_gaps_matter_only_where_they_are_asked_for():
    other = dataclasses.replace(BATCH, time_gaps=BATCH.time_gaps + 1)
    without, with_gaps = (TwoTowerConfig(encoder=ENCODER, item_dim=4, time_gaps=on) for on in (False, True))
    np.testing.assert_array_equal(queries(without), queries(without, other))
    assert (queries(with_gaps) != queries(with_gaps, other)).any()


def test_what_came_of_an_event_is_told_to_what_comes_after_it_alone():
    config = TwoTowerConfig(encoder=ENCODER, item_dim=4, event_behaviours=True)
    model = make_model(config, Outputs(read_behaviours=2), 0)
    labels = np.array(BATCH.labels)
    labels[0, 1] = 1, 0

    def states(labels, masked=None):
        batch = dataclasses.replace(BATCH, labels=labels)
        return np.asarray(model.encode(ROWS, batch, causal=True, key=None, masked=masked))[0]

    unknown, known = states(BATCH.labels), states(labels)
    changed = (unknown != known).any(axis=-1)
    np.testing.assert_array_equal(changed, [False, True, True, False, False, False])
    assert not np.allclose(known[1], states(np.where(labels >= 0, 1 - labels, -1))[1])
    hidden = jnp.asarray(BATCH.item_ids == 2)
    np.testing.assert_array_equal(states(labels, hidden), states(BATCH.labels, hidden))


def test_a_masked_event_hides_its_item():
    config = TwoTowerConfig(encoder=ENCODER, item_dim=4)
    model = make_model(config, Outputs(), 0)
    masked = jnp.asarray(BATCH.item_ids == 2)
    other_rows = ROWS.at[0, 1].add(1.0)
    shown, hidden = (
        [model.encode(rows, BATCH, causal=False, key=None, masked=mask) for rows in (ROWS, other_rows)]
        for mask in (None, masked)
    )
    assert (np.asarray(shown[0]) != np.asarray(shown[1])).any()
    np.testing.assert_array_equal(hidden[0], hidden[1])


def test_a_masked_event_hides_its_time():
    config = TwoTowerConfig(encoder=dataclasses.replace(ENCODER, time_bias=True), item_dim=4)
    model = make_model(config, Outputs(), 0)
    table = model.encoder.blocks[0].attention.relative_bias.time
    table[...] = jax.random.normal(jax.random.key(1), table.shape)
    masked = jnp.asarray(BATCH.item_ids == 2)
    later = dataclasses.replace(BATCH, times=BATCH.times + 40 * np.asarray(masked))
    shown, hidden = (
        [
            np.asarray(model.encode(ROWS, batch, causal=False, key=None, masked=mask))
            for batch in (BATCH, later)
        ]
        for mask in (None, masked)
    )
    assert (shown[0] != shown[1]).any()
    np.testing.assert_array_equal(hidden[0], hidden[1])


def test_tables_hold_padding_and_every_item():
    tables = TwoTowerConfig(item_dim=16).tables(100, 5)
    assert (tables[ITEM].num_rows, tables[ITEM].dim) == (101, 16)
    assert (tables[ITEM_BIAS].num_rows, tables[ITEM_BIAS].dim) == (101, 1)
    assert set(TwoTowerConfig(item_bias=False).tables(100, 5)) == {ITEM}
    two = TwoTowerConfig(item_bias=False, output_table=True).tables(100, 5)
    assert two[ITEM] == two[ITEM_OUTPUT] and len(two) == 2


def test_behaviour_logits_look_at_user_and_item():
    model = make_model(TwoTowerConfig(encoder=ENCODER, item_dim=4), Outputs(num_behaviours=2), 0)
    logits = model.behaviour_logits(ROWS, ROWS[:, ::-1])
    assert logits.shape == (1, 6, 2)
    assert logits.dtype == jnp.float32
    assert (np.asarray(logits) != np.asarray(model.behaviour_logits(ROWS, ROWS))).any()


@pytest.mark.parametrize("learned", [False, True])
def test_cosines_are_divided_by_the_temperature(learned):
    plain = queries(TwoTowerConfig(encoder=ENCODER, item_dim=4))
    config = TwoTowerConfig(encoder=ENCODER, item_dim=4, cosine=Cosine(temperature=0.2, learned=learned))
    model = make_model(config, Outputs(), 0)
    assert hasattr(model, "log_temperature") == learned
    lengths = np.linalg.norm(plain, axis=-1, keepdims=True)
    np.testing.assert_allclose(queries(config), plain / lengths / 0.2, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(model.candidate_vectors(ROWS), axis=-1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(model.item_vectors(ROWS), ROWS)  # as an event it keeps its length
    slope = jax.grad(lambda rows: jnp.sum(model.candidate_vectors(rows)))(jnp.zeros((2, 4)))
    assert np.isfinite(slope).all()


def test_a_learned_temperature_has_a_floor():
    config = TwoTowerConfig(encoder=ENCODER, item_dim=4, cosine=Cosine(learned=True))
    model = make_model(config, Outputs(), 0)
    model.log_temperature[...] = jnp.float32(-20.0)
    lengths = np.linalg.norm(model.queries(model.encode(ROWS, BATCH, causal=True, key=None)), axis=-1)
    np.testing.assert_allclose(lengths, 1 / MIN_TEMPERATURE, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"item_dim": 0}, "item_dim=0"), ({"projection": False, "item_dim": 5}, "item_dim=5")],
)
def test_bad_shapes_name_themselves(changes, message):
    with pytest.raises(ValueError, match=message):
        TwoTowerConfig(encoder=ENCODER, **changes)


def test_seeds_make_the_parameters():
    config = TwoTowerConfig(encoder=ENCODER, item_dim=4)
    first, same, other = (make_model(config, Outputs(), seed).projection[...] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert (np.asarray(first) != np.asarray(other)).any()


def test_a_user_row_moves_the_queries_of_its_user_alone():
    config = TwoTowerConfig(encoder=ENCODER, item_dim=4, user_dim=3)
    tables = config.tables(100, 5)
    assert (tables[USER].num_rows, tables[USER].dim, tables[USER].keyed_by) == (6, 3, USER)
    rows = jax.random.normal(jax.random.key(1), (1, 6, 3))
    one, other = queries(config, user_rows=rows), queries(config, user_rows=rows.at[:, 3].add(1.0))
    np.testing.assert_array_equal(one[:, :3], other[:, :3])
    assert np.abs(one[:, 3] - other[:, 3]).max() > 1e-3


def test_a_temperature_below_the_floor_is_refused():
    with pytest.raises(ValueError, match=r"cosine.temperature=0.0 must be at least 0.01"):
        Cosine(temperature=0.0)


def test_a_negative_width_is_refused():
    with pytest.raises(ValueError, match="user_dim=-1 must be at least 1; 0 = no table of users"):
        TwoTowerConfig(user_dim=-1)
